"""One HTML page from Markdown and inline parts: light and dark, any width, and it loads nothing."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from importlib import resources
from string import Template


def render_page(title: str, body: str, *, tail: str = "", style: str = "") -> str:
    """Put HTML into the page that all reports share.

    Args:
        title: plain text.
        body: HTML.
        tail: HTML below the body; empty for none.
        style: further CSS; the colors are the variables of ``page.html``.
    """
    page = resources.files("coprs_deploy").joinpath("page.html").read_text("utf-8")
    footer = f"<footer>{tail}</footer>" if tail else ""
    return Template(page).substitute(title=escape(title), style=style, body=body, footer=footer)


def markdown_html(lines: Sequence[str]) -> str:
    """Render lines of Markdown, tables included; HTML in them is shown as text."""
    from markdown_it import MarkdownIt

    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    return str(markdown.render("\n".join(lines)))


def data_uri(data: bytes, media_type: str) -> str:
    """Return a file as the data URI that stands in ``src``."""
    return f"data:{media_type};base64,{base64.b64encode(data).decode('ascii')}"
