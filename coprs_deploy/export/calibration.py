"""int8 calibration: ranges of the inputs of the encoder's matrix products on a set of images.

The range of an input decides which value the 127 of an int8 stands for. Small ranges round finely
and clip more; the range with the least mean squared error is chosen. PyTorch's float32 encoder runs
on the images, and each input is added to a histogram as it passes, so that memory grows neither
with the number of images nor of products.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from coprs_deploy.artifacts import hash_file
from coprs_deploy.bundle import CalibrationRecord
from coprs_deploy.data.readers.image_folder import find_images
from coprs_deploy.engines.cache import Cache
from coprs_deploy.errors import ImageSizeError
from coprs_deploy.images import ResizeTransform, check_valid_region, load_image, prepare_image
from coprs_deploy.specs import Geometry, Record, ValidRegion

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CALIBRATION_FOLDER = "calibration"
CALIBRATION_REVISION = 1
"""Incremented when this module computes other ranges from the same images."""

MIN_IMAGES = 4
MAX_HELD_OUT = 4

INT8_LIMIT = 127
"""Largest int8 value; -128 is not used, so that the range is symmetric."""

_NUM_BINS = 4096
_LIMITS_TRIED = np.linspace(0.05, 1.0, 96)
"""Candidate ranges, as fractions of the largest value."""


@dataclass(frozen=True)
class CalibrationImages:
    """Images of a directory without duplicates, in an order given by their contents.

    ``held_out`` is one in four files, at most four, that the quantized graph is checked on;
    ``sha256`` is over the contents of the others.
    """

    used: tuple[Path, ...]
    held_out: tuple[Path, ...]
    sha256: str

    def record(self) -> CalibrationRecord:
        """Return the record for the manifest."""
        return CalibrationRecord(len(self.used), len(self.held_out), self.sha256)


class ProductRange(Record, frozen=True):
    """Range of the input of one matrix product.

    Attributes:
        largest: largest absolute value.
        limit: value that 127 stands for; larger ones are clipped.
        error: root mean square of the int8 rounding error over that of the values.
    """

    largest: float
    limit: float
    error: float


Ranges = Mapping[str, ProductRange]
"""Range by the name of the product's module, such as ``blocks.0.attn.qkv``."""


