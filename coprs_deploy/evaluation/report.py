"""Files of an evaluation: report page, plot of prior against mask, and all predictions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from coprs_deploy.artifacts import atomic_write, make_directory, write_text
from coprs_deploy.evaluation.metrics import ExampleScore, summarize
from coprs_deploy.evaluation.plots import plot_correlation

REPORT_FILE = "report.md"
PREDICTIONS_FILE = "predictions.jsonl"
PLOT_FILE = "prior_against_mask.png"


def write_evaluation(directory: Path, title: str, scores: Sequence[ExampleScore]) -> None:
    """Write ``report.md``, ``predictions.jsonl`` and ``prior_against_mask.png``.

    Args:
        directory: created if it does not exist; files of an earlier evaluation are replaced.
        title: description of the data set.
        scores: scores of the examples.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    make_directory(directory)
    present = [score for score in scores if score.num_targets]
    lines = [f"# {title}", "", *metric_table(summarize(scores))]
    if present:
        with atomic_write(directory / PLOT_FILE) as partial:
            plot_correlation(
                partial,
                [score.prior_iou for score in present],
                [score.mask_iou for score in present],
            )
        lines += ["", f"![IoU of the prior against IoU of the mask]({PLOT_FILE})"]
    write_text(directory / REPORT_FILE, "\n".join(lines) + "\n")
    with (
        atomic_write(directory / PREDICTIONS_FILE) as partial,
        partial.open("w", encoding="utf-8", errors="backslashreplace") as file,
    ):
        for score in scores:
            items = score.to_json().items()
            row = {k: round(v, 6) if isinstance(v, float) else v for k, v in items}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def metric_table(metrics: Mapping[str, float]) -> list[str]:
    """Format metrics as Markdown tables: one of all examples, one by question type."""
    question_types = sorted({name.rpartition(".")[0] for name in metrics if "." in name})
    columns = [name for name in metrics if "." not in name]
    lines = ["| metric | value |", "|---|---|"]
    lines += [f"| {name} | {metrics[name]:.4f} |" for name in columns]
    if question_types:
        parts = [name for name in columns if f"{question_types[0]}.{name}" in metrics]
        lines += ["", f"| question type | {' | '.join(parts)} |", "|---" * (len(parts) + 1) + "|"]
        for question_type in question_types:
            values = " | ".join(f"{metrics[f'{question_type}.{part}']:.4f}" for part in parts)
            lines.append(f"| {question_type} | {values} |")
    return lines
