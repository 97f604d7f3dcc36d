"""The page that all reports share."""

from coprs_deploy.page import data_uri, markdown_html, render_page


def test_render_page_has_title_body_style_and_foot():
    page = render_page("a < b", "<p>body $x</p>", tail="end", style=".c { color: red; }")
    assert "<title>a &lt; b</title>" in page
    assert "<p>body $x</p><footer>end</footer>" in page
    assert ".c { color: red; }\n</style>" in page or ".c { color: red; }</style>" in page
    assert "<footer>" not in render_page("t", "")


def test_markdown_html_renders_tables_and_escapes_html():
    html = markdown_html(["| a | b |", "|---|---|", "| <b> | 1 |"])
    assert "<table>" in html
    assert "<td>&lt;b&gt;</td>" in html


def test_data_uri_holds_the_bytes():
    assert data_uri(b"\x00\xff", "image/png") == "data:image/png;base64,AP8="
