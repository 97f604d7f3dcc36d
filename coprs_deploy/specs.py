"""The tensors between the stages: their names, dtypes and shapes, and the geometry behind them.

This is the contract that models, exporters, engines and the runtime share. A tensor has one name
everywhere, from the torch argument to the ONNX graph, the engine binding and the JSON key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import msgspec

IMAGE_ENCODER = "image_encoder"
PRIOR = "prior"
MASK_DECODER = "mask_decoder"
GRAPH_NAMES = (IMAGE_ENCODER, PRIOR, MASK_DECODER)

TARGETS_DIMENSION = "targets"
"""Name of the symbolic dimension N: how many concentrations are decoded on one image."""

IMAGES_DIMENSION = "images"
"""Name of the symbolic dimension B: how many images are encoded together."""

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
        out_chans: channels of the image embedding.
        pixel_mean: mean subtracted from RGB values in 0..255.
        pixel_std: divisor applied after the mean.
    """

    image_size: int = 1024
    patch_size: int = 16
    out_chans: int = 256
    pixel_mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    pixel_std: tuple[float, float, float] = (58.395, 57.12, 57.375)

    def __post_init__(self) -> None:
        if self.out_chans < 1:
            raise ValueError(f"out_chans is {self.out_chans}; it must be at least 1")
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


class OptimizationProfile(Record, frozen=True):
    """How many targets or images a graph takes in one call: fixed, or a range around a number.

    A fixed profile (``min == max``) gives a static shape; any other gives a symbolic
    dimension.
    """

    min: int = 1
    opt: int = 1
    max: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            raise ValueError(
                f"the profile is {self.min},{self.opt},{self.max}; accepted: 1 <= min <= opt <= max"
            )

    @property
    def is_static(self) -> bool:
        """Whether the graph has a fixed number of them."""
        return self.min == self.max

    def size_for(self, waiting: int) -> int:
        """How many of those that wait one call takes: few different numbers, each set up once.

        Args:
            waiting: at least ``min``.

        Returns:
            The largest of ``min``, ``opt`` and ``max`` that are there.
        """
        return max(n for n in (self.min, self.opt, self.max) if n <= waiting)

    @classmethod
    def parse(cls, text: str, name: str = "targets") -> OptimizationProfile:
        """Read ``"N"`` (static) or ``"min,opt,max"``.

        Args:
            text: what a user wrote.
            name: of the option, for the error.

        Raises:
            ValueError: another form, or numbers out of order.
        """
        parts = text.split(",")
        if len(parts) not in (1, 3) or not all(part.strip().isdigit() for part in parts):
            raise ValueError(f"{name} is {text!r}; accepted: N, or min,opt,max (as in 1,4,16)")
        numbers = [int(part) for part in parts]
        try:
            return cls(*numbers) if len(numbers) == 3 else cls(numbers[0], numbers[0], numbers[0])
        except ValueError as error:
            raise ValueError(f"{name} is {text!r}: {error}") from error


class ValidRegion(Record, frozen=True):
    """How far pictures reach into the padded square, where that is known when a bundle is made.

    What lies beyond is padding in every picture. The encoder computes nothing there as long as that
    changes nothing, or, if it ``drops_padding``, nothing at all, which is another function: cells
    of the picture attend to cells inside the extent alone (where a picture is longer than the
    aspect, to its padding inside too).

    Attributes:
        aspect_ratio: width and height of the ratio that the pictures are at least as long as.
        height: rows of pixels that are computed, from the top.
        width: columns of pixels, from the left; the longer side is that of the square.
        drops_padding: whether what lies beyond is left out altogether.
    """

    aspect_ratio: tuple[int, int]
    height: int
    width: int
    drops_padding: bool = False

    def __post_init__(self) -> None:
        if min(*self.aspect_ratio, self.height, self.width) < 1:
            raise ValueError(
                f"the extent is {self.height} x {self.width} for {self.aspect_ratio}; every number must "
                "be at least 1"
            )

    def holds(self, unpadded_size: Sequence[int]) -> bool:
        """Whether a picture of this height and width in the padded square stays inside."""
        return unpadded_size[0] <= self.height and unpadded_size[1] <= self.width

    def __str__(self) -> str:
        width, height = self.aspect_ratio
        return f"pictures at least as {'wide' if width > height else 'high'} as {width}:{height}"


