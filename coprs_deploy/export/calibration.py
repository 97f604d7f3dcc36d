"""What enters the encoder's large products, measured on a folder of pictures.

The range of each input decides which value the 127 of an int8 stands for. Small ranges round
finely and clip more; the one with the least mean squared error is taken. PyTorch's float32 encoder
runs on the pictures, and each input is counted as it passes, so that memory does not grow with the
number of pictures or of products.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from coprs_deploy.artifacts import hash_file
from coprs_deploy.bundle import CalibrationRecord
from coprs_deploy.engines.cache import BuildCache
from coprs_deploy.errors import ImageSizeError
from coprs_deploy.images import ResizeTransform, check_valid_region, load_image, prepare_image
from coprs_deploy.specs import Geometry, Record, ValidRegion

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CALIBRATION_FOLDER = "calibration"
"""Below the cache of engines."""

CALIBRATION_REVISION = 1
"""Raised when this module finds other ranges on the same pictures."""

MIN_IMAGES = 4
MAX_HELD_OUT = 4

INT8_LIMIT = 127
"""Largest step: int8 without -128, so that zero lies in the middle."""

_NUM_BINS = 4096
_LIMITS_TRIED = np.linspace(0.05, 1.0, 96)
"""As shares of the largest value."""


@dataclass(frozen=True)
class CalibrationImages:
    """The pictures of a folder, each once, in an order that their contents give.

    Attributes:
        used: what the ranges are measured on.
        held_out: one in four, at most four: what the quantized graph is checked on.
        sha256: names those that are used.
    """

    used: tuple[Path, ...]
    held_out: tuple[Path, ...]
    sha256: str

    def record(self) -> CalibrationRecord:
        """Say what a manifest keeps of it."""
        return CalibrationRecord(len(self.used), len(self.held_out), self.sha256)


class ProductRange(Record, frozen=True):
    """What was seen at the input of one product.

    Attributes:
        largest: largest absolute value.
        limit: the value that 127 stands for; what is beyond it is clipped.
        error: root mean square of what int8 changes, over that of the values.
    """

    largest: float
    limit: float
    error: float


Ranges = Mapping[str, ProductRange]
"""By name of the product: that of its module, as ``blocks.0.attn.qkv``."""


class _StoredRanges(Record, frozen=True):
    ranges: dict[str, ProductRange]


@dataclass(frozen=True)
class Calibrated:
    """How an encoder was calibrated.

    Attributes:
        pictures: what it was measured on, and what it shall be checked on.
        ranges: what was found.
    """

    pictures: CalibrationImages
    ranges: Ranges


def find_pictures(folder: Path) -> CalibrationImages:
    """Collect the pictures in and below a folder.

    Raises:
        ValueError: there is no such folder, or too few different pictures.
    """
    if not folder.is_dir():
        raise ValueError(f"calibration is {folder}, which is no folder; accepted: one of pictures")
    suffixes = Image.registered_extensions()
    files = (p for p in sorted(folder.rglob("*")) if p.suffix.lower() in suffixes and p.is_file())
    by_content = {hash_file(path): path for path in files}
    if len(by_content) < MIN_IMAGES:
        raise ValueError(
            f"calibration is {folder}, with {len(by_content)} different pictures in it; it takes "
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


def require_pictures_inside(
    pictures: CalibrationImages, geometry: Geometry, valid_region: ValidRegion | None
) -> None:
    """Refuse pictures that reach beyond what an encoder is exported for, before it is.

    Raises:
        ImageError: one cannot be read, or reaches too far.
    """
    if valid_region is None:
        return
    outside = []
    for path in (*pictures.used, *pictures.held_out):
        try:
            check_valid_region(ResizeTransform.of(load_image(path), geometry), valid_region)
        except ImageSizeError as error:
            outside.append(f"{path}: {error}")
    if outside:
        raise ImageSizeError(
            f"{len(outside)} of the calibration's pictures reach too far; the first: {outside[0]}"
        )


def calibrate(
    encoder: torch.nn.Module,
    products: Collection[str],
    pictures: Sequence[Path],
    geometry: Geometry,
    report: Callable[[str], None] = lambda step: None,
) -> dict[str, ProductRange]:
    """Measure the inputs of some linear modules.

    Args:
        encoder: the float32 image encoder on the CPU.
        products: names of linear modules of it.
        pictures: files.
        geometry: of the model.
        report: called with the number of each picture as it starts.

    Returns:
        A range for each product.

    Raises:
        ImageError: a picture cannot be read.
        ValueError: the encoder gives values that are not finite.
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
        for number, path in enumerate(pictures, start=1):
            report(f"picture {number}/{len(pictures)}")
            prepared = prepare_image(load_image(path), geometry)
            with torch.inference_mode():
                encoder(torch.from_numpy(prepared.image))
    finally:
        for hook in hooks:
            hook.remove()
    unusable = [name for name, seen in counts.items() if not math.isfinite(seen.largest)]
    if unusable:
        raise ValueError(
            f"the encoder gives values that are not finite at {unusable[0]}: its weights cannot be "
            "calibrated; check the checkpoint"
        )
    return {name: seen.summarize() for name, seen in counts.items()}


def cached_ranges(
    cache: BuildCache,
    graph_sha256: str,
    pictures: CalibrationImages,
    measure: Callable[[], dict[str, ProductRange]],
) -> dict[str, ProductRange]:
    """Give the ranges of a graph on some pictures; they are measured once.

    Args:
        cache: where they are kept.
        graph_sha256: of the float32 graph.
        pictures: what they are measured on.
        measure: measures them.
    """
    key = f"{CALIBRATION_REVISION} {graph_sha256} {pictures.sha256}"
    name = f"{hashlib.sha256(key.encode()).hexdigest()}.json"
    kept = cache.load_blob(CALIBRATION_FOLDER, name)
    if kept is not None:
        try:
            return _StoredRanges.from_json(json.loads(kept)).ranges
        except ValueError:
            pass  # cut short by something else than this code: measured anew, and replaced
    ranges = measure()
    text = json.dumps(_StoredRanges(ranges).to_json())
    cache.keep_blob(CALIBRATION_FOLDER, name, text.encode())
    return ranges


class _Magnitudes:
    """Counts absolute values in equal bins; their range doubles when a value is beyond it."""

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
            self.largest,
            float(_LIMITS_TRIED[best]) * self.largest,
            math.sqrt(errors[best] / power),
        )

    def _squared_error(self, values: NDArray[Any], limit: float) -> float:
        step = limit / INT8_LIMIT
        rounded = np.minimum(np.rint(values / step), INT8_LIMIT) * step
        return float((self._counts * (rounded - values) ** 2).sum())
