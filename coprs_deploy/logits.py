"""Logits of masks and priors at the original image size, and their probabilities; numpy only.

SAM upsamples logits bilinearly to the padded image, crops, and resizes bilinearly to the original
size (half-pixel centers, no antialiasing). Both steps are linear and separable: together, every
pixel is a weighted sum of at most three consecutive cells along each side. The padded image is
never built, and no graph resizes.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from coprs_deploy.images import STRIP_PIXELS, ResizeTransform
from coprs_deploy.specs import Geometry


def mask_cells(unpadded_size: NDArray[np.int64], geometry: Geometry) -> tuple[int, int]:
    """Return rows and columns of mask cells that the resized image covers, partly or fully."""
    height, width = (-(-int(side) // geometry.mask_stride) for side in unpadded_size)
    return height, width


def resize_logits(
    logits: NDArray[np.float32], resize: ResizeTransform, geometry: Geometry
) -> NDArray[np.float32]:
    """Resize mask or prior logits to the original image size.

    Args:
        logits: (N, 1, M, M) float32, M = ``geometry.mask_size``.
        resize: sizes of the image that the logits belong to.
        geometry: sizes of the model.

    Returns:
        (N, H, W) float32 logits.
    """
    resized = np.empty((len(logits), *resize.original_size), np.float32)
    for target, rows, strip in _strips(logits, resize, geometry):
        resized[target, rows] = strip
    return resized


def threshold_logits(
    logits: NDArray[np.float32], resize: ResizeTransform, geometry: Geometry
) -> NDArray[np.bool_]:
    """Resize logits as :func:`resize_logits` does, and threshold them at 0: (N, H, W) bool."""
    masks = np.empty((len(logits), *resize.original_size), np.bool_)
    for target, rows, strip in _strips(logits, resize, geometry):
        np.greater(strip, 0, out=masks[target, rows])
    return masks


def sigmoid(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Map logits to probabilities in [0, 1], without overflow."""
    probabilities: NDArray[np.float32] = 0.5 * (1 + np.tanh(0.5 * logits))
    return probabilities


class _Taps(NamedTuple):
    """Weighted sums along one side of an image with L pixels.

    Attributes:
        cells: (3, L) cells of the mask that a pixel depends on.
        weights: (3, L) float32.
    """

    cells: NDArray[np.int64]
    weights: NDArray[np.float32]


def _strips(
    logits: NDArray[np.float32], resize: ResizeTransform, geometry: Geometry
) -> Iterator[tuple[int, slice, NDArray[np.float32]]]:
    """Resize in strips of rows that stay in the processor's cache.

    Not by a matrix product: OpenBLAS threads of numpy spin for some 20 ms after each one, on the
    cores that decode the next response.

    Yields:
        Target, rows, and their (rows, W) float32 logits.
    """
    sizes = (geometry.mask_size, geometry.image_size)
    down, across = (
        _taps(*sizes, unpadded, original)
        for unpadded, original in zip(
            resize.unpadded_size.tolist(), resize.original_size, strict=True
        )
    )
    height, width = resize.original_size
    num_rows = max(1, STRIP_PIXELS // width)
    for target, mask in enumerate(logits[:, 0]):
        wide = np.ascontiguousarray(_weighted_sum(mask.T, across, slice(None)).T)
        for top in range(0, height, num_rows):
            rows = slice(top, min(top + num_rows, height))
            yield target, rows, _weighted_sum(wide, down, rows)


def _weighted_sum(cells: NDArray[np.float32], taps: _Taps, rows: slice) -> NDArray[np.float32]:
    """Resize along the first dimension; return some rows of the result."""
    first, *others = zip(taps.cells[:, rows], taps.weights[:, rows, None], strict=True)
    total: NDArray[np.float32] = cells[first[0]] * first[1]
    for index, weight in others:
        total += cells[index] * weight
    return total


@lru_cache(maxsize=16)
def _taps(mask_size: int, image_size: int, unpadded: int, original: int) -> _Taps:
    """Compose mask -> padded image -> crop -> original along one side.

    Two neighboring pixels of the padded image lie between the same two cells, or one cell further.
    """
    pixel, share = _interpolation(unpadded, original)
    cell, weight = _interpolation(mask_size, image_size)
    following = np.minimum(pixel + 1, unpadded - 1)
    first, before, after = cell[pixel], weight[pixel], weight[following]
    is_further = cell[following] > first
    weights = (
        (1 - share) * (1 - before) + share * np.where(is_further, 0, 1 - after),
        (1 - share) * before + share * np.where(is_further, 1 - after, after),
        share * np.where(is_further, after, 0),
    )
    cells = np.minimum(first + np.arange(3)[:, None], mask_size - 1)
    return _Taps(cells, np.asarray(weights, np.float32))


def _interpolation(size: int, new_size: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the lower neighbor of each new position, and the weight of the next one."""
    position = np.maximum((np.arange(new_size) + 0.5) * size / new_size - 0.5, 0.0)
    lower = np.minimum(position.astype(np.int64), size - 1)
    return lower, np.where(lower < size - 1, position - lower, 0.0)
