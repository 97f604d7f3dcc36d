"""Segmentation metrics as pure functions: IoU, gIoU, cIoU, precision, correlation.

Masks are numpy arrays at the original image size. The IoU of two empty masks depends on the
protocol, so that every function that may meet it takes the value as ``empty``. Metrics of whole
evaluations, with groups and confidence intervals, are in :mod:`coprs_deploy.evaluation.summary`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from coprs_deploy.evaluation.rows import MaskCounts

EMPTY_IOU = 0.0
"""IoU of two empty masks in training and benchmarks: no mask is no hit."""


def count_pixels(prediction: NDArray[np.bool_], ground_truth: NDArray[np.bool_]) -> MaskCounts:
    """Count the pixels of two masks of one shape, of their intersection and of their union."""
    intersection = int(np.count_nonzero(prediction & ground_truth))
    sizes = int(np.count_nonzero(prediction)), int(np.count_nonzero(ground_truth))
    return MaskCounts(intersection, sum(sizes) - intersection, *sizes)


def union(masks: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Merge masks (N, H, W) into one (H, W); N may be 0."""
    merged: NDArray[np.bool_] = np.any(masks, axis=0)
    return merged


def iou(counts: MaskCounts, *, empty: float) -> float:
    """Return intersection over union, in [0, 1]; ``empty`` for two empty masks."""
    return counts.intersection / counts.union if counts.union else empty


def giou(counts: Sequence[MaskCounts], *, empty: float) -> float:
    """Return gIoU of at least one example: the mean of their IoU."""
    return float(np.mean([iou(one, empty=empty) for one in counts]))


def ciou(counts: Sequence[MaskCounts], *, empty: float) -> float:
    """Return cIoU, the cumulative IoU: sum of intersections over sum of unions."""
    total = sum(one.union for one in counts)
    return sum(one.intersection for one in counts) / total if total else empty


def precision_at(counts: Sequence[MaskCounts], threshold: float, *, empty: float) -> float:
    """Return the share of at least one example whose IoU is above a threshold."""
    return float(np.mean([iou(one, empty=empty) > threshold for one in counts]))


def pearson_r(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Return the Pearson correlation of two lists; None if one of them is constant."""
    if len(x) < 2 or np.std(x) == 0 or np.std(y) == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1])


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of the mean; nan for fewer than two values."""
    if len(values) < 2:
        return math.nan
    return float(np.std(values, ddof=1) / math.sqrt(len(values)))
