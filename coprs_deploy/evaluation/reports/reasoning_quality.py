"""Quality of the reasoning of evaluated rows against their IoU (paper, 4.3, fig. 4)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from coprs_deploy.console import markdown_table
from coprs_deploy.evaluation.judge import (
    WEIGHTS,
    JudgeItem,
    JudgeReport,
    JudgeSettings,
    ReasoningScore,
    rate,
)
from coprs_deploy.evaluation.reports.plots import Correlation
from coprs_deploy.evaluation.rows import EvaluationRow
from coprs_deploy.evaluation.runner import EvaluationTask
from coprs_deploy.evaluation.summary import row_iou
from coprs_deploy.prompts import extract_reasoning


@dataclass(frozen=True)
class ReasoningQuality:
    """Rated rows of a data set.

    Attributes:
        scores: scores of each rated row.
        prior_iou: IoU of its priors.
        mask_iou: IoU of its masks.
    """

    scores: Sequence[ReasoningScore]
    prior_iou: Sequence[float]
    mask_iou: Sequence[float]

    def correlations(self) -> list[Correlation]:
        """Return quality against the IoU of the prior, and against that of the mask."""
        quality, label = [score.quality for score in self.scores], "quality of the reasoning"
        return [
            Correlation(quality, self.prior_iou, label, "IoU of the prior"),
            Correlation(quality, self.mask_iou, label, "IoU of the mask"),
        ]

    def to_json(self) -> dict[str, Any]:
        """Return means and correlations."""
        prior, mask = self.correlations()
        return {
            "num_rows": len(self.scores),
            "quality": _mean([score.quality for score in self.scores]),
            **{name: _mean([getattr(s, name) for s in self.scores]) for name in WEIGHTS},
            "pearson_r_prior_iou": prior.pearson_r,
            "pearson_r_mask_iou": mask.pearson_r,
        }


def rate_datasets(
    directory: Path,
    datasets: Sequence[tuple[EvaluationTask, Sequence[EvaluationRow]]],
    settings: JudgeSettings,
    on_progress: Callable[[str], None] = lambda text: None,
) -> tuple[dict[str, ReasoningQuality], JudgeReport]:
    """Rate the reasoning of rows with a target that did not fail.

    Args:
        directory: keeps the scores between runs.
        datasets: data sets with their rows.
        settings: settings of the judge.
        on_progress: called with the progress in words.

    Returns:
        Quality by name of the data set, without those of which no row was rated; and the outcome.

    Raises:
        ArtifactError: another process rates into this directory.
    """
    chosen = [
        (task, row)
        for task, rows in datasets
        for row in _spread([row for row in rows if _can_be_rated(row)], settings.num_examples)
    ]
    items = [_item(task, row) for task, row in chosen]

    def progress(done: int) -> None:
        on_progress(f"{done:,} of {len(items):,} reasonings")

    scores, report = rate(items, settings, directory, on_progress=progress)
    found = {}
    for task, _ in datasets:
        pairs = [
            (row, score)
            for (other, row), score in zip(chosen, scores, strict=True)
            if other is task and score is not None
        ]
        if pairs:
            ious = [
                [row_iou(row, task.protocol, part) for row, _ in pairs]
                for part in ("prior", "mask")
            ]
            found[task.name] = ReasoningQuality([score for _, score in pairs], *ious)
    return found, report


def quality_rows(quality: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the means and correlations of :meth:`ReasoningQuality.to_json` as text."""
    return [
        (name.replace("_", " "), "undefined" if value is None else f"{value:.4g}")
        for name, value in quality.items()
    ]


def judge_lines(report: JudgeReport | None) -> list[str]:
    """Return the outcome of the judge as Markdown."""
    lines = ["## Judge of the reasoning", ""]
    if report is None:
        return [
            *lines,
            "No judge was given, so that the quality of the reasoning (paper, fig. 4) is left "
            "out: `--judge-url` and `--judge-model` name one.",
        ]
    text = (
        f"Model `{report.model}`: {report.num_scored:,} of {report.num_examples:,} reasonings "
        f"rated; {report.prompt_tokens:,} prompt tokens and {report.completion_tokens:,} "
        "completion tokens"
    )
    text += "." if report.cost is None else f", {report.cost:.2f} at the given prices."
    weights = ", ".join(f"{weight:g} {name.replace('_', ' ')}" for name, weight in WEIGHTS.items())
    lines += [text, "", f"Quality: {weights}."]
    if report.error:
        lines += ["", f"**The judge gave up**: {report.error}"]
    if report.failures:
        rows = [
            (kind, f"{count:,}", report.first_failures[kind])
            for kind, count in sorted(report.failures.items())
        ]
        lines += ["", *markdown_table(("failure", "number", "the first one"), rows)]
    return lines


def _can_be_rated(row: EvaluationRow) -> bool:
    return bool(row.error is None and row.num_targets and extract_reasoning(row.response))


def _spread(rows: Sequence[EvaluationRow], count: int | None) -> list[EvaluationRow]:
    """Return ``count`` rows in equal steps; all if there are fewer."""
    if count is None or count >= len(rows):
        return list(rows)
    return [rows[i * len(rows) // count] for i in range(count)]


def _item(task: EvaluationTask, row: EvaluationRow) -> JudgeItem:
    def load_image() -> Any:
        return task.examples[row.index].image

    return JudgeItem(load_image, row.instruction, extract_reasoning(row.response))


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))
