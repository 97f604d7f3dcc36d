"""A report as one page that stands alone: tables and charts, light and dark, wide and narrow."""

from __future__ import annotations

from html import escape

from coprs_deploy.benchmarks import charts
from coprs_deploy.benchmarks.cells import baseline, machine_lines, table
from coprs_deploy.benchmarks.report import GroupResult, Report

STYLE = """
:root { color-scheme: light dark; --ink: #1c1d21; --faint: #b9bcc4; --paper: #ffffff;
  --card: #f6f7f9; --bad: #a4262c; --accent: #1d5fc4;
  --series-1: #2563eb; --series-2: #d97706; --series-3: #059669; --series-4: #b91c1c;
  --series-5: #7c3aed; --series-6: #0e7490; --series-7: #be185d; --series-8: #57606a; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8ee; --faint: #565b66; --paper: #14161a; --card: #1d2026; --bad: #ff8f8f;
  --accent: #7db0ff; --series-1: #7aa7ff; --series-2: #f5b25c; --series-3: #4fd1a1;
  --series-4: #ff8585; --series-5: #b79bff; --series-6: #5cc8df; --series-7: #ff8fc2;
  --series-8: #a3abb8; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1.2rem; background: var(--paper);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0.2rem 0; } h2 { margin: 2.2rem 0 0.4rem; }
h3 { margin: 1.4rem 0 0.3rem; font-size: 1.05rem; }
p { margin: 0.3rem 0; max-width: 60rem; } a { color: var(--accent); }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; margin: 0.5rem 0; }
th, td { padding: 0.25rem 0.6rem; text-align: right; border-bottom: 1px solid var(--faint);
  white-space: nowrap; font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 15rem; }
.facts td { white-space: normal; text-align: left; min-width: 0; }
.base { font-weight: 600; } .reason { color: var(--bad); }
.reasons td { white-space: normal; text-align: left; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr));
  gap: 1rem; } figure { margin: 0; padding: 0.8rem; background: var(--card); border-radius: 8px;
  min-width: 0; } figcaption { font-size: 13px; margin-bottom: 0.4rem; font-weight: 600; }
@media (max-width: 40rem) { body { padding: 0.8rem; }
  th:first-child, td:first-child { min-width: 9rem; } .reasons td { min-width: 8rem; } }
svg { display: block; height: auto; } svg text { font-family: system-ui, sans-serif; }
"""


def render_html(report: Report) -> str:
    """Write a report as a page.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    title = f"Benchmark: {report.theme}, {report.machine.kind}"
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(report.date)}, made by <code>{escape(report.command)}</code>. Every row ran "
        "in a process of its own; the rows of a table took turns, and a ratio has its range over "
        "the rounds.</p>",
        '<div class="wide"><table class="facts">',
        *(
            f"<tr><td>{escape(name)}</td><td>{escape(text)}</td></tr>"
            for name, text in machine_lines(report)
        ),
        "</table></div>",
    ]
    suite = ""
    for group in report.groups:
        if group.suite != suite:
            suite = group.suite
            parts.append(f"<h2>{escape(suite)}</h2>")
        parts += _group(group)
    if report.left_out:
        parts.append('<h2>left out</h2><div class="wide"><table class="reasons">')
        parts += [
            f"<tr><td>{escape(e.name)} ({escape(e.suite)})</td><td>{escape(e.reason)}</td>"
            f"<td>{escape(e.remedy)}</td></tr>"
            for e in report.left_out
        ]
        parts.append("</table></div>")
    parts.append("</body></html>")
    return "\n".join(parts) + "\n"


def _group(group: GroupResult) -> list[str]:
    laid, base = table(group), baseline(group)
    words = f"One run is {group.unit}; {group.method}."
    if base:
        words += f" The baseline is {base}."
    parts = [f"<h3>{escape(group.name)}</h3>", f"<p>{escape(words)}</p>"]
    if laid.rows:
        heads = "".join(
            f'<th title="{escape(column.meaning)}">{escape(column.head)}</th>'
            for column in laid.columns
        )
        parts.append(f'<div class="wide"><table><tr><th></th>{heads}</tr>')
        for row in laid.rows:
            mark = ' class="base"' if row[0] == base else ""
            cells = "".join(f"<td>{escape(cell)}</td>" for cell in row)
            parts.append(f"<tr{mark}>{cells}</tr>")
        parts.append("</table></div>")
    if laid.reasons:
        parts.append('<div class="wide"><table class="reasons">')
        parts += [
            f'<tr><td>{escape(name)}</td><td class="reason">{escape(reason)}</td></tr>'
            for name, reason in laid.reasons
        ]
        parts.append("</table></div>")
    pictures = _pictures(group)
    if pictures:
        parts.append('<div class="charts">')
        parts += [
            f"<figure><figcaption>{escape(caption)}</figcaption>{picture}</figure>"
            for caption, picture in pictures
        ]
        parts.append("</div>")
    return parts


def _pictures(group: GroupResult) -> list[tuple[str, str]]:
    """Draw what a group has figures for."""
    pictures = []
    timed = [row for row in group.rows if row.latency is not None]
    if any(row.stages for row in group.rows):
        pictures.append(("Stages, medians", charts.stage_bars(group)))
    if group.parameter and len(timed) > 1:
        caption = f"Growing {group.parameter}"
        pictures.append((caption, charts.scaling_curve(group)))
    elif timed:
        pictures.append(("Every run", charts.latency_distributions(group)))
    if charts.has_losses(group) and not group.parameter:  # rows of another size are no rivals
        pictures.append(("Speed against accuracy", charts.speed_against_accuracy(group)))
    return pictures
