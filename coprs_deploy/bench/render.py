"""A report as text, Markdown and one HTML page with charts, light and dark, that loads nothing."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Sequence
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.markdown import Markdown

from coprs_deploy.artifacts import make_directory, write_json, write_text
from coprs_deploy.bench.report import LIMIT, Accuracy, CaseResult, GroupResult, Latency, Report
from coprs_deploy.console import format_bytes, format_ms, markdown_table
from coprs_deploy.page import markdown_html, render_page


class Column(NamedTuple):
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


def _interval(ends: tuple[float, float]) -> str:
    return " to ".join(map(format_ms, ends))


COLUMNS = (
    Column("p50", "median", "latency.p50", format_ms),
    Column("95 % CI", "confidence interval of the median", "latency.ci", _interval),
    Column("p90", "90th percentile", "latency.p90", format_ms),
    Column("p99", "99th percentile, or the slowest run", "latency.p99", format_ms),
    Column("n", "measured runs", "latency.n", "{}"),
    Column("over baseline", "time over the baseline's; range over the rounds", "ratio", "{}"),
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
    Column("in time", "share within the deadline", "metrics.in_time_share", "{:.0%}"),
    Column("tokens", "median response length", "metrics.response_tokens", "{:.0f}"),
)
"""All columns; those without a cell are not shown."""

WIDTH, LEFT, RIGHT, ROW = 560, 12, 540, 36
"""Sizes of a chart in units of its view box: readable at the width of a phone."""

SMALLEST_ERROR = 1e-8
"""Errors below are drawn here."""

Scale = Callable[[float], float]
Timed = Sequence[tuple[CaseResult, Latency]]


def write_outputs(folder: Path, report: Report) -> list[Path]:
    """Write a report as JSON, Markdown and HTML under its own name; return the paths."""
    make_directory(folder)
    paths = [folder / f"{report.stem}.{ending}" for ending in ("json", "md", "html")]
    write_json(paths[0], report.to_json())
    write_text(paths[1], render_markdown(report))
    write_text(paths[2], render_html(report))
    return paths


def render_text(report: Report) -> str:
    """Render a report for a terminal."""
    console = Console(file=io.StringIO(), width=240, color_system=None)
    with console.capture() as captured:
        console.print(Markdown(render_markdown(report)))
    return "\n".join(line.rstrip() for line in captured.get().splitlines()).strip()


def render_markdown(report: Report) -> str:
    """Render a report as Markdown."""
    return "\n".join(line for lines, _ in _sections(report) for line in lines)


def render_html(report: Report) -> str:
    """Render a report as a page."""
    *parts, tail = [
        markdown_html(lines) + (f'<div class="charts">{charts(group)}</div>' if group else "")
        for lines, group in _sections(report)
    ]
    title = f"Benchmark: {report.tag}, {report.machine.kind}"
    return render_page(title, "".join(parts), tail=tail)


def _sections(report: Report) -> Iterator[tuple[list[str], GroupResult | None]]:
    """Lay out a report: lines of Markdown, and the group whose charts follow."""
    yield _head(report), None
    suite = ""
    for group in report.groups:
        heading = [f"## {group.suite}", ""] if group.suite != suite else []
        yield heading + _group_lines(group), group
        suite = group.suite
    rows = [(f"{s.name} ({s.suite})", s.reason, s.remedy) for s in report.skipped]
    skipped = ["## skipped", "", *markdown_table(("", "reason", "fix"), rows), ""] if rows else []
    cases = [case for group in report.groups for case in group.cases]
    used = [f"{c.head}: {c.meaning}" for c in COLUMNS if any(c.cell(case) for case in cases)]
    yield [*skipped, f"Columns. {'; '.join(used)}.", ""], None


def _head(report: Report) -> list[str]:
    """Describe the machine."""
    machine = report.machine
    rows = [
        ("processor", f"{machine.processor}, {machine.cores} cores"),
        ("vector units", ", ".join(machine.vector_units) or "unknown"),
        ("memory", f"{machine.memory_bytes / 2**30:.0f} GiB"),
        ("GPU", f"{machine.gpu}, driver {machine.driver}" if machine.gpu else "none"),
        ("system", machine.system),
        ("versions", ", ".join(f"{name} {text}" for name, text in machine.versions.items())),
        ("commit", machine.commit or "not a checkout"),
    ]
    made = (
        f"{report.date}, made by `{report.command}`. Every case ran in a process of its own, in "
        "rounds interleaved with those of its group; a ratio has its range over the rounds. Failed "
        "cases are reported with their error."
    )
    title = f"# Benchmark: {report.tag}, {machine.kind}"
    return [title, "", made, "", *markdown_table(("machine", ""), rows), ""]


def _group_lines(group: GroupResult) -> list[str]:
    words = [f"One run is {group.unit}; {group.method}."]
    words += [f"The baseline is *{group.baseline}*."] if group.baseline else []
    accuracies = [case.accuracy for case in group.cases if case.accuracy]
    words += [f"Accuracy: {note}." for note in sorted({a.note for a in accuracies} - {""})]
    if inputs := sorted({a.inputs for a in accuracies} - {0}):
        words.append(f"Accuracy over {', '.join(map(str, inputs))} inputs.")
    lines = [f"### {group.name}", "", " ".join(words), ""]
    if measured := [case for case in group.cases if not case.error]:
        columns = [c for c in COLUMNS if any(c.cell(case) for case in measured)]
        rows = [(case.name, *(c.cell(case) for c in columns)) for case in measured]
        lines += [*markdown_table(("", *(c.head for c in columns)), rows), ""]
    if staged := [case for case in group.cases if case.stages]:
        names = list(dict.fromkeys(name for case in staged for name in case.stages))
        rows = [
            (case.name, *(format_ms(case.stages[n]) if n in case.stages else "" for n in names))
            for case in staged
        ]
        lines += [*markdown_table(("median of each stage", *names), rows), ""]
    if failed := [(case.name, case.error) for case in group.cases if case.error]:
        lines += [*markdown_table(("failed", "error"), failed), ""]
    return lines


def charts(group: GroupResult) -> str:
    """Draw what a group has numbers for."""
    drawn = []
    if frontier := [case for case in group.cases if LIMIT in case.labels and case.latency]:
        drawn.append(_chart("Accuracy against latency", *_frontier(frontier)))
    timed = [(case, case.latency) for case in group.cases if case.latency is not None]
    if group.parameter and len(timed) > 1:
        drawn.append(_chart(f"Scaling with {group.parameter}", *_scaling(group, timed)))
    elif timed:
        drawn.append(_chart("Every run, median and 95 % interval", *_runs(timed)))
    if staged := [case for case in group.cases if case.stages]:
        drawn.append(_chart("Stages, medians", *_stages(staged)))
    compared = []
    for case, latency in timed if not group.parameter else ():  # other sizes are no peers
        accuracy = case.accuracy or Accuracy(0)
        loss = accuracy.mask_relative_error
        if loss is None and accuracy.mask_iou_mean is not None:
            loss = max(0.0, 1 - accuracy.mask_iou_mean)
        compared += [(case, latency, loss)] if loss is not None else []
    if any(loss > SMALLEST_ERROR for *_, loss in compared):
        drawn.append(_chart("Speed against accuracy", *_accuracy(compared)))
    return "".join(drawn)


def _chart(caption: str, height: float, parts: Sequence[str]) -> str:
    svg = f'<svg role="img" viewBox="0 0 {WIDTH} {height:.0f}">{"".join(parts)}</svg>'
    return f'<div class="chart"><p>{escape(caption)}</p>{svg}</div>'


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _line(
    x1: float, y1: float, x2: float, y2: float, *, color: str = "ink", width: float = 1
) -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="var(--{color})" stroke-width="{width}"/>'


def _dot(x: float, y: float, color: int, radius: float, opacity: float = 1) -> str:
    fill = f'fill="var(--c{color % 8})" fill-opacity="{opacity}"'
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" {fill}/>'


def _time_axis(values: Sequence[float], bottom: float) -> tuple[Scale, list[str]]:
    """Return a logarithmic scale of milliseconds, and its grid with numbers."""
    low, high = min(values) / 1.05, max(values) * 1.05
    ends = (math.log(low), math.log(high))

    def scale(value: float) -> float:
        return float(np.interp(math.log(value), ends, (LEFT, RIGHT)))

    steps = (1, 1.5, 2, 3, 4, 5, 7) if high / low < 6 else (1, 2, 5) if high / low < 60 else (1,)
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [step * 10.0**e for e in exponents for step in steps]
    parts = []
    for tick in (tick for tick in ticks if low <= tick <= high):
        parts += [_line(scale(tick), 0, scale(tick), bottom, color="faint", width=0.5)]
        parts += [_text(scale(tick), bottom + 14, f"{tick:g}", "middle")]
    return scale, [*parts, _text(RIGHT, bottom + 28, "milliseconds", "end")]


def _runs(timed: Timed) -> tuple[float, list[str]]:
    """Draw every run of each case, with the median and its interval."""
    bottom = ROW * len(timed)
    values = [run for _, q in timed for run in (*q.samples, q.p50, *q.ci)]
    scale, parts = _time_axis(values, bottom)
    for row, (case, latency) in enumerate(timed):
        y = ROW * row + 24
        parts.append(_text(LEFT, y - 11, f"{case.name}: {format_ms(latency.p50)}"))
        for number, run in enumerate(latency.samples):
            parts.append(_dot(scale(run), y + (5 * number % 11 - 5) * 0.8, row, 1.8, 0.45))
        parts.append(_line(scale(latency.p50), y - 7, scale(latency.p50), y + 7, width=2))
        parts.append(_line(scale(latency.ci_low), y, scale(latency.ci_high), y, width=1.4))
    return bottom + 32, parts


def _stages(staged: Sequence[CaseResult]) -> tuple[float, list[str]]:
    """Draw the medians of the stages of each case as one bar."""
    names = list(dict.fromkeys(name for case in staged for name in case.stages))
    unit = (RIGHT - LEFT) / max(sum(case.stages.values()) for case in staged)
    parts = []
    for row, case in enumerate(staged):
        y, x = ROW * row + 14, float(LEFT)
        parts.append(_text(LEFT, y - 3, f"{case.name}: {format_ms(sum(case.stages.values()))}"))
        for color, name in enumerate(names):
            width = unit * case.stages.get(name, 0.0)
            parts.append(_line(x, y + 6, x + width, y + 6, color=f"c{color % 8}", width=12))
            x += width
    y = ROW * len(staged) + 12
    for number, name in enumerate(names):
        x, at = LEFT + number % 2 * 260, y + number // 2 * 16
        parts += [_dot(x + 4, at - 4, number, 4.5), _text(x + 14, at, name)]
    return y + 16 * ((len(names) + 1) // 2), parts


def _accuracy(compared: Sequence[tuple[CaseResult, Latency, float]]) -> tuple[float, list[str]]:
    """Draw the distance of each case from float32 against its median."""
    scale, parts = _time_axis([latency.p50 for _, latency, _ in compared], 180)
    logs = [math.log10(max(loss, SMALLEST_ERROR)) for *_, loss in compared]
    ends = (math.log10(SMALLEST_ERROR), max(logs) + 0.5)
    for exponent in range(-8, math.floor(ends[1]) + 1, 2):
        y = float(np.interp(exponent, ends, (175, 10)))
        parts += [_line(LEFT, y, RIGHT, y, color="faint", width=0.5)]
        parts += [_text(LEFT, y - 2, f"1e{exponent}")]
    for number, (case, latency, _) in enumerate(compared):
        x, y = scale(latency.p50), float(np.interp(logs[number], ends, (175, 10)))
        parts += [_dot(x, y, number, 5), _text(x + 6, y - 4, str(number + 1))]
        parts.append(_text(LEFT, 224 + 15 * number, f"{number + 1}  {case.name}"))
    title = "distance from float32: mask logits, or 1 - mask IoU"
    return 230 + 15 * len(compared), [*parts, _text(LEFT, 208, title)]


def _frontier(cases: Sequence[CaseResult]) -> tuple[float, list[str]]:
    """Draw gIoU and precision of each limit against its p50, and a line from there to its p99."""
    points = [
        (case.name, q, a.giou, a.precision_at_50)
        for case in cases
        if (q := case.latency) and (a := case.accuracy) and a.giou is not None
    ]
    if not points:
        return 20, [_text(LEFT, 14, "no ground truth, hence no accuracy")]
    bottom = 240.0
    scale, parts = _time_axis([t for _, q, *_ in points for t in (q.p50, q.p99)], bottom)
    for tenth in range(0, 11, 2):
        y = bottom - 10 - 20 * tenth
        parts += [_line(LEFT, y, RIGHT, y, color="faint", width=0.5)]
        parts += [_text(RIGHT, y - 2, f"{tenth / 10:.1f}", "end")]
    for number, (_, latency, *accuracies) in enumerate(points):
        for color, accuracy in enumerate(accuracies):
            x, y = scale(latency.p50), bottom - 10 - 200 * (accuracy or 0.0)
            parts += [_line(x, y, scale(latency.p99), y, color=f"c{color}", width=1.4)]
            parts.append(_line(scale(latency.p99), y - 4, scale(latency.p99), y + 4, width=1))
            parts.append(_dot(x, y, color, 4))
        label_y = bottom - 10 - 200 * max(accuracy or 0.0 for accuracy in accuracies)
        parts.append(_text(scale(latency.p50), label_y - 8, str(number + 1), "middle"))
    for color, name in enumerate(("gIoU", "P@0.5")):
        parts += [_dot(LEFT + 4 + 110 * color, bottom + 24, color, 4.5)]
        parts += [_text(LEFT + 14 + 110 * color, bottom + 28, name)]
    parts.append(_text(LEFT + 220, bottom + 28, "dot: p50, end of the line: p99"))
    for number, (name, latency, *_) in enumerate(points):
        x, y = LEFT + 270 * (number % 2), bottom + 48 + 15 * (number // 2)
        times = f"{format_ms(latency.p50)}, p99 {format_ms(latency.p99)}"
        parts.append(_text(x, y, f"{number + 1}  {name}: {times}"))
    return bottom + 54 + 15 * ((len(points) + 1) // 2), parts


def _scaling(group: GroupResult, timed: Timed) -> tuple[float, list[str]]:
    """Draw the median against the parameter, with the interval of each."""
    values = [math.log(float(case.labels[group.parameter])) for case, _ in timed]
    top, span = 1.15 * max(latency.ci_high for _, latency in timed), max(values) - min(values)
    xs = [40 + 470 * (value - min(values)) / (span or 1) for value in values]
    ends = [(q.p50, q.ci_low, q.ci_high) for _, q in timed]
    ys = [[190 - 180 * value / top for value in each] for each in ends]
    parts = [_line(LEFT, 190, RIGHT, 190, color="faint"), _text(RIGHT, 222, group.parameter, "end")]
    for (x1, y1), (x2, y2) in pairwise((x, y[0]) for x, y in zip(xs, ys, strict=True)):
        parts.append(_line(x1, y1, x2, y2, color="c0", width=1.6))
    for x, (y, low, high), (case, latency) in zip(xs, ys, timed, strict=True):
        parts += [_line(x, low, x, high), _dot(x, y, 0, 3.5)]
        parts += [_text(x, y - 9, format_ms(latency.p50), "middle")]
        parts += [_text(x, 205, case.labels[group.parameter], "middle")]
    return 228, parts
