"""Parts of a report, each as Markdown and as HTML: metrics, plots and galleries."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple, Self

from coprs_deploy.artifacts import atomic_write, make_directory
from coprs_deploy.console import markdown_table
from coprs_deploy.evaluation.reports.galleries import PANELS, GalleryExample
from coprs_deploy.evaluation.reports.plots import COLORS, Correlation, draw_correlations
from coprs_deploy.evaluation.rows import EvaluationRow
from coprs_deploy.evaluation.summary import EvaluationSummary, Metric
from coprs_deploy.page import data_uri, markdown_html
from coprs_deploy.prompts import extract_reasoning

LISTED_FAILURES = 20
"""Failed rows that the report lists; ``rows.jsonl`` has all of them."""

LEFT_OUT_OF_GROUPS = tuple(f"precision_at_{n}" for n in (60, 70, 80, 90))
"""Metrics that make the tables of groups too wide to read; ``report.json`` has them."""

SHORT_REASONING = 320
"""Characters of a reasoning that are shown; a longer one is unfolded by a click."""

STYLE = """
table { margin: 1rem 0; } th, td { padding: .25rem .4rem; }
th:first-child, td:first-child { min-width: 9.5rem; } img { max-width: 100%; height: auto; }
.plot img { display: block; border-radius: 6px; }
.example { margin: 1rem 0; padding: .8rem; background: var(--card); border-radius: 8px; }
.example > p { margin: .3rem 0; overflow-wrap: anywhere; } .ask { font-weight: 600; }
.small { font-size: 13px; opacity: .8; } details { font-size: 14px; }
.panels { display: grid; grid-template-columns: repeat(4, 1fr); gap: .6rem; }
@media (max-width: 40rem) { .panels { grid-template-columns: repeat(2, 1fr); } }
.panels p { margin: .1rem 0; font-size: 12px; } .panels img { width: 100%; border-radius: 4px; }
"""


class Part(NamedTuple):
    """A part of the report.

    Attributes:
        markdown: lines of Markdown.
        html: the same as HTML.
    """

    markdown: list[str]
    html: str

    @classmethod
    def of(cls, lines: Sequence[str]) -> Self:
        """Return lines of Markdown, with the HTML that they render to."""
        return cls(list(lines), markdown_html(lines))


def head_lines(rows: Sequence[tuple[str, str]]) -> list[str]:
    """Return what was evaluated as a table."""
    return markdown_table(("", ""), rows) if rows else []


def dataset_lines(
    description: str, summary: EvaluationSummary, rows: Sequence[EvaluationRow]
) -> list[str]:
    """Return protocol, metrics, groups and failed rows of a data set as Markdown."""
    lines = [
        f"## {description}",
        "",
        f"Protocol `{summary.protocol}`; {summary.num_rows:,} instructions on "
        f"{summary.num_images:,} images, {summary.num_failed:,} failed (IoU 0 in every mean).",
        "",
        *markdown_table(("metric", "value", "95 % interval"), metric_rows(summary.metrics)),
    ]
    for dimension, groups in summary.groups.items():
        found = dict.fromkeys(name for group in groups.values() for name in group.metrics)
        names = [name for name in found if name not in LEFT_OUT_OF_GROUPS]
        body = [
            (name, f"{group.num_rows:,}", *(_value(group.metrics.get(each)) for each in names))
            for name, group in groups.items()
        ]
        lines += ["", *markdown_table((dimension.replace("_", " "), "rows", *names), body)]
    failed = [row for row in rows if row.error is not None]
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


def plot_part(directory: Path, stem: Path, correlations: Sequence[Correlation], text: str) -> Part:
    """Draw correlations side by side, for light and for dark pages.

    Args:
        directory: folder of the report.
        stem: path of the files without ending.
        correlations: what is drawn.
        text: what the plot shows.
    """
    make_directory(stem.parent)
    files = {}
    for scheme in COLORS:
        files[scheme] = draw_correlations(correlations, scheme)
        with atomic_write(stem.with_name(f"{stem.name}-{scheme}.png")) as partial:
            partial.write_bytes(files[scheme])
    shown = _relative(stem.with_name(f"{stem.name}-light.png"), directory)
    light, dark = (data_uri(files[scheme], "image/png") for scheme in ("light", "dark"))
    html = (
        f'<p>{escape(text)}</p><picture class="plot">'
        f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img alt="{escape(text)}" src="{light}"></picture>'
    )
    return Part([text, "", f"![{text}]({shown})"], html)


def gallery_part(directory: Path, title: str, examples: Sequence[GalleryExample]) -> Part:
    """Show examples: their panels, the instruction and the reasoning."""
    lines, html = [f"### {title}"], [f"<h3>{escape(title)}</h3>"]
    for example in examples:
        names = [name for name in PANELS if name in example.panels]
        shown = [
            f"![{PANELS[name]}]({_relative(example.panels[name], directory)})" for name in names
        ]
        captions = [PANELS[name] for name in names]
        lines += ["", f"**{_plain(example.row.instruction)}**", "", _measured(example), ""]
        lines += markdown_table(captions, [shown])
        if reasoning := extract_reasoning(example.row.response):
            lines += ["", f"> {_plain(reasoning)}"]
        html.append(_example_html(example, names, reasoning))
    return Part(lines, "".join(html))


def _example_html(example: GalleryExample, names: Sequence[str], reasoning: str) -> str:
    panels = "".join(
        f'<div><img alt="{PANELS[name]}" src="'
        f'{data_uri(example.panels[name].read_bytes(), "image/webp")}"><p>{PANELS[name]}</p></div>'
        for name in names
    )
    text = escape(reasoning)
    if len(reasoning) > SHORT_REASONING:
        start = escape(reasoning[:SHORT_REASONING].rpartition(" ")[0])
        text = f"<details><summary>{start} ...</summary>{text}</details>"
    return (
        f'<div class="example"><p class="ask">{escape(example.row.instruction)}</p>'
        f'<p class="small">{escape(_measured(example))}</p>'
        f'<div class="panels">{panels}</div>{text and f"<p>{text}</p>"}</div>'
    )


def _measured(example: GalleryExample) -> str:
    row = example.row
    text = f"IoU of the mask {example.mask_iou:.3f}, of the prior {example.prior_iou:.3f}"
    if row.num_same_class is not None:
        text += f"; {row.num_same_class} other objects of the class"
    return f"{text}; {_plain(row.id)}"


def _plain(text: str) -> str:
    """Return text on one line without the characters that Markdown would read."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>#|" else c for c in " ".join(text.split()))


def _relative(path: Path, directory: Path) -> str:
    return Path(os.path.relpath(path, directory)).as_posix()
