"""Report of a load test as Markdown and a chart: latency and results over the rate, memory."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from coprs_deploy.artifacts import write_text
from coprs_deploy.console import format_bytes, format_ms, markdown_table
from coprs_deploy.evaluation.reports.plots import pyplot

COLORS = ("#2563eb", "#d97706")
"""One color a server."""

QUANTILES = {"p50": "-", "p95": "--", "p99": ":"}
"""Quantiles of the latency, and the style of their lines."""

PANEL_INCHES = (5.2, 3.6)


def write_outputs(path: Path, report: Mapping[str, Any]) -> None:
    """Write Markdown and chart beside the JSON file of a report."""
    chart = path.with_suffix(".png")
    chart.write_bytes(draw_report(report))
    write_text(path.with_suffix(".md"), render_markdown(report, chart.name))


def render_markdown(report: Mapping[str, Any], chart: str) -> str:
    """Render the parts that were measured."""
    lines = [
        "# Load of the HTTP server",
        "",
        f"![results, latency and memory over rate and time]({chart})",
        "",
        "Clients and servers share the machine. The plain loop (`benchmarks/plain_server.py`) is "
        "FastAPI around transformers' `generate` and segment-anything's modules with the same "
        "weights in float32, one request at a time.",
        "",
    ]
    if load := report.get("load"):
        lines += _load_lines(load)
    if deadlines := report.get("deadlines"):
        lines += _deadline_lines(deadlines)
    if memory := report.get("memory"):
        lines += _memory_lines(memory)
    return "\n".join(lines)


def _head(title: str, part: Mapping[str, Any]) -> list[str]:
    capacity = ", ".join(f"{name} {value:.2f}" for name, value in part["capacities"].items())
    machine = part["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [
        f"## {title}",
        "",
        f"    {part['command']}",
        "",
        f"{part['date']}, {machine['processor']}, {machine['cores']} cores, "
        f"{machine['memory_bytes'] / 2**30:.0f} GiB; {machine['system']}; commit "
        f"{machine['commit'] or 'unknown'}; {versions}.",
        "",
        f"Results per second of two clients in turn: {capacity}.",
    ]
    if part["agreement"] is not None:
        lines[-1] += (
            f" Mean IoU of the masks of both on the same requests: {part['agreement']:.4f}."
        )
    lines += ["", *(f"**Failed:** {failure}" for failure in part["failures"])]
    return [*lines, ""] if part["failures"] else lines


def _load_lines(load: Mapping[str, Any]) -> list[str]:
    lines = [
        *_head("Offered load", load),
        f"Poisson arrivals for {load['seconds']:g} s a rate, without waiting for answers; latency "
        "counts from the time at which a request was due. Offered: requests per second that wait "
        "for a result; clients that leave come on top. Both servers get the same rates in turn, "
        "each up to the first that it does not keep up with. In no rate was the 99th percentile of "
        f"the delay of the sender above {_worst_lag(load)}.",
        "",
    ]
    heads = ("", "offered/s", "results/s", "n", *QUANTILES, "refused", "left", "lost", "memory")
    for name, levels in load["levels"].items():
        rows = [_level_row(level) for level in levels]
        lines += [f"### {name}", "", *markdown_table(heads, rows), ""]
    return lines


def _worst_lag(load: Mapping[str, Any]) -> str:
    lags = [level["p99_lag_ms"] or 0.0 for levels in load["levels"].values() for level in levels]
    return format_ms(max(lags, default=0.0))


def _level_row(level: Mapping[str, Any]) -> tuple[str, ...]:
    counts = level["outcomes"]
    return (
        "saturated" if level["is_saturated"] else "",
        f"{level['offered_per_s']:.2f}",
        f"{level['answered_per_s']:.2f}",
        str(level["n"]),
        *("" if level[q] is None else format_ms(level[q]) for q in QUANTILES),
        *(str(counts.get(outcome, 0)) for outcome in ("refused", "left", "lost")),
        format_bytes(level["resident_bytes"]),
    )


def _deadline_lines(part: Mapping[str, Any]) -> list[str]:
    lines = [
        *_head("Deadlines", part),
        f"Poisson arrivals for {part['seconds']:g} s a row; the rate is a share of the results per "
        "second without a deadline. In time: answered within the deadline from the time at which "
        "the request was due, upload and download included. Not met: refused at once because a "
        "mask without reasoning would take longer.",
        "",
    ]
    heads = ("deadline", "rate", "offered/s", "n", "in time", *QUANTILES, "not met", "queue full")
    rows = [
        (
            "none" if level["deadline_ms"] is None else format_ms(level["deadline_ms"]),
            f"{level['share']:.0%}",
            f"{level['offered_per_s']:.2f}",
            str(level["n"]),
            f"{level['in_time']:.1%}" if "in_time" in level else "",
            *("" if level[q] is None else format_ms(level[q]) for q in QUANTILES),
            *(str(level["outcomes"].get(outcome, 0)) for outcome in ("rejected", "refused")),
        )
        for level in part["levels"]
    ]
    return [*lines, *markdown_table(heads, rows), ""]


def _memory_lines(memory: Mapping[str, Any]) -> list[str]:
    lines = [
        *_head("Memory", memory),
        f"{memory['minutes']:g} minutes of mixed requests to {' and '.join(memory['servers'])} at "
        f"the same time: {memory['rate']:.2f} per second each that wait for a result; bad bodies, "
        "clients that leave and slow ones come on top. The slope of the last half is the median of "
        "all pairwise slopes.",
        "",
    ]
    rows = []
    for name, record in memory["servers"].items():
        sizes = record["resident_bytes"]
        counts = ", ".join(f"{n} {outcome}" for outcome, n in sorted(record["outcomes"].items()))
        rows.append(
            (
                name,
                format_bytes(sizes[0]),
                format_bytes(max(sizes)),
                format_bytes(sizes[-1]),
                f"{record['bytes_per_minute'] / 1e6:+.2f} MB/min",
                f"{record['growth_of_last_half']:+.2%}",
                counts,
            )
        )
    heads = ("", "first", "largest", "last", "slope", "growth of the last half", "requests")
    return [*lines, *markdown_table(heads, rows), ""]


def draw_report(report: Mapping[str, Any]) -> bytes:
    """Draw the parts that were measured, side by side; return a PNG file.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    plt = pyplot()
    panels = [_draw_results, _draw_latencies] * ("load" in report)
    panels += [_draw_deadlines] * ("deadlines" in report)
    panels += [_draw_memory] * ("memory" in report)
    width, height = PANEL_INCHES
    canvas, grid = plt.subplots(
        1, len(panels), figsize=(width * len(panels), height), squeeze=False
    )
    for axes, draw in zip(grid.flat, panels, strict=True):
        draw(axes, report)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8)
    canvas.tight_layout()
    data = io.BytesIO()
    canvas.savefig(data, dpi=120, format="png")
    plt.close(canvas)
    return data.getvalue()


