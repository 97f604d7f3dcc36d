"""Measured results beside the published ones: the paper's tables 1 and 2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from coprs_deploy.console import markdown_table
from coprs_deploy.data.readers.known_counts import KNOWN_COUNTS, SplitCounts
from coprs_deploy.evaluation.reports.published import (
    NOT_CHECKED,
    REASONING_RESULTS,
    REASONING_SPLITS,
    REFERRING_RESULTS,
    REFERRING_SPLITS,
    SOURCES,
    PublishedResult,
)
from coprs_deploy.evaluation.summary import EvaluationSummary


class ComparisonTable(NamedTuple):
    """A published table: title, splits, metrics of each split, and rows."""

    title: str
    splits: tuple[str, ...]
    metrics: tuple[str, ...]
    results: tuple[PublishedResult, ...]


TABLES = (
    ComparisonTable(
        "Referring segmentation, cIoU (paper, table 1)",
        REFERRING_SPLITS,
        ("ciou",),
        REFERRING_RESULTS,
    ),
    ComparisonTable(
        "Reasoning segmentation, gIoU and cIoU (paper, table 2)",
        REASONING_SPLITS,
        ("giou", "ciou"),
        REASONING_RESULTS,
    ),
)

METRIC_NAMES = {"giou": "gIoU", "ciou": "cIoU"}


def split_name(dataset: str) -> str:
    """Return ``DATASET:SPLIT`` of a name such as ``refcoco:unc:testA``; others unchanged."""
    parts = dataset.split(":")
    return f"{parts[0]}:{parts[-1]}" if len(parts) > 1 else dataset


def comparison_lines(summaries: Mapping[str, EvaluationSummary]) -> list[str]:
    """Return the tables as Markdown, each with a row of what was measured.

    A table of which no split was evaluated is left out, which the text says.

    Args:
        summaries: measured metrics by name of the data set.
    """
    measured = {split_name(name): summary for name, summary in summaries.items()}
    lines: list[str] = []
    for table in TABLES:
        lines += ["", f"### {table.title}", ""]
        if not measured.keys() & set(table.splits):
            lines.append(f"None of its splits was evaluated: {', '.join(table.splits)}.")
            continue
        lines += _table(table, measured)
    return lines[1:]


def _table(table: ComparisonTable, measured: Mapping[str, EvaluationSummary]) -> list[str]:
    columns = [(split, metric) for split in table.splits for metric in table.metrics]
    heads = [f"{s} {METRIC_NAMES[m]}" if len(table.metrics) > 1 else s for s, m in columns]
    numbers = {source: str(i) for i, source in enumerate(_used_sources(table), start=1)}
    rows = [
        (each.method, *map(_percent, each.values), numbers[each.source]) for each in table.results
    ]
    cells, notes = [], []
    for split, metric in columns:
        summary = measured.get(split)
        if summary is None or metric not in summary.metrics:
            cells.append("-")
            continue
        if note := _incomplete(split, summary):
            notes += [note] if note not in notes else []
        cells.append("part" if note else f"**{_percent(100 * summary.metrics[metric].value)}**")
    rows.append(("**this evaluation**", *cells, ""))
    protocols = sorted({s.protocol for name, s in measured.items() if name in table.splits})
    text = (
        f"This evaluation: protocol {', '.join(protocols)}; each of the others has its own, and "
        "some differ. A dash: not evaluated, or no number in the source."
    )
    if notes:
        text += f" Part: not the whole split, and so no result on it: {'; '.join(notes)}."
    listed = "; ".join(f"{number}. {SOURCES[source]}" for source, number in numbers.items())
    return [
        *markdown_table(("method", *heads, "source"), rows),
        "",
        text,
        "",
        f"Sources: {listed}. Without a source, and left out: {', '.join(NOT_CHECKED)}.",
    ]


def _used_sources(table: ComparisonTable) -> list[str]:
    return list(dict.fromkeys(each.source for each in table.results))


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _incomplete(split: str, summary: EvaluationSummary) -> str:
    """Say that the rows are not those of the whole split; empty if they are."""
    known = [counts for name, counts in KNOWN_COUNTS.items() if split_name(name) == split] or [
        SplitCounts()
    ]
    # One row for each sentence, reference or image, as the protocol has it.
    accepted = {n for c in known for n in (c.sentences, c.refs, c.images) if n}
    if not accepted or summary.num_rows in accepted:
        return ""
    return f"{summary.num_rows:,} of {max(accepted):,} rows of {split}"


def comparison_json(summaries: Mapping[str, EvaluationSummary]) -> list[dict[str, Any]]:
    """Return the published rows of the tables that have an evaluated split."""
    measured = {split_name(name) for name in summaries}
    return [
        {
            "title": table.title,
            "columns": [f"{s} {m}" for s in table.splits for m in table.metrics],
            "rows": [
                {"method": r.method, "values": list(r.values), "source": SOURCES[r.source]}
                for r in table.results
            ],
        }
        for table in TABLES
        if measured & set(table.splits)
    ]
