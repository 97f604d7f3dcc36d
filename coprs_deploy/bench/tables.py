"""A report as headings, paragraphs and tables: the same for terminal, Markdown and page."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from coprs_deploy.bench.report import CaseResult, GroupResult, Ratio, Report
from coprs_deploy.console import format_bytes, format_ms, markdown_table, table


@dataclass(frozen=True)
class Block:
    """One piece of a rendered report.

    Attributes:
        kind: ``h1`` to ``h3``, ``p``, ``table``, ``machine`` and ``errors`` (tables), ``charts``.
        text: of a heading or a paragraph.
        header: of a table.
        rows: of a table.
        group: whose charts follow here.
    """

    kind: str
    text: str = ""
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    group: GroupResult | None = None


def _ratio(ratio: Ratio) -> str:
    return f"{ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"


def _interval(ends: tuple[float, float]) -> str:
    return " to ".join(map(format_ms, ends))


@dataclass(frozen=True)
class Column:
    """A column: head, meaning, dotted field of a case, and format of its value."""

    head: str
    meaning: str
    field: str
    form: str | Callable[[Any], str]

    def cell(self, case: CaseResult) -> str:
        """Format the field of a case; empty where it has none."""
        value: Any = case
        for name in self.field.split("."):
            value = value.get(name) if isinstance(value, dict) else getattr(value, name, None)
        if value is None:
            return ""
        return self.form.format(value) if isinstance(self.form, str) else self.form(value)


COLUMNS = (
    Column("p50", "median", "latency.p50", format_ms),
    Column("95 % CI", "confidence interval of the median", "latency.ci", _interval),
    Column("p90", "90th percentile", "latency.p90", format_ms),
    Column("p99", "99th percentile, or the slowest run", "latency.p99", format_ms),
    Column("n", "measured runs", "latency.n", "{}"),
    Column("over baseline", "time over the baseline's; range over the rounds", "ratio", _ratio),
    Column("memory", "peak of the process", "peak_bytes", format_bytes),
    Column("GPU memory", "in use beyond the use before", "memory.device", format_bytes),
    Column("embedding cosine", "smallest, with float32", "accuracy.embedding_cosine", "{:.6f}"),
    Column("vector cosine", "smallest, with float32", "accuracy.concentration_cosine", "{:.6f}"),
    Column("prior error", "over the largest logit", "accuracy.prior_relative_error", "{:.1e}"),
    Column("mask error", "over the largest logit", "accuracy.mask_relative_error", "{:.1e}"),
    Column("IoU float32", "mean, with the float32 masks", "accuracy.mask_iou_mean", "{:.5f}"),
    Column("min IoU", "smallest, with the float32 masks", "accuracy.mask_iou_min", "{:.4f}"),
    Column("gIoU", "mean IoU with the ground truth", "accuracy.giou", "{:.4f}"),
    Column("P@0.5", "share with IoU above 0.5", "accuracy.precision_at_50", "{:.3f}"),
    Column("bundle", "size on disk", "metrics.size_bytes", format_bytes),
    Column("engines", "size of the engines", "metrics.engines_bytes", format_bytes),
    Column("build", "time of the engine builds", "metrics.build_s", "{:.1f} s"),
    Column("check", "time of the equivalence check", "metrics.check_s", "{:.1f} s"),
    Column("export/weights", "peak memory", "metrics.export_peak_over_weights", "{:.2f} x"),
    Column("peak/weights", "peak memory, with the check", "metrics.peak_over_weights", "{:.2f} x"),
    Column("tokens/s", "decoding speed", "metrics.tokens_per_s", "{:.0f}"),
    Column("tokens", "median response length", "metrics.response_tokens", "{:.0f}"),
)
"""All columns; those without a cell are not shown."""


def render_text(report: Report) -> str:
    """Render a report for a terminal."""
    lines = [f"{report.model} on {report.machine.kind}, {report.date}"]
    for block in report_blocks(report):
        if block.kind == "table":
            lines += ["", table(block.header, block.rows)]
        elif block.kind == "errors":
            lines += ["", *(": ".join(filter(None, row)) for row in block.rows)]
        elif block.kind in ("h2", "h3"):
            lines += ["", block.text]
    return "\n".join(lines)


def render_markdown(report: Report) -> str:
    """Render a report as Markdown."""
    lines: list[str] = []
    for block in report_blocks(report):
        if block.header:
            lines += [*markdown_table(block.header, block.rows), ""]
        elif block.text:
            marks = {"h1": "# ", "h2": "## ", "h3": "### "}
            lines += [marks.get(block.kind, "") + block.text, ""]
    return "\n".join(lines)


def report_blocks(report: Report) -> Iterator[Block]:
    """Lay out a report."""
    yield Block("h1", f"Benchmark: {report.tag}, {report.machine.kind}")
    yield Block(
        "p",
        f"{report.date}, made by `{report.command}`. Every case ran in a process of its own, in "
        "rounds interleaved with those of its group; a ratio has its range over the rounds. Failed "
        "cases are reported with their error.",
    )
    yield Block("machine", header=("machine", ""), rows=machine_rows(report))
    suite = ""
    for group in report.groups:
        if group.suite != suite:
            suite = group.suite
            yield Block("h2", suite)
        yield from _group_blocks(group)
    if report.skipped:
        yield Block("h2", "skipped")
        rows = [(f"{s.name} ({s.suite})", s.reason, s.remedy) for s in report.skipped]
        yield Block("errors", header=("", "reason", "fix"), rows=rows)
    cases = [case for group in report.groups for case in group.cases]
    used = [f"{c.head}: {c.meaning}" for c in COLUMNS if any(c.cell(case) for case in cases)]
    yield Block("p", f"Columns. {'; '.join(used)}.")


def _group_blocks(group: GroupResult) -> Iterator[Block]:
    yield Block("h3", group.name)
    words = [f"One run is {group.unit}; {group.method}."]
    words += [f"The baseline is *{group.baseline}*."] if group.baseline else []
    accuracies = [case.accuracy for case in group.cases if case.accuracy]
    words += [f"Accuracy: {note}." for note in sorted({a.note for a in accuracies} - {""})]
    if inputs := sorted({a.inputs for a in accuracies} - {0}):
        words.append(f"Accuracy over {', '.join(map(str, inputs))} inputs.")
    yield Block("p", " ".join(words))
    if measured := [case for case in group.cases if not case.error]:
        columns = [c for c in COLUMNS if any(c.cell(case) for case in measured)]
        rows = [(case.name, *(c.cell(case) for c in columns)) for case in measured]
        yield Block("table", header=("", *(c.head for c in columns)), rows=rows)
    if staged := [case for case in group.cases if case.stages]:
        names = list(dict.fromkeys(name for case in staged for name in case.stages))
        rows = [
            (case.name, *(format_ms(case.stages[n]) if n in case.stages else "" for n in names))
            for case in staged
        ]
        yield Block("table", header=("median of each stage", *names), rows=rows)
    if failed := [(case.name, case.error) for case in group.cases if case.error]:
        yield Block("errors", header=("failed", "error"), rows=failed)
    yield Block("charts", group=group)


def machine_rows(report: Report) -> list[tuple[str, str]]:
    """Describe what a report was measured on."""
    machine = report.machine
    return [
        ("processor", f"{machine.processor}, {machine.cores} cores"),
        ("vector units", ", ".join(machine.vector_units) or "unknown"),
        ("memory", f"{machine.memory_bytes / 2**30:.0f} GiB"),
        ("GPU", f"{machine.gpu}, driver {machine.driver}" if machine.gpu else "none"),
        ("system", machine.system),
        ("versions", ", ".join(f"{name} {text}" for name, text in machine.versions.items())),
        ("commit", machine.commit or "not a checkout"),
    ]
