"""Charts of a report as SVG that a page can hold: text stays text, colors are the page's own.

matplotlib draws; its colors are exchanged for variables of the page's style sheet, so that one
picture serves light and dark. Each is drawn narrow enough for a telephone.
"""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from coprs_deploy.benchmarks.cells import milliseconds
from coprs_deploy.benchmarks.report import GroupResult, Row
from coprs_deploy.evaluation.plots import pyplot

WIDTH = 4.6
"""Inches; 72 points each: at the width of a telephone the text can still be read."""

INK, FAINT = "#010101", "#020202"
SERIES = ("#030303", "#040404", "#050505", "#060606", "#070707", "#080808", "#090909", "#0a0a0a")
VARIABLES = {INK: "var(--ink)", FAINT: "var(--faint)"} | {
    color: f"var(--series-{number})" for number, color in enumerate(SERIES, start=1)
}
"""Colors that stand for variables of the page."""


LEGEND_INCHES = 0.6
"""How far below a chart its legend begins."""


def stage_bars(group: GroupResult) -> str:
    """Draw the medians of the stages of each row as one bar."""
    rows = [row for row in group.rows if row.stages]
    names = list(dict.fromkeys(name for row in rows for name in row.stages))

    def draw(axes: Any) -> None:
        for number, row in enumerate(rows):
            left = 0.0
            for name in names:
                value = row.stages.get(name, 0.0)
                color = SERIES[names.index(name) % len(SERIES)]
                axes.barh(number, value, left=left, height=0.45, color=color, linewidth=0)
                left += value
            _row_label(axes, number, f"{row.name}: {milliseconds(left)}")
        for name in names:
            axes.barh(0, 0, color=SERIES[names.index(name) % len(SERIES)], label=name)
        axes.legend(
            loc="upper left",
            bbox_to_anchor=(0, -LEGEND_INCHES / (0.62 * len(rows) + 0.7)),  # below the axis
            ncols=2,
            frameon=False,
            fontsize=8,
            labelcolor=INK,
        )
        _rows_axis(axes, len(rows))
        axes.set_xlabel("milliseconds")

    return _svg(draw, 0.62 * len(rows) + 1.4)


def latency_distributions(group: GroupResult) -> str:
    """Draw every run of each row, with median and interval, on a logarithmic scale."""
    rows = [row for row in group.rows if row.latency is not None]

    def draw(axes: Any) -> None:
        generator = np.random.default_rng(0)  # where a point lies within its row means nothing
        for number, row in enumerate(rows):
            assert row.latency is not None
            samples = np.array(row.latency.samples)
            spread = number + generator.uniform(-0.16, 0.16, len(samples))
            color = SERIES[number % len(SERIES)]
            axes.scatter(samples, spread, s=7, alpha=0.45, color=color, linewidths=0)
            axes.plot([row.latency.p50] * 2, [number - 0.26, number + 0.26], color=INK, lw=1.6)
            axes.plot([row.latency.low, row.latency.high], [number, number], color=INK, lw=1)
            _row_label(axes, number, f"{row.name}: {milliseconds(row.latency.p50)}")
        _logarithmic(axes)
        _rows_axis(axes, len(rows))
        axes.set_xlabel("milliseconds of each run; the line is the median")

    return _svg(draw, 0.62 * len(rows) + 0.8)


def speed_against_accuracy(group: GroupResult) -> str:
    """Draw how far each row is from float32 against its median."""
    name, rows = _losses(group)

    def draw(axes: Any) -> None:
        for number, (row, loss) in enumerate(rows):
            assert row.latency is not None
            color = SERIES[number % len(SERIES)]
            label = f"{number + 1}  {row.name}"
            axes.scatter(row.latency.p50, loss, s=54, color=color, label=label, zorder=3)
            axes.annotate(
                str(number + 1),
                (row.latency.p50, loss),
                xytext=(5, 5),
                textcoords="offset points",
                fontsize=8,
                color=INK,
            )
        axes.set_yscale("symlog", linthresh=1e-7)
        axes.set_ylim(-3e-8, max(1e-5, 5 * max(loss for _, loss in rows)))
        axes.margins(x=0.1)
        _logarithmic(axes)
        axes.set_xlabel("median in milliseconds")
        axes.set_ylabel(name)
        axes.legend(
            loc="upper left",
            bbox_to_anchor=(-0.16, -0.2),
            frameon=False,
            fontsize=7,
            labelcolor=INK,
        )

    return _svg(draw, 2.6)


