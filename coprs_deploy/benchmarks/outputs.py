"""A report in all its forms on disk."""

from __future__ import annotations

from pathlib import Path

from coprs_deploy.benchmarks.page import render_html
from coprs_deploy.benchmarks.report import Report, write_report
from coprs_deploy.benchmarks.text import render_markdown
from coprs_deploy.errors import MissingDependencyError


def write_outputs(folder: Path, report: Report) -> tuple[list[Path], str]:
    """Write JSON, Markdown and HTML under the report's own name.

    Args:
        folder: made if it is not there.
        report: what was measured.

    Returns:
        What was written, and why the page with charts was left out, if it was.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{report.stem}.{ending}" for ending in ("json", "md", "html")]
    write_report(paths[0], report)
    paths[1].write_text(render_markdown(report), encoding="utf-8")
    try:
        paths[2].write_text(render_html(report), encoding="utf-8")
    except MissingDependencyError as error:
        return paths[:2], f"{paths[2].name} is left out: {error}"
    return paths, ""
