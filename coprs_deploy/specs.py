"""Names, dtypes and shapes of the tensors between the graphs, and the geometry behind them.

Models, exporters, engines and the runtime share this contract. A tensor has one name everywhere:
torch argument, ONNX graph, engine binding and JSON key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import msgspec

IMAGE_ENCODER = "image_encoder"
PRIOR = "prior"
MASK_DECODER = "mask_decoder"
GRAPH_NAMES = (IMAGE_ENCODER, PRIOR, MASK_DECODER)

OUTSIDE_IMAGE_LOGIT = -50.0
"""Prior logit written over the padding before the mask decoder (public CoPRS code)."""

R = TypeVar("R", bound="Record")


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Frozen record stored as JSON; reading one back checks names, types and ranges."""

    def to_json(self) -> dict[str, Any]:
        """Return plain dictionaries, sequences, strings and numbers for JSON."""
        data: dict[str, Any] = msgspec.to_builtins(self)
        return data

    @classmethod
    def from_json(cls: type[R], data: object) -> R:
        """Read the result of :meth:`to_json`.

        Raises:
            ValueError: a field is unknown, missing, of another type or out of range; the message
                contains its path in the data.
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
    """Number of targets or images per call: the smallest, most frequent and largest.

    A fixed profile (``min == max``) gives a static shape; any other a symbolic dimension.
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
        """Whether the number is fixed."""
        return self.min == self.max

    def size_for(self, waiting: int) -> int:
        """Choose the batch size for a number of waiting items: ``min``, ``opt`` or ``max``.

        Few different sizes keep the number of captured CUDA graphs and compiled shapes small.

        Args:
            waiting: at least ``min``.

        Returns:
            The largest of the three that does not exceed ``waiting``.
        """
        return max(n for n in (self.min, self.opt, self.max) if n <= waiting)

    @classmethod
    def parse(cls, text: str) -> OptimizationProfile:
        """Read ``"N"`` (static) or ``"min,opt,max"``.

        Raises:
            ValueError: the text has another form, or the numbers are out of order.
        """
        parts = text.split(",")
        if len(parts) not in (1, 3) or not all(part.strip().isdigit() for part in parts):
            raise ValueError(f"profile is {text!r}; accepted: N, or min,opt,max (such as 1,4,16)")
        return cls(*map(int, parts if len(parts) == 3 else 3 * parts))


class ValidRegion(Record, frozen=True):
    """Part of the padded square that images can reach, where it is known at export.

    The rest is padding in every image. The encoder skips it as long as this changes nothing, or,
    with ``drops_padding``, in every block, which is a different function: image cells attend only
    to cells inside the region (which may include padding if an image is longer than the aspect
    ratio).

    Attributes:
        aspect_ratio: width and height of the least elongated accepted shape, such as (16, 9).
        height: computed rows in pixels, from the top.
        width: computed columns in pixels, from the left; the longer side is the square's.
        drops_padding: whether every block skips the padding.
    """

    aspect_ratio: tuple[int, int]
    height: int
    width: int
    drops_padding: bool = False

    def __post_init__(self) -> None:
        if min(*self.aspect_ratio, self.height, self.width) < 1:
            raise ValueError(
                f"the valid region is {self.height} x {self.width} for {self.aspect_ratio}; every "
                "number must be at least 1"
            )

    def contains(self, unpadded_size: Sequence[int]) -> bool:
        """Whether an image of this height and width in the padded square stays inside."""
        return unpadded_size[0] <= self.height and unpadded_size[1] <= self.width

    def __str__(self) -> str:
        width, height = self.aspect_ratio
        return f"images at least as {'wide' if width > height else 'tall'} as {width}:{height}"


def parse_aspect_ratio(text: str) -> tuple[int, int]:
    """Read width and height from ``"W:H"``.

    Raises:
        ValueError: the text has another form.
    """
    width, _, height = text.partition(":")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise ValueError(f"aspect ratio is {text!r}; accepted: W:H, such as 16:9 or 3:4")
    return int(width), int(height)