def parse_aspect_ratio(text: str) -> tuple[int, int]:
    """Read the width and height of ``"W:H"``.

    Raises:
        ValueError: another form.
    """
    width, _, height = text.partition(":")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise ValueError(f"aspect is {text!r}; accepted: W:H, as in 16:9 or 3:4")
    return int(width), int(height)


class TensorSpec(Record, frozen=True):
    """One input or output of a graph; a dimension is a number, ``"targets"`` or ``"images"``."""

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

    def shape_for(self, count: int) -> tuple[int, ...]:
        """Its dimensions with this number of targets, or of images."""
        return tuple(count if isinstance(size, str) else size for size in self.shape)

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype} ({', '.join(map(str, self.shape))})"


class GraphSpec(Record, frozen=True):
    """The inputs and outputs of one stage, in order, and what one call takes.

    Attributes:
        name: of the stage.
        inputs: in order.
        outputs: in order.
        targets: how many concentrations.
        images: how many images, of the image encoder.
        valid_region: how far the pictures reach, of the image encoder; None stands for the whole square.
    """

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    targets: OptimizationProfile = OptimizationProfile()
    images: OptimizationProfile = OptimizationProfile()
    valid_region: ValidRegion | None = None

    @property
    def drops_padding(self) -> bool:
        """Whether this is an image encoder that leaves padding out altogether."""
        return self.valid_region is not None and self.valid_region.drops_padding

    @property
    def profile(self) -> OptimizationProfile:
        """The numbers that its symbolic dimension takes; a graph has one at most."""
        return self.targets if self.images.is_static else self.images

    def count_of(self, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
        """Read the number of targets, or of images, off inputs; None where the graph is static.

        Args:
            shapes: of the inputs, by name.
        """
        for tensor in self.inputs:
            for size, found in zip(tensor.shape, shapes[tensor.name], strict=True):
                if isinstance(size, str):
                    return found
        return None


def graph_specs(
    geometry: Geometry,
    policy_hidden_size: int,
    targets: OptimizationProfile | None = None,
    images: OptimizationProfile | None = None,
    valid_region: ValidRegion | None = None,
) -> dict[str, GraphSpec]:
    """Describe the three graphs of a model.

    Args:
        geometry: sizes of the segmentation path.
        policy_hidden_size: D, the width of the policy's hidden state.
        targets: how many concentrations one call takes; one by default.
        images: how many images the encoder takes in one call; one by default.
        valid_region: how far the pictures reach; None stands for the whole square.

    Returns:
        Graph name to specification, in the order in which the graphs run.
    """
    profile, batch = targets or OptimizationProfile(), images or OptimizationProfile()
    assert batch.min == 1, "a picture that comes alone must not wait for others"
    count: int | str = profile.min if profile.is_static else TARGETS_DIMENSION
    together: int | str = 1 if batch.is_static else IMAGES_DIMENSION
    mask, side, grid = geometry.mask_size, geometry.image_size, geometry.grid_size
    image = TensorSpec("image", "float32", (together, 3, side, side))
    encoded = (geometry.out_chans, grid, grid)
    embedding = TensorSpec("image_embedding", "float32", (1, *encoded))
    embeddings = TensorSpec("image_embedding", "float32", (together, *encoded))
    concentration = TensorSpec("concentration", "float32", (count, policy_hidden_size))
    prior_logits = TensorSpec("prior_logits", "float32", (count, 1, mask, mask))
    unpadded_size = TensorSpec("unpadded_size", "int64", (2,))
    mask_logits = TensorSpec("mask_logits", "float32", (count, 1, mask, mask))
    return {
        IMAGE_ENCODER: GraphSpec(
            IMAGE_ENCODER, (image,), (embeddings,), images=batch, valid_region=valid_region
        ),
        PRIOR: GraphSpec(PRIOR, (embedding, concentration), (prior_logits,), profile),
        MASK_DECODER: GraphSpec(
            MASK_DECODER, (embedding, prior_logits, unpadded_size), (mask_logits,), profile
        ),
    }