def _draw_results(axes: Any, report: Mapping[str, Any]) -> None:
    highest = 0.0
    for color, (name, levels) in zip(COLORS, report["load"]["levels"].items(), strict=False):
        offered = [level["offered_per_s"] for level in levels]
        axes.plot(offered, [v["answered_per_s"] for v in levels], "o-", color=color, label=name)
        highest = max([highest, *offered])
    axes.plot([0, highest], [0, highest], color="#8b8f98", linewidth=1, label="all")
    axes.set(xlabel="offered requests per second", ylabel="results per second", ylim=(0, None))


def _draw_latencies(axes: Any, report: Mapping[str, Any]) -> None:
    for color, (name, levels) in zip(COLORS, report["load"]["levels"].items(), strict=False):
        offered = [level["offered_per_s"] for level in levels]
        for quantile, style in QUANTILES.items():
            times = [_seconds(level[quantile]) for level in levels]
            label = f"{name}, {quantile}"
            axes.plot(offered, times, style, marker=".", color=color, label=label)
    from matplotlib.ticker import LogLocator

    axes.set(xlabel="offered requests per second", ylabel="latency in seconds", yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    axes.yaxis.set_minor_formatter("{x:g}")


def _draw_deadlines(axes: Any, report: Mapping[str, Any]) -> None:
    timed = [level for level in report["deadlines"]["levels"] if "in_time" in level]
    for deadline in sorted({level["deadline_ms"] for level in timed}):
        levels = [level for level in timed if level["deadline_ms"] == deadline]
        rates, shares = [x["share"] for x in levels], [x["in_time"] for x in levels]
        axes.plot(rates, shares, "o-", label=format_ms(deadline))
    axes.set(xlabel="rate, of the capacity", ylabel="answered in time", ylim=(0, 1.02))


def _seconds(milliseconds: float | None) -> float:
    return float("nan") if milliseconds is None else milliseconds / 1e3


def _draw_memory(axes: Any, report: Mapping[str, Any]) -> None:
    minutes = [t / 60 for t in report["memory"]["seconds"]]
    servers: Sequence[tuple[str, Any]] = list(report["memory"]["servers"].items())
    for color, (name, record) in zip(COLORS, servers, strict=False):
        sizes = [size / 1e6 for size in record["resident_bytes"]]
        axes.plot(minutes, sizes, color=color, label=name)
    axes.set(xlabel="minutes", ylabel="resident memory in MB", ylim=(0, None))
