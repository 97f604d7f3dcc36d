"""The tensors between the stages: their names, dtypes and shapes, and the geometry behind them.

This is the contract that models, exporters, engines and the runtime share. A tensor has one name
everywhere, from the torch argument to the ONNX graph, the engine binding and the JSON key.
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

IMAGE_ENCODER = "image_encoder"
PRIOR = "prior"
MASK_DECODER = "mask_decoder"
GRAPH_NAMES = (IMAGE_ENCODER, PRIOR, MASK_DECODER)

TARGETS_DIMENSION = "targets"
"""Name of the symbolic dimension N: how many concentrations are decoded on one image."""

OUTSIDE_IMAGE_LOGIT = -50.0
"""Prior logit written over the padding before the mask decoder (public CoPRS code)."""


R = TypeVar("R", bound="Record")


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A frozen record that JSON files hold; reading one back checks names, types and ranges."""

    def to_json(self) -> dict[str, Any]:
        """Return plain dictionaries, sequences, strings and numbers, as JSON takes them."""
        data: dict[str, Any] = msgspec.to_builtins(self)
        return data

    @classmethod
    def from_json(cls: type[R], data: object) -> R:
        """Read what :meth:`to_json` gave.

        Raises:
            ValueError: a field is unknown, missing, of another type or out of range; the message
                holds its place in the data.
        """
        return msgspec.convert(data, cls)


class Geometry(Record, frozen=True):
    """Sizes and pixel normalization of the segmentation path; the defaults are SAM's.

    Attributes:
        image_size: side of the padded square image in pixels.
        patch_size: side of one patch in pixels; a multiple of 4.
        embedding_channels: channels of the image embedding.
        pixel_mean: mean subtracted from RGB values in 0..255.
        pixel_std: divisor applied after the mean.
    """

    image_size: int = 1024
    patch_size: int = 16
    embedding_channels: int = 256
    pixel_mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    pixel_std: tuple[float, float, float] = (58.395, 57.12, 57.375)

    def __post_init__(self) -> None:
        if self.embedding_channels < 1:
            raise ValueError(
                f"embedding_channels is {self.embedding_channels}; it must be at least 1"
            )
        if self.patch_size < 4 or self.patch_size % 4:
            raise ValueError(f"patch_size is {self.patch_size}; it must be a multiple of 4")
        if self.image_size < self.patch_size or self.image_size % self.patch_size:
            raise ValueError(
                f"image_size is {self.image_size}; it must be a multiple of patch_size "
                f"({self.patch_size})"
            )
        if min(self.pixel_std) <= 0:
            raise ValueError(f"pixel_std is {self.pixel_std}; every value must be above 0")

    @property
    def grid_size(self) -> int:
        """Side of the image embedding in cells (64 for SAM)."""
        return self.image_size // self.patch_size

    @property
    def mask_size(self) -> int:
        """Side of prior and mask logits in cells: four times the grid (256 for SAM)."""
        return 4 * self.grid_size

    @property
    def mask_stride(self) -> int:
        """Pixels of the padded image along one mask cell (4 for SAM)."""
        return self.image_size // self.mask_size


class TargetsProfile(Record, frozen=True):
    """How many targets a graph takes in one call: fixed, or a range with a preferred number.

    A fixed profile (``minimum == maximum``) gives a static shape; any other gives the symbolic
    dimension ``targets``.
    """

    minimum: int = 1
    preferred: int = 1
    maximum: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.minimum <= self.preferred <= self.maximum:
            raise ValueError(
                f"targets is {self.minimum},{self.preferred},{self.maximum}; "
                "accepted: 1 <= min <= preferred <= max"
            )

    @property
    def is_static(self) -> bool:
        """Whether the graph has a fixed number of targets."""
        return self.minimum == self.maximum

    @classmethod
    def parse(cls, text: str) -> TargetsProfile:
        """Read ``"N"`` (static) or ``"min,preferred,max"``.

        Raises:
            ValueError: another form, or numbers out of order.
        """
        parts = text.split(",")
        if len(parts) not in (1, 3) or not all(part.strip().isdigit() for part in parts):
            raise ValueError(
                f"targets is {text!r}; accepted: N, or min,preferred,max (as in 1,4,16)"
            )
        numbers = [int(part) for part in parts]
        return cls(*numbers) if len(numbers) == 3 else cls(numbers[0], numbers[0], numbers[0])


class TensorSpec(Record, frozen=True):
    """One input or output of a graph; a dimension is a number or the name ``"targets"``."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def accepts(self, dtype: str, shape: tuple[int, ...]) -> bool:
        """Say whether a tensor of this dtype and shape fits."""
        return (
            dtype == self.dtype
            and len(shape) == len(self.shape)
            and all(
                isinstance(wanted, str) or wanted == found
                for wanted, found in zip(self.shape, shape, strict=True)
            )
        )

    def shape_for(self, targets: int) -> tuple[int, ...]:
        """Its dimensions with this number of targets."""
        return tuple(targets if isinstance(size, str) else size for size in self.shape)

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype} ({', '.join(map(str, self.shape))})"


class GraphSpec(Record, frozen=True):
    """The inputs and outputs of one stage, in order."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    targets: TargetsProfile = TargetsProfile()


def graph_specs(
    geometry: Geometry, policy_width: int, targets: TargetsProfile | None = None
) -> dict[str, GraphSpec]:
    """Describe the three graphs of a model.

    Args:
        geometry: sizes of the segmentation path.
        policy_width: D, the width of the policy's hidden state.
        targets: how many concentrations one call takes; one by default.

    Returns:
        Graph name to specification, in the order in which the graphs run.
    """
    profile = targets or TargetsProfile()
    count: int | str = profile.minimum if profile.is_static else TARGETS_DIMENSION
    mask = geometry.mask_size
    image = TensorSpec("image", "float32", (1, 3, geometry.image_size, geometry.image_size))
    embedding = TensorSpec(
        "image_embedding",
        "float32",
        (1, geometry.embedding_channels, geometry.grid_size, geometry.grid_size),
    )
    concentration = TensorSpec("concentration", "float32", (count, policy_width))
    prior_logits = TensorSpec("prior_logits", "float32", (count, 1, mask, mask))
    unpadded_size = TensorSpec("unpadded_size", "int64", (2,))
    mask_logits = TensorSpec("mask_logits", "float32", (count, 1, mask, mask))
    one = TargetsProfile()
    return {
        IMAGE_ENCODER: GraphSpec(IMAGE_ENCODER, (image,), (embedding,), one),
        PRIOR: GraphSpec(PRIOR, (embedding, concentration), (prior_logits,), profile),
        MASK_DECODER: GraphSpec(
            MASK_DECODER, (embedding, prior_logits, unpadded_size), (mask_logits,), profile
        ),
    }
