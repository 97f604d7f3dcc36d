"""Acceptance thresholds of an evaluation: parsing, checks before the work, comparison after it."""

from __future__ import annotations

import difflib
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence

from coprs_deploy.evaluation.protocols import TARGETS, EvaluationProtocol
from coprs_deploy.evaluation.summary import PRECISION_THRESHOLDS

MASK_METRICS = (
    *("giou", "ciou"),
    *(f"precision_at_{100 * threshold:.0f}" for threshold in PRECISION_THRESHOLDS),
    "prior_giou",
)
"""Metrics of masks, also by question type as in ``ordinal.giou``."""

NO_MATCH_METRICS = {
    "mask": (),
    "answer": ("n_acc", "t_acc"),
    "apart": ("no_match_recall", "no_match_precision"),
}
"""Metrics of no-match examples by how a protocol counts these."""

METRICS = (*MASK_METRICS, "pearson_r", *itertools.chain(*NO_MATCH_METRICS.values()))

_UNDEFINED = {
    "pearson_r": "the IoU of all priors, or of all masks, is the same",
    "no_match_precision": "every example got a mask",
}
"""Metric to the reason why it can be undefined for predictions, though the data allow it."""


def parse_thresholds(settings: Sequence[str]) -> dict[str, float]:
    """Read acceptance thresholds such as ``giou=0.93``.

    Raises:
        ValueError: a metric is unknown or named twice, or a value is outside its range.
    """
    thresholds: dict[str, float] = {}
    for setting in settings:
        name, _, text = (part.strip() for part in setting.partition("="))
        question_type, dot, metric = name.rpartition(".")
        known = MASK_METRICS if dot else METRICS
        if metric not in known or (dot and not question_type):
            nearest = difflib.get_close_matches(metric, known, n=1)
            hint = f"; did you mean {name.removesuffix(metric)}{nearest[0]}?" if nearest else ""
            raise ValueError(
                f"the metric of {setting!r} is {name!r}; accepted: {', '.join(METRICS)}, and "
                f"TYPE.METRIC for {', '.join(MASK_METRICS)} of one question type{hint}"
            )
        low = -1.0 if metric == "pearson_r" else 0.0
        try:
            value = float(text)
        except ValueError as error:
            raise ValueError(
                f"{setting!r} has no number; accepted: METRIC=VALUE, as in giou=0.93"
            ) from error
        if not low <= value <= 1:
            raise ValueError(f"{name} is required to be {text}; accepted: {low:g} to 1")
        if name in thresholds:
            raise ValueError(f"{name} has two thresholds, {thresholds[name]:g} and {value:g}")
        thresholds[name] = value
    return thresholds


def check_thresholds(
    thresholds: Mapping[str, float],
    question_types: Sequence[str],
    num_no_match: int,
    protocol: EvaluationProtocol = TARGETS,
) -> None:
    """Refuse thresholds of metrics that are undefined for the data, before the work.

    Args:
        thresholds: required value by metric.
        question_types: question type of each example with a target.
        num_no_match: number of examples without a target.
        protocol: how the examples are counted.

    Raises:
        ValueError: a metric is undefined for these examples.
    """
    counts = Counter(question_types)
    for name in thresholds:
        question_type, dot, metric = name.rpartition(".")
        reason = ""
        others = {*METRICS} - {*MASK_METRICS, "pearson_r"} - {*NO_MATCH_METRICS[protocol.no_match]}
        if metric in others:
            reason = f"the protocol {protocol.name} does not have it"
        elif metric not in MASK_METRICS and metric != "pearson_r" and not num_no_match:
            reason = "there is no no-match example"
        elif dot and not counts[question_type]:
            known = ", ".join(sorted(set(counts) - {""})) or "none"
            reason = f"no example with a target has this question type; question types: {known}"
        elif (metric in MASK_METRICS or metric == "t_acc") and not counts:
            reason = "there is no example with a target"
        elif metric == "pearson_r" and counts.total() < 2:
            reason = "it needs at least two examples with a target"
        if reason:
            raise ValueError(f"{name} is undefined for these examples: {reason}")


def failed_thresholds(metrics: Mapping[str, float], thresholds: Mapping[str, float]) -> list[str]:
    """Return one line per metric that is below its threshold or undefined."""
    failed = []
    for name, required in thresholds.items():
        if name not in metrics:
            reason = _UNDEFINED.get(name, "no example that was decoded defines it")
            failed.append(f"{name} is undefined: {reason}; required: {required:g}")
        elif metrics[name] < required:
            failed.append(f"{name} is {metrics[name]:.4f}; required: {required:g}")
    return failed