def scaling_curve(group: GroupResult) -> str:
    """Draw the median against what grows, with the interval of each."""
    rows = [row for row in group.rows if row.latency is not None]

    def draw(axes: Any) -> None:
        x = [float(row.labels[group.parameter]) for row in rows]
        latencies = [row.latency for row in rows if row.latency is not None]
        y = [latency.p50 for latency in latencies]
        axes.plot(x, y, color=SERIES[0], marker="o", ms=5, lw=1.6)
        axes.vlines(x, [q.low for q in latencies], [q.high for q in latencies], color=INK, lw=1)
        for at, value in zip(x, y, strict=True):
            axes.annotate(
                milliseconds(value),
                (at, value),
                xytext=(0, 7),
                textcoords="offset points",
                fontsize=8,
                ha="center",
                color=INK,
            )
        axes.set_xscale("log", base=2)
        axes.set_xticks(x, [f"{value:g}" for value in x])
        axes.minorticks_off()
        axes.set_ylim(0, 1.2 * max(y))
        axes.margins(x=0.12)
        axes.set_xlabel(group.parameter)
        axes.set_ylabel("milliseconds")

    return _svg(draw, 2.8)


def has_losses(group: GroupResult) -> bool:
    """Whether several of a group's rows have both speed and accuracy."""
    return len(_losses(group)[1]) > 1


def _losses(group: GroupResult) -> tuple[str, list[tuple[Row, float]]]:
    """Give the finest measure of accuracy that rows of a group have, and its values."""
    timed = [(row, row.accuracy) for row in group.rows if row.latency and row.accuracy]
    errors = [(row, a.mask_error) for row, a in timed if a.mask_error is not None]
    if errors:
        return "largest error of the mask logits", errors
    masks = [(row, max(0.0, 1 - a.mask_iou)) for row, a in timed if a.mask_iou is not None]
    return "1 - mask IoU with float32", masks


def _row_label(axes: Any, number: int, text: str) -> None:
    axes.text(
        0.0,
        number - 0.33,
        text if len(text) <= 88 else text[:85] + "...",
        transform=axes.get_yaxis_transform(),
        fontsize=7,
        color=INK,
        va="bottom",
        ha="left",
    )


def _logarithmic(axes: Any) -> None:
    """Make the time axis logarithmic, with plain numbers that do not run into each other."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    low, high = axes.get_xlim()
    steps = (1, 2, 5) if high / low < 60 else (1,)
    axes.xaxis.set_major_locator(LogLocator(subs=steps))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _rows_axis(axes: Any, count: int) -> None:
    axes.set_ylim(count - 0.4, -0.75)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)


def _svg(draw: Callable[[Any], None], height: float) -> str:
    """Draw one picture and bring it into a form that stands inside a page."""
    plt = pyplot()
    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": "coprs-deploy",
        "font.family": "sans-serif",
        "font.size": 9,
        "axes.edgecolor": FAINT,
        "axes.labelcolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "text.color": INK,
        "grid.color": FAINT,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with plt.rc_context(style):
        figure, axes = plt.subplots(figsize=(WIDTH, height))
        axes.grid(axis="x", alpha=0.35, linewidth=0.6)
        axes.set_axisbelow(True)
        draw(axes)
        written = io.StringIO()
        figure.savefig(
            written,
            format="svg",
            transparent=True,
            bbox_inches="tight",
            metadata={"Date": None, "Creator": None},
        )
        plt.close(figure)
    return _inline(written.getvalue())


def _inline(svg: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for color, variable in VARIABLES.items():
        svg = svg.replace(color, variable)
    # Several pictures stand in one page: what they name must not meet.
    salt = f"c{zlib.crc32(svg.encode())}-"
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{salt}\1"', svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{salt}\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{salt}\1)", svg)
    width = re.search(r'width="([\d.]+)pt"', svg)
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    most = f"{float(width[1]) * 4 / 3:.0f}px" if width else "100%"
    return svg.replace("<svg", f'<svg role="img" style="width:100%;max-width:{most}"', 1)