def find_calibration_images(directory: Path) -> CalibrationImages:
    """Collect the images in and below a directory.

    Raises:
        ValueError: there is no such directory, or it has too few different images.
    """
    if not directory.is_dir():
        raise ValueError(f"calibration is {directory}; accepted: a directory of images")
    by_content = {hash_file(path): path for path in find_images(directory)}
    if len(by_content) < MIN_IMAGES:
        raise ValueError(
            f"calibration is {directory}, which has {len(by_content)} different images; accepted: "
            f"at least {MIN_IMAGES}, better 32 to 128 of the kind that the model will see"
        )
    hashes = sorted(by_content)
    num_held_out = min(MAX_HELD_OUT, len(hashes) // 4)
    held_out, used = hashes[:num_held_out], hashes[num_held_out:]
    return CalibrationImages(
        used=tuple(by_content[name] for name in used),
        held_out=tuple(by_content[name] for name in held_out),
        sha256=hashlib.sha256("".join(used).encode()).hexdigest(),
    )


def check_calibration_images(
    images: CalibrationImages, geometry: Geometry, valid_region: ValidRegion | None
) -> None:
    """Check early that all images can be read and lie inside the valid region of an encoder.

    Raises:
        ImageError: one cannot be read, or lies outside.
    """
    outside = []
    for path in (*images.used, *images.held_out):
        try:
            check_valid_region(ResizeTransform.of(load_image(path), geometry), valid_region)
        except ImageSizeError as error:
            outside.append(f"{path}: {error}")
    if outside:
        raise ImageSizeError(
            f"{len(outside)} calibration images do not fit the aspect ratio; first: {outside[0]}"
        )


def calibrate(
    encoder: torch.nn.Module,
    products: Collection[str],
    images: Sequence[Path],
    geometry: Geometry,
    report: Callable[[str], None] = lambda step: None,
) -> dict[str, ProductRange]:
    """Measure the input ranges of linear modules, by name, of a float32 encoder on the CPU.

    ``report`` is called with the number of each image as it starts.

    Raises:
        ImageError: an image cannot be read.
        ValueError: an activation of the encoder is not finite.
    """
    import torch

    counts = {name: _Magnitudes() for name in products}

    def count(module: torch.nn.Module, inputs: tuple[Tensor, ...], *, name: str) -> None:
        counts[name].add(inputs[0])

    hooks = [
        encoder.get_submodule(name).register_forward_pre_hook(partial(count, name=name))
        for name in products
    ]
    try:
        for number, path in enumerate(images, start=1):
            report(f"image {number}/{len(images)}")
            prepared = prepare_image(load_image(path), geometry)
            with torch.inference_mode():
                encoder(torch.from_numpy(prepared.image))
    finally:
        for hook in hooks:
            hook.remove()
    unusable = [name for name, seen in counts.items() if not math.isfinite(seen.largest)]
    if unusable:
        raise ValueError(
            f"activations of the encoder are not finite at {unusable[0]}: it cannot be calibrated; "
            "check the checkpoint"
        )
    return {name: seen.summarize() for name, seen in counts.items()}


def cached_ranges(
    cache: Cache,
    graph_sha256: str,
    images: CalibrationImages,
    measure: Callable[[], dict[str, ProductRange]],
) -> dict[str, ProductRange]:
    """Return the ranges of a float32 graph on a set of images, from the cache if they are in it."""
    key = f"{CALIBRATION_REVISION} {graph_sha256} {images.sha256}"
    name = f"{hashlib.sha256(key.encode()).hexdigest()}.json"
    with suppress(ValueError):  # missing, or damaged from outside: measure, and replace it
        stored = cache.load_blob(CALIBRATION_FOLDER, name) or b""
        return msgspec.json.decode(stored, type=dict[str, ProductRange])
    ranges = measure()
    cache.save_blob(CALIBRATION_FOLDER, name, msgspec.json.encode(ranges))
    return ranges


class _Magnitudes:
    """Histogram of absolute values; its range doubles when a value lies beyond it."""

    def __init__(self) -> None:
        self.largest = 0.0
        self._top = 0.0
        self._counts: NDArray[np.float64] = np.zeros(_NUM_BINS)

    def add(self, values: Tensor) -> None:
        magnitudes = values.detach().abs().flatten()
        largest = float(magnitudes.max())
        if not math.isfinite(largest) or not math.isfinite(self.largest):
            self.largest = math.inf
            return
        self.largest = max(self.largest, largest)
        self._top = self._top or largest
        while largest > self._top:
            merged = self._counts.reshape(-1, 2).sum(axis=1)
            self._counts = np.concatenate([merged, np.zeros(_NUM_BINS // 2)])
            self._top *= 2
        if self._top:
            self._counts += magnitudes.histc(_NUM_BINS, 0, self._top).numpy()

    def summarize(self) -> ProductRange:
        if not self.largest:
            return ProductRange(0.0, 1.0, 0.0)
        values = (np.arange(_NUM_BINS) + 0.5) * (self._top / _NUM_BINS)
        errors = [self._squared_error(values, share * self.largest) for share in _LIMITS_TRIED]
        best = int(np.argmin(errors))
        power = float((self._counts * values**2).sum())
        return ProductRange(
            self.largest, float(_LIMITS_TRIED[best]) * self.largest, math.sqrt(errors[best] / power)
        )

    def _squared_error(self, values: NDArray[Any], limit: float) -> float:
        step = limit / INT8_LIMIT
        rounded = np.minimum(np.rint(values / step), INT8_LIMIT) * step
        return float((self._counts * (rounded - values) ** 2).sum())
