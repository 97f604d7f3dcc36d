"""The rows of a report as cells of a table, the same for terminal, Markdown and HTML."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from coprs_deploy.benchmarks.report import GroupResult, Report, Row


@dataclass(frozen=True)
class Column:
    """One column: its head, what it means, and how a row fills it."""

    head: str
    meaning: str
    cell: Callable[[Row], str]


@dataclass(frozen=True)
class Table:
    """A group laid out; rows without a figure hold their reason in the second cell."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    reasons: tuple[tuple[str, str], ...]


def milliseconds(value: float) -> str:
    """Write a time with three digits and its unit."""
    if value >= 10_000:
        return f"{value / 1e3:.1f} s"
    if value >= 1000:
        return f"{value / 1e3:.2f} s"
    return f"{value:.0f} ms" if value >= 100 else f"{value:.3g} ms"


def number_of_bytes(value: float) -> str:
    """Write a size in the unit that suits it."""
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.0f} MB"


def _latency(name: str) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        return "" if row.latency is None else milliseconds(getattr(row.latency, name))

    return cell


def _accuracy(name: str, form: str) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        value = getattr(row.accuracy, name) if row.accuracy is not None else None
        return "" if value is None else format(value, form)

    return cell


def _ratio(row: Row) -> str:
    if row.ratio is None:
        return ""
    return f"{row.ratio.value:.2f} ({row.ratio.low:.2f} to {row.ratio.high:.2f})"


def peak_of(row: Row) -> float | None:
    """Give the peak memory of what was measured, of a child that it started if it did."""
    return row.figures.get("peak_bytes", row.memory.host)


def _memory(row: Row) -> str:
    peak = peak_of(row)
    return "" if peak is None else number_of_bytes(peak)


def _device_memory(row: Row) -> str:
    return "" if row.memory.device is None else number_of_bytes(row.memory.device)


def _share(row: Row) -> str:
    if row.work is None or row.work.share is None:
        return ""
    return f"{100 * row.work.share:.0f} % ({row.work.bound})"


COLUMNS = (
    Column("p50", "median of the runs", _latency("p50")),
    Column("p90", "nine of ten runs are faster", _latency("p90")),
    Column("p99", "or the slowest run", _latency("p99")),
    Column("n", "measured runs", lambda r: str(r.latency.n) if r.latency else ""),
    Column("times baseline", "time over the baseline's; range over the rounds", _ratio),
    Column("memory", "peak of the row's own process", _memory),
    Column("GPU memory", "taken beyond what was taken before", _device_memory),
    Column("embedding cosine", "smallest, with float32", _accuracy("embedding_cosine", ".6f")),
    Column(
        "concentration cosine", "smallest, with float32", _accuracy("concentration_cosine", ".6f")
    ),
    Column("prior error", "largest, over the largest logit", _accuracy("prior_error", ".1e")),
    Column("mask error", "likewise, of the mask logits", _accuracy("mask_error", ".1e")),
    Column("IoU float32", "mean IoU with float32's masks", _accuracy("mask_iou", ".5f")),
    Column("worst", "the smallest of these", _accuracy("mask_iou_worst", ".4f")),
    Column("IoU truth", "mean IoU with the true masks", _accuracy("truth_iou", ".4f")),
    Column("P@0.5", "share above one half", _accuracy("precision_at_half", ".3f")),
    Column("of ceiling", "share of what the machine reaches at best (roofline)", _share),
)
"""All columns; those that no row fills are left out."""

FIGURES = {
    "size_bytes": ("bundle", number_of_bytes),
    "engines_bytes": ("engines", number_of_bytes),
    "build_s": ("build", lambda value: f"{value:.1f} s"),
    "check_s": ("check", lambda value: f"{value:.1f} s"),
    "tokens_per_s": ("tokens/s", lambda value: f"{value:.0f}"),
    "response_tokens": ("tokens", lambda value: f"{value:.0f}"),
}
"""Figures that get a column: head and form."""


def table(group: GroupResult) -> Table:
    """Lay a group out."""
    measured = [row for row in group.rows if not row.reason]
    columns = [c for c in COLUMNS if any(c.cell(row) for row in measured)]
    for name, (head, form) in FIGURES.items():
        if any(name in row.figures for row in measured):
            columns.append(Column(head, "", _figure(name, form)))
    rows = tuple((row.name, *(c.cell(row) for c in columns)) for row in measured)
    reasons = tuple((row.name, row.reason) for row in group.rows if row.reason)
    return Table(tuple(columns), rows, reasons)


def _figure(name: str, form: Callable[[float], str]) -> Callable[[Row], str]:
    return lambda row: form(row.figures[name]) if name in row.figures else ""


def baseline(group: GroupResult) -> str:
    """Name the row that counts as 1; empty without one."""
    return next((row.ratio.baseline for row in group.rows if row.ratio is not None), "")


def machine_lines(report: Report) -> list[tuple[str, str]]:
    """Say what a report was measured on, by kind."""
    machine = report.machine
    lines = [
        ("processor", f"{machine.processor}, {machine.cores} cores"),
        ("vector units", ", ".join(machine.vector_units) or "unknown"),
        ("memory", f"{machine.memory_bytes / 2**30:.0f} GiB"),
        ("GPU", f"{machine.gpu}, driver {machine.driver}" if machine.gpu else "none"),
        ("system", machine.system),
        ("versions", ", ".join(f"{name} {text}" for name, text in machine.versions.items())),
        ("commit", machine.commit or "not a checkout"),
    ]
    for ceilings in report.ceilings:
        rates = [f"{name} {rate / 1e9:.3g} GFLOP/s" for name, rate in ceilings.matmul_flops.items()]
        rates.append(f"copy {ceilings.copy_bytes / 1e9:.3g} GB/s")
        lines.append((f"ceilings of {ceilings.device}", ", ".join(rates)))
    return lines
