"""Segmentation metrics as pure functions: IoU, gIoU, cIoU, precision, no-match, correlation.

Masks are numpy arrays at the original image size. The IoU of two empty masks depends on the
protocol, so that every function that may meet it takes the value as ``empty``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

EMPTY_IOU = 0.0
"""IoU of two empty masks in evaluation: no mask is no hit."""


@dataclass(frozen=True)
class MaskCounts:
    """Pixel counts of a predicted mask and a ground-truth mask.

    Attributes:
        intersection: pixels in both masks.
        union: pixels in at least one of them.
    """

    intersection: int
    union: int


@dataclass(frozen=True)
class ExampleScore:
    """Scores of one example; all targets together count as one mask.

    Attributes:
        id: id of the example.
        question_type: type of the question, for metrics by type; may be empty.
        num_targets: number of ground-truth targets; 0 for a no-match example.
        num_found: number of predicted masks.
        mask: pixel counts of the predicted masks against the targets.
        prior: pixel counts of the priors, thresholded at logit 0, against the targets.
        instruction: the user's text.
        response: the whole generated text.
        extra: further metrics of this example, by name.
    """

    id: str
    question_type: str
    num_targets: int
    num_found: int
    mask: MaskCounts
    prior: MaskCounts
    instruction: str = ""
    response: str = ""
    extra: Mapping[str, float] = field(default_factory=dict)

    @property
    def mask_iou(self) -> float:
        """IoU of the predicted masks with the targets."""
        return iou(self.mask, empty=EMPTY_IOU)

    @property
    def prior_iou(self) -> float:
        """IoU of the thresholded priors with the targets."""
        return iou(self.prior, empty=EMPTY_IOU)

    def to_json(self) -> dict[str, Any]:
        """Return one flat row: id, texts, counts, IoU and the further metrics."""
        names = ("id", "question_type", "instruction", "response", "num_targets", "num_found")
        ious = {"mask_iou": self.mask_iou, "prior_iou": self.prior_iou}
        return {**{name: getattr(self, name) for name in names}, **ious, **self.extra}


def count_pixels(prediction: NDArray[np.bool_], ground_truth: NDArray[np.bool_]) -> MaskCounts:
    """Count the pixels of the intersection and the union of two masks of one shape."""
    return MaskCounts(
        int(np.count_nonzero(prediction & ground_truth)),
        int(np.count_nonzero(prediction | ground_truth)),
    )


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
    total = MaskCounts(sum(one.intersection for one in counts), sum(one.union for one in counts))
    return iou(total, empty=empty)


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


def no_match_metrics(num_targets: Sequence[int], num_found: Sequence[int]) -> dict[str, float]:
    """Compute precision and recall of no-match predictions.

    Args:
        num_targets: number of targets of each example; 0 is a no-match example.
        num_found: number of predicted masks of each example; 0 is a no-match prediction.

    Returns:
        ``no_match_recall`` if there are no-match examples, and ``no_match_precision`` if there are
        no-match predictions.
    """
    num_correct = list(zip(num_targets, num_found, strict=True)).count((0, 0))
    totals = {"no_match_recall": num_targets.count(0), "no_match_precision": num_found.count(0)}
    return {name: num_correct / total for name, total in totals.items() if total}


def mask_metrics(scores: Sequence[ExampleScore]) -> dict[str, float]:
    """Average the mask metrics over examples with a target; empty without examples.

    Returns:
        ``giou``, ``ciou``, ``precision_at_50``, ``prior_giou`` and the means of ``extra``.
    """
    if not scores:
        return {}
    masks, priors = [score.mask for score in scores], [score.prior for score in scores]
    return {
        "giou": giou(masks, empty=EMPTY_IOU),
        "ciou": ciou(masks, empty=EMPTY_IOU),
        "precision_at_50": precision_at(masks, 0.5, empty=EMPTY_IOU),
        "prior_giou": giou(priors, empty=EMPTY_IOU),
        **{key: float(np.mean([score.extra[key] for score in scores])) for key in scores[0].extra},
    }


def summarize(scores: Sequence[ExampleScore]) -> dict[str, float]:
    """Compute all metrics of an evaluation.

    Returns:
        Over examples with a target: the keys of :func:`mask_metrics`, the same by question type as
        ``TYPE.METRIC``, and ``pearson_r`` of prior IoU and mask IoU. Over all examples: the keys of
        :func:`no_match_metrics`. An undefined metric is left out.
    """
    present = [score for score in scores if score.num_targets]
    metrics = mask_metrics(present)
    for question_type in sorted({score.question_type for score in present} - {""}):
        part = mask_metrics([score for score in present if score.question_type == question_type])
        metrics.update({f"{question_type}.{name}": value for name, value in part.items()})
    priors, masks = [s.prior_iou for s in present], [s.mask_iou for s in present]
    if (pearson := pearson_r(priors, masks)) is not None:
        metrics["pearson_r"] = pearson
    num_targets, num_found = [s.num_targets for s in scores], [s.num_found for s in scores]
    return metrics | no_match_metrics(num_targets, num_found)