class TensorSpec(Record, frozen=True):
    """Input or output of a graph; symbolic dimensions: ``"targets"`` (N), ``"images"`` (B)."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def accepts(self, dtype: str, shape: tuple[int, ...]) -> bool:
        """Return whether a tensor of this dtype and shape fits."""
        if dtype != self.dtype or len(shape) != len(self.shape):
            return False
        return all(w == n or isinstance(w, str) for w, n in zip(self.shape, shape, strict=True))

    def shape_for(self, count: int) -> tuple[int, ...]:
        """Return the shape for a number of targets or images."""
        return tuple(count if isinstance(size, str) else size for size in self.shape)

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype} ({', '.join(map(str, self.shape))})"


class GraphSpec(Record, frozen=True):
    """Inputs and outputs of one graph, and the numbers of targets or images per call.

    Attributes:
        name: graph name.
        inputs: input tensors in order.
        outputs: output tensors in order.
        targets: number of concentrations per call.
        images: number of images per call (image encoder).
        valid_region: part of the square that images can reach (image encoder); None for all of it.
    """

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    targets: OptimizationProfile = OptimizationProfile()
    images: OptimizationProfile = OptimizationProfile()
    valid_region: ValidRegion | None = None

    @property
    def drops_padding(self) -> bool:
        """Whether this is an image encoder that skips the padding in every block."""
        return self.valid_region is not None and self.valid_region.drops_padding

    @property
    def profile(self) -> OptimizationProfile:
        """Optimization profile of the symbolic dimension; a graph has at most one."""
        return self.targets if self.images.is_static else self.images

    def count_of(self, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
        """Return the number of targets or images in a call; None for a static graph.

        Args:
            shapes: input shapes by tensor name.
        """
        sizes = (pair for t in self.inputs for pair in zip(t.shape, shapes[t.name], strict=True))
        return next((found for size, found in sizes if isinstance(size, str)), None)


MODEL_NAME = "coprs"
"""Name of the model that calls the graphs in a model repository of Triton."""

MODEL_TENSORS = (
    (
        TensorSpec("image", "bytes", (1,)),
        TensorSpec("concentration", "float32", ("targets", "hidden")),
    ),
    (
        TensorSpec("masks", "bool", ("targets", "height", "width")),
        TensorSpec("mask_logits", "float32", ("targets", 1, "rows", "columns")),
    ),
)
"""Its inputs, an image file and (N, D) concentrations; its outputs, (N, H, W) masks at the size of
the image and (N, 1, M, M) logits."""


def model_of_graph(graph: str) -> str:
    """Return the name of a graph in a model repository, where other models may be."""
    return f"{MODEL_NAME}_{graph}"


def graph_specs(
    geometry: Geometry,
    policy_hidden_size: int,
    targets: OptimizationProfile | None = None,
    images: OptimizationProfile | None = None,
    valid_region: ValidRegion | None = None,
) -> dict[str, GraphSpec]:
    """Specify the three graphs of a model.

    Args:
        geometry: sizes of the segmentation path.
        policy_hidden_size: D, the policy's hidden size.
        targets: number of concentrations per call; default 1.
        images: number of images per encoder call; default 1.
        valid_region: part of the square that images can reach; None for all of it.

    Returns:
        Graph name to specification, in execution order.
    """
    profile, batch = targets or OptimizationProfile(), images or OptimizationProfile()
    assert batch.min == 1, "a single image must never wait for a batch"
    count: int | str = profile.min if profile.is_static else "targets"
    num_images: int | str = 1 if batch.is_static else "images"
    mask, side, grid = geometry.mask_size, geometry.image_size, geometry.grid_size
    image = TensorSpec("image", "float32", (num_images, 3, side, side))
    encoded = (geometry.out_chans, grid, grid)
    embedding = TensorSpec("image_embedding", "float32", (1, *encoded))
    embeddings = TensorSpec("image_embedding", "float32", (num_images, *encoded))
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
