"""Metrics of an evaluation under a protocol, by group, with bootstrap confidence intervals.

Most metrics are a ratio of two sums over rows: gIoU of the IoU and of 1, cIoU of intersections and
unions, precision of hits and of 1. The bootstrap draws images, not rows, because the sentences on
one image are not independent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from coprs_deploy.evaluation.metrics import pearson_r
from coprs_deploy.evaluation.protocols import TARGETS, EvaluationProtocol
from coprs_deploy.evaluation.rows import EvaluationRow
from coprs_deploy.specs import Record

PRECISION_THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)

NUM_RESAMPLES = 1000
"""Resamples of an interval."""

CONFIDENCE = 0.95

SIZE_LIMITS_PX = {"small": 32**2, "medium": 96**2}
"""Upper limits of the area of an object in pixels, as in COCO; larger ones are ``large``."""

MAX_SAME_CLASS = 3
"""Number of objects of the same class from which on they are one group."""

LENGTHS = ("short", "long")
"""Question types of ReasonSeg: short phrases and long sentences."""

_SEED = 20_240_601
_CHUNK = 64
"""Resamples that are computed together."""

Floats: TypeAlias = NDArray[np.float64]
Ratios: TypeAlias = dict[str, tuple[Floats, Floats]]


class Metric(Record, frozen=True):
    """A metric.

    Attributes:
        value: over all rows.
        interval: bounds of its 95 % bootstrap interval; None without one.
    """

    value: float
    interval: tuple[float, float] | None = None


class GroupMetrics(Record, frozen=True):
    """Metrics of a part of the rows.

    Attributes:
        num_rows: number of rows.
        metrics: by name; an undefined metric is left out.
    """

    num_rows: int
    metrics: dict[str, Metric]


class EvaluationSummary(Record, frozen=True):
    """Metrics of the rows of a data set.

    Attributes:
        protocol: name of the protocol.
        num_rows: number of rows.
        num_images: number of distinct images.
        num_failed: number of failed rows, which count as IoU 0.
        metrics: over all rows, by name; an undefined metric is left out.
        groups: by dimension (``question_type``, ``query_length``, ``object_size``,
            ``num_same_class``) and name of the group.
    """

    protocol: str
    num_rows: int
    num_images: int
    num_failed: int
    metrics: dict[str, Metric]
    groups: dict[str, dict[str, GroupMetrics]]


def row_iou(row: EvaluationRow, protocol: EvaluationProtocol, part: str = "mask") -> float:
    """Return the IoU of the masks (``mask``) or of the priors (``prior``) of a row, in [0, 1]."""
    counts = row.mask if part == "mask" else row.prior
    if row.error is not None or counts is None:
        return 0.0
    if protocol.no_match == "answer" and not row.num_targets:
        return float(not row.num_found)
    if not counts.union:
        return protocol.empty_iou
    return counts.intersection / (counts.union + protocol.epsilon)


def flat_row(row: EvaluationRow) -> dict[str, Any]:
    """Return id, texts, counts, IoU and further metrics of a row, without masks."""
    names = ("id", "question_type", "instruction", "response", "num_targets", "num_found")
    ious = {f"{part}_iou": row_iou(row, TARGETS, part) for part in ("mask", "prior")}
    return {**{name: getattr(row, name) for name in names}, **ious, **row.extra}


def summarize(rows: Sequence[EvaluationRow]) -> dict[str, float]:
    """Compute metrics under the protocol ``targets``, without intervals.

    Returns:
        The metrics of :func:`measure`, and the same by question type as ``TYPE.METRIC``.
    """
    return _flat_metrics(
        measure(rows, TARGETS),
        {name: measure(part, TARGETS) for name, part in _question_types(rows).items()},
    )


def flat_summary(summary: EvaluationSummary) -> dict[str, float]:
    """Return metrics by name, and those of masks by question type as ``TYPE.METRIC``."""
    groups = summary.groups.get("question_type", {}) | summary.groups.get("query_length", {})
    by_type = {name: group.metrics for name, group in groups.items()}
    return _flat_metrics(summary.metrics, by_type)


def _flat_metrics(
    metrics: Mapping[str, Metric], by_type: Mapping[str, Mapping[str, Metric]]
) -> dict[str, float]:
    flat = {name: metric.value for name, metric in metrics.items()}
    for group, found in by_type.items():
        kept = {name: found[name].value for name in found if name not in _OF_ALL}
        flat |= {f"{group}.{name}": value for name, value in kept.items()}
    return flat


_OF_ALL = ("pearson_r", "n_acc", "t_acc", "no_match_recall", "no_match_precision")
"""Metrics that thresholds do not know by question type."""


def summarize_dataset(
    rows: Sequence[EvaluationRow], protocol: EvaluationProtocol
) -> EvaluationSummary:
    """Compute the metrics of all rows and of groups, with intervals."""
    groups = {
        dimension: {
            name: GroupMetrics(len(part), measure(part, protocol, NUM_RESAMPLES))
            for name, part in parts.items()
        }
        for dimension, parts in group_rows(rows).items()
        if parts
    }
    return EvaluationSummary(
        protocol=protocol.name,
        num_rows=len(rows),
        num_images=len(set(_image_names(rows))),
        num_failed=sum(row.error is not None for row in rows),
        metrics=measure(rows, protocol, NUM_RESAMPLES),
        groups=groups,
    )


def group_rows(rows: Sequence[EvaluationRow]) -> dict[str, dict[str, list[EvaluationRow]]]:
    """Distribute rows over groups, by dimension and name; a row without a value is in no group."""
    dimensions: dict[str, dict[str, list[EvaluationRow]]] = {
        "question_type": {},
        "query_length": {},
        "object_size": {name: [] for name in (*SIZE_LIMITS_PX, "large")},
        "num_same_class": {},
    }
    for name, part in _question_types(rows).items():
        dimensions["query_length" if name in LENGTHS else "question_type"][name] = part
    for row in rows:
        if row.mask is not None and row.mask.ground_truth:
            dimensions["object_size"][object_size(row.mask.ground_truth)].append(row)
    known = [row for row in rows if row.num_same_class is not None]
    for row in sorted(known, key=lambda row: row.num_same_class or 0):
        number = row.num_same_class or 0
        name = str(number) if number < MAX_SAME_CLASS else f"{MAX_SAME_CLASS}+"
        dimensions["num_same_class"].setdefault(name, []).append(row)
    return {
        dimension: {name: part for name, part in parts.items() if part}
        for dimension, parts in dimensions.items()
    }


def object_size(area_px: int) -> str:
    """Return ``small``, ``medium`` or ``large`` for an area, as COCO does."""
    return next((name for name, limit in SIZE_LIMITS_PX.items() if area_px < limit), "large")


def measure(
    rows: Sequence[EvaluationRow], protocol: EvaluationProtocol, num_resamples: int = 0
) -> dict[str, Metric]:
    """Compute metrics.

    Args:
        rows: a failed row counts as IoU 0 in every mean, and as a wrong answer.
        protocol: how rows are counted.
        num_resamples: resamples of the intervals; 0 computes none.

    Returns:
        ``giou``, ``ciou``, ``precision_at_50`` to ``precision_at_90``, ``prior_giou`` and the means
        of ``extra``; for no-match examples ``n_acc`` and ``t_acc``, or ``no_match_recall`` and
        ``no_match_precision``, as the protocol has them; ``pearson_r`` of prior IoU and mask IoU
        over the rows with a target that did not fail. An undefined metric is left out.
    """
    ious = {
        part: np.array([row_iou(row, protocol, part) for row in rows]) for part in ("mask", "prior")
    }
    ratios = _ratios(rows, protocol, ious["mask"], ious["prior"])
    intervals = _intervals(ratios, _image_names(rows), num_resamples) if num_resamples else {}
    metrics = {}
    for name, (numerator, denominator) in ratios.items():
        total = denominator.sum()
        if total:
            metrics[name] = Metric(float(numerator.sum() / total), intervals.get(name))
        elif name == "ciou" and "giou" in metrics:  # nothing but pairs of empty masks
            metrics[name] = Metric(protocol.empty_iou)
    counted = [i for i, row in enumerate(rows) if row.num_targets and row.error is None]
    pearson = pearson_r(ious["prior"][counted].tolist(), ious["mask"][counted].tolist())
    return metrics if pearson is None else {**metrics, "pearson_r": Metric(pearson)}


def _ratios(
    rows: Sequence[EvaluationRow], protocol: EvaluationProtocol, masks: Floats, priors: Floats
) -> Ratios:
    """Return the terms of numerator and denominator of each metric: (N,) each."""
    has_target = np.array([row.num_targets > 0 for row in rows], dtype=np.bool_)
    has_failed = np.array([row.error is not None for row in rows], dtype=np.bool_)
    has_found = np.array([row.num_found > 0 for row in rows], dtype=np.bool_)
    all_rows = np.ones(len(rows), dtype=np.bool_)
    counted = has_target if protocol.no_match == "apart" else all_rows
    precise = all_rows if protocol.no_match == "mask" else has_target
    pixels = np.array(
        [(row.mask.intersection, row.mask.union) if row.mask else (0, 0) for row in rows], float
    ).reshape(-1, 2)
    found = {
        "giou": (counted * masks, counted),
        "ciou": (counted * pixels[:, 0], counted * pixels[:, 1]),
    }
    for threshold in PRECISION_THRESHOLDS:
        hits = masks > threshold if protocol.strict_precision else masks >= threshold
        found[f"precision_at_{100 * threshold:.0f}"] = (precise & hits, precise)
    found["prior_giou"] = (counted * priors, counted)
    for key in rows[0].extra if rows else ():
        found[key] = (counted * np.array([row.extra[key] for row in rows]), counted)
    no_match, nothing = ~has_target, ~has_found & ~has_failed
    if protocol.no_match == "answer" and no_match.any():
        found["n_acc"] = (no_match & nothing, no_match)
        found["t_acc"] = (has_target & has_found, has_target)
    elif protocol.no_match == "apart":
        found["no_match_recall"] = (no_match & nothing, no_match)
        found["no_match_precision"] = (no_match & nothing, nothing)
    return {name: (a.astype(float), b.astype(float)) for name, (a, b) in found.items()}


def _intervals(
    ratios: Ratios, images: Sequence[str], num_resamples: int
) -> dict[str, tuple[float, float]]:
    """Return the percentile interval of each ratio, over resamples of the images."""
    numbers = np.unique(images, return_inverse=True)[1]
    count = int(numbers.max()) + 1 if len(numbers) else 0
    if count < 2:
        return {}
    terms = [term for pair in ratios.values() for term in pair]
    sums = np.stack([np.bincount(numbers, term, count) for term in terms], axis=1)
    generator = np.random.default_rng(_SEED)
    resampled = []
    for start in range(0, num_resamples, _CHUNK):
        drawn = generator.integers(count, size=(min(_CHUNK, num_resamples - start), count))
        drawn += count * np.arange(len(drawn))[:, None]
        weights = np.bincount(drawn.ravel(), minlength=len(drawn) * count)
        resampled.append(weights.reshape(-1, count).astype(float) @ sums)
    totals = np.concatenate(resampled)
    tail = (1 - CONFIDENCE) / 2
    intervals = {}
    for number, name in enumerate(ratios):
        numerator, denominator = totals[:, 2 * number], totals[:, 2 * number + 1]
        defined = denominator > 0
        if defined.any():
            values = numerator[defined] / denominator[defined]
            low, high = np.quantile(values, (tail, 1 - tail))
            # The last digits depend on how a processor orders the sums.
            intervals[name] = (round(float(low), 6), round(float(high), 6))
    return intervals


def _image_names(rows: Sequence[EvaluationRow]) -> list[str]:
    """Return the image of each row; a row without a name has an image of its own."""
    return [row.image or f"row {row.index}" for row in rows]


def _question_types(rows: Sequence[EvaluationRow]) -> dict[str, list[EvaluationRow]]:
    """Return the rows of each question type, by name."""
    groups: dict[str, list[EvaluationRow]] = {}
    for row in rows:
        if row.question_type:
            groups.setdefault(row.question_type, []).append(row)
    return dict(sorted(groups.items()))
