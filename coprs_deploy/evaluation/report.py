"""Report of an evaluation for people: a Markdown page, and plots of prior against mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from coprs_deploy.artifacts import atomic_write, write_text
from coprs_deploy.console import markdown_table
from coprs_deploy.evaluation.plots import plot_correlation
from coprs_deploy.evaluation.protocols import EvaluationProtocol
from coprs_deploy.evaluation.rows import EvaluationRow
from coprs_deploy.evaluation.summary import EvaluationSummary, Metric, row_iou

REPORT_FILE = "report.md"
PLOT_FILE = "prior_against_mask.png"

LISTED_FAILURES = 20
"""Failed rows that the page lists; ``rows.jsonl`` has all of them."""


@dataclass(frozen=True, eq=False)
class EvaluatedDataset:
    """A finished data set.

    Attributes:
        description: source and number of the examples.
        folder: folder with its rows.
        protocol: how the rows were counted.
        rows: all rows, in the order of the source.
        summary: their metrics.
    """

    description: str
    folder: Path
    protocol: EvaluationProtocol
    rows: Sequence[EvaluationRow]
    summary: EvaluationSummary


def write_report(directory: Path, title: str, datasets: Sequence[EvaluatedDataset]) -> None:
    """Write ``report.md``, and ``prior_against_mask.png`` into the folder of each data set.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    lines = [f"# {title}"]
    for dataset in datasets:
        lines += ["", f"## {dataset.description}", "", *dataset_page(dataset)]
        counted = [row for row in dataset.rows if row.num_targets and row.error is None]
        if counted:
            path = dataset.folder / PLOT_FILE
            ious = [
                [row_iou(row, dataset.protocol, part) for row in counted]
                for part in ("prior", "mask")
            ]
            with atomic_write(path) as partial:
                plot_correlation(partial, *ious)
            shown = path.relative_to(directory).as_posix()
            lines += ["", f"![IoU of the prior against IoU of the mask]({shown})"]
    write_text(directory / REPORT_FILE, "\n".join(lines) + "\n")


def dataset_page(dataset: EvaluatedDataset) -> list[str]:
    """Return protocol, metrics, groups and failed rows of a data set as Markdown."""
    summary = dataset.summary
    lines = [
        f"Protocol `{summary.protocol}`; {summary.num_rows:,} instructions on "
        f"{summary.num_images:,} images, {summary.num_failed:,} failed (IoU 0 in every mean).",
        "",
        *markdown_table(("metric", "value", "95 % interval"), metric_rows(summary.metrics)),
    ]
    for dimension, groups in summary.groups.items():
        names = list(dict.fromkeys(name for group in groups.values() for name in group.metrics))
        body = [
            (name, f"{group.num_rows:,}", *(_value(group.metrics.get(each)) for each in names))
            for name, group in groups.items()
        ]
        lines += ["", *markdown_table((dimension.replace("_", " "), "rows", *names), body)]
    failed = [row for row in dataset.rows if row.error is not None]
    if failed:
        body = [(str(row.index), row.id, row.error or "") for row in failed[:LISTED_FAILURES]]
        lines += ["", *markdown_table(("failed row", "id", "error"), body)]
        if len(failed) > LISTED_FAILURES:
            lines += ["", f"And {len(failed) - LISTED_FAILURES:,} more."]
    return lines


def metric_rows(metrics: Mapping[str, Metric]) -> list[tuple[str, str, str]]:
    """Return name, value and interval of each metric as text."""
    return [
        (name, _value(metric), "{:.4f} to {:.4f}".format(*metric.interval))
        if metric.interval
        else (name, _value(metric), "")
        for name, metric in metrics.items()
    ]


def _value(metric: Metric | None) -> str:
    return "" if metric is None else f"{metric.value:.4f}"
