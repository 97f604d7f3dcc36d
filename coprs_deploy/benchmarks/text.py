"""A report for the terminal and as a Markdown page."""

from __future__ import annotations

from collections.abc import Sequence

from coprs_deploy.benchmarks.cells import baseline, machine_lines, milliseconds, table
from coprs_deploy.benchmarks.report import GroupResult, Report


def render_text(report: Report) -> str:
    """Write a report for a terminal."""
    lines = [f"{report.model} on {report.machine.kind}, {report.date}"]
    for group in report.groups:
        laid = table(group)
        lines += ["", f"{group.suite}, {group.name} ({group.unit}; {group.method})"]
        if laid.rows:
            header = ("", *(column.head for column in laid.columns))
            lines += _aligned(header, laid.rows)
        lines += [f"  {name}: {reason}" for name, reason in laid.reasons]
    if report.left_out:
        lines += ["", "left out"]
        lines += [
            f"  {entry.name}: {entry.reason}" + (f" ({entry.remedy})" if entry.remedy else "")
            for entry in report.left_out
        ]
    return "\n".join(lines)


def _aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    return [
        "  "
        + "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (header, *rows)
    ]


def render_markdown(report: Report) -> str:
    """Write a report as a page."""
    lines = [
        f"# Benchmark: {report.theme}, {report.machine.kind}",
        "",
        f"{report.date}, made by `{report.command}`. Every row ran in a process of its own; the "
        "rows of a table took turns, and a ratio has its range over the rounds. What could not be "
        "measured is a row with its reason.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {_cell(text)} |" for name, text in machine_lines(report)),
    ]
    suite = ""
    for group in report.groups:
        if group.suite != suite:
            suite = group.suite
            lines += ["", f"## {suite}"]
        lines += ["", f"### {group.name}", "", *_group(group)]
    if report.left_out:
        lines += ["", "## Left out", "", "| | why | what mends it |", "|---|---|---|"]
        lines += [
            f"| {e.name} ({e.suite}) | {_cell(e.reason)} | {_cell(e.remedy)} |"
            for e in report.left_out
        ]
    return "\n".join(lines) + "\n"


def _group(group: GroupResult) -> list[str]:
    laid = table(group)
    base = baseline(group)
    words = [f"One run is {group.unit}; {group.method}."]
    if base:
        words.append(f"The baseline is *{base}*.")
    notes = sorted({row.accuracy.note for row in group.rows if row.accuracy and row.accuracy.note})
    words += [f"Accuracy: {note}." for note in notes]
    inputs = sorted({row.accuracy.inputs for row in group.rows if row.accuracy})
    if inputs and inputs[-1]:
        words.append(f"Accuracy over {', '.join(map(str, inputs))} inputs.")
    lines = [" ".join(words)]
    if laid.rows:
        lines += ["", *markdown_table(("", *(c.head for c in laid.columns)), laid.rows)]
    stages = [row for row in group.rows if row.stages]
    if stages:
        names = list(dict.fromkeys(name for row in stages for name in row.stages))
        cells = [
            (row.name, *(milliseconds(row.stages[n]) if n in row.stages else "" for n in names))
            for row in stages
        ]
        lines += ["", "Medians of the stages:", "", *markdown_table(("", *names), cells)]
    if laid.reasons:
        lines += ["", "| not measured | reason |", "|---|---|"]
        lines += [f"| {name} | {_cell(reason)} |" for name, reason in laid.reasons]
    return lines


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lay cells out in Markdown."""
    return [
        "| " + " | ".join(header) + " |",
        "|---" * len(header) + "|",
        *("| " + " | ".join(map(_cell, row)) + " |" for row in rows),
    ]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
