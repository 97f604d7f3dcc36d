"""Overlaps of masks, and figures over many answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class MaskCounts:
    """Two sets of pixels, counted.

    Attributes:
        intersection: pixels that both hold.
        union: pixels that either holds.
    """

    intersection: int
    union: int

    @property
    def iou(self) -> float:
        """Intersection over union; 0 where both are empty."""
        return self.intersection / self.union if self.union else 0.0


@dataclass(frozen=True)
class ExampleScore:
    """One answer beside the truth; several targets count as one set of pixels.

    Attributes:
        id: of the example.
        kind: of the question, for figures by kind.
        num_targets: targets that there are; 0 where nothing matches.
        num_found: masks that were given.
        mask: of the masks with the targets.
        prior: of the priors, cut at logit 0, with the targets.
    """

    id: str
    kind: str
    num_targets: int
    num_found: int
    mask: MaskCounts
    prior: MaskCounts


def overlap(found: NDArray[np.bool_], truth: NDArray[np.bool_]) -> MaskCounts:
    """Count what two masks of one shape share."""
    return MaskCounts(
        int(np.count_nonzero(found & truth)),
        int(np.count_nonzero(found | truth)),
    )


def union(masks: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Join (N, H, W) masks to one (H, W); N may be 0."""
    joined: NDArray[np.bool_] = np.any(masks, axis=0)
    return joined


def summarize(answers: Sequence[ExampleScore]) -> dict[str, float]:
    """Bring answers down to figures.

    Returns:
        Over questions that have an answer: ``mask_iou`` (the mean, gIoU in the literature),
        ``ciou`` (sum of intersections over sum of unions, cIoU), ``precision_at_50``,
        ``prior_iou``, the same by kind as ``kind.figure``, and ``pearson_r`` of prior IoU and mask
        IoU. Over all: ``no_match_precision`` and ``no_match_recall``, where an answer without a
        mask says that nothing matches. A figure that nothing decides is left out.
    """
    present = [answer for answer in answers if answer.num_targets]
    figures = _figures(present)
    for kind in sorted({answer.kind for answer in present} - {""}):
        part = _figures([answer for answer in present if answer.kind == kind])
        figures.update({f"{kind}.{name}": value for name, value in part.items()})
    pearson = pearson_r([a.prior.iou for a in present], [a.mask.iou for a in present])
    if pearson is not None:
        figures["pearson_r"] = pearson
    figures.update(
        no_match_figures([a.num_targets for a in answers], [a.num_found for a in answers])
    )
    return figures


def no_match_figures(num_targets: Sequence[int], num_found: Sequence[int]) -> dict[str, float]:
    """Judge refusals: how many were right, and how many of the due ones came.

    Args:
        num_targets: targets of each question; 0 where nothing matches.
        num_found: masks of each answer; 0 is a refusal.

    Returns:
        ``no_match_precision`` and ``no_match_recall``, each where something decides it.
    """
    due = sum(not count for count in num_targets)
    refused = [wanted for wanted, found in zip(num_targets, num_found, strict=True) if not found]
    rightly = sum(not count for count in refused)
    figures = {}
    if due:
        figures["no_match_recall"] = rightly / due
    if refused:
        figures["no_match_precision"] = rightly / len(refused)
    return figures


def pearson_r(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Correlate two lists; None where one of them does not vary."""
    if len(x) < 2 or np.std(x) == 0 or np.std(y) == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1])


def _figures(answers: Sequence[ExampleScore]) -> dict[str, float]:
    if not answers:
        return {}
    intersections = sum(answer.mask.intersection for answer in answers)
    unions = sum(answer.mask.union for answer in answers)
    return {
        "mask_iou": float(np.mean([answer.mask.iou for answer in answers])),
        "ciou": intersections / unions if unions else 0.0,
        "precision_at_50": float(np.mean([answer.mask.iou > 0.5 for answer in answers])),
        "prior_iou": float(np.mean([answer.prior.iou for answer in answers])),
    }
