"""Reports on disk, and as text, Markdown and page."""

import json
import re
from pathlib import Path

import msgspec
import pytest
from sample_reports import case, report

from coprs_deploy.bench.render import (
    render_html,
    render_markdown,
    render_text,
    write_outputs,
)
from coprs_deploy.bench.report import Accuracy, CaseResult, GroupResult, read_report
from coprs_deploy.errors import ArtifactError

REPORTS = Path(__file__).parents[3] / "benchmarks/reports"


def test_write_outputs_can_be_read_again(tmp_path):
    made = report()
    path, *_ = write_outputs(tmp_path, made)
    assert path.name == "demo-cpu-2-cores-avx2-2026-11-25.json"
    assert read_report(path) == made
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".html", ".json", ".md"]


@pytest.mark.parametrize("path", sorted(REPORTS.glob("*-20*.json")), ids=lambda path: path.stem)
def test_committed_reports_are_read_and_their_markdown_is_current(path):
    found = read_report(path)
    assert found.stem == path.stem
    assert path.with_suffix(".md").read_text(encoding="utf-8") == render_markdown(found)


def test_read_report_of_another_schema_version_raises(tmp_path):
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report().to_json() | {"schema_version": 99}))
    with pytest.raises(ArtifactError, match=r"version 99; accepted: 1.*[Mm]easure again"):
        read_report(path)
    path.write_text("[]")
    with pytest.raises(ArtifactError, match="version None"):
        read_report(path)
    path.write_text("{")
    with pytest.raises(ArtifactError, match="cannot parse benchmark report"):
        read_report(path)


def test_render_shows_errors_in_every_form():
    failed = CaseResult("graph, bf16", error="stopped: it took too long")
    made = report(case("base", [[1.0]]), failed)
    for text in (render_text(made), render_markdown(made), render_html(made)):
        assert "graph, bf16" in text
        assert "stopped: it took too long" in text
        assert "not installed" in text


def test_render_shows_confidence_interval_and_accuracy():
    made = report(case("base", [[1.0, 2.0, 3.0]]))
    for text in (render_text(made), render_markdown(made), render_html(made)):
        assert "1 ms to 3 ms" in text
        assert "0.999900" in text


def test_page_loads_nothing_and_takes_its_colors_from_the_style_sheet():
    cases = (case("base", [[1.0, 2.0]]), case("other", [[3.0, 3.5]], iou=0.9))
    page = render_html(report(*cases))
    assert page.count("<svg") == 3
    assert not re.search(r"(?:src|href)=", page)
    assert "http" not in page
    assert "prefers-color-scheme: dark" in page
    for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        assert "var(--" in svg
        assert not re.search(r'(?:fill|stroke)="#', svg)


def test_page_of_the_same_report_is_the_same():
    assert render_html(report()) == render_html(report())


def test_render_escapes_names():
    assert "graph &lt;1&gt; | fast" in render_html(report())
    assert "graph <1> \\| fast" in render_markdown(report())


def test_page_draws_a_curve_for_cases_that_scale():
    cases = [case(f"{n} targets", [[float(n), n + 0.1]], targets=str(n)) for n in (1, 2, 4)]
    group = GroupResult("scaling", "targets", "one call", tuple(cases), "interleaved", "targets")
    assert "Scaling with targets" in render_html(report(groups=(group,)))


def test_page_draws_a_single_run():
    assert "<svg" in render_html(report(case("one", [[2.0]])))


def test_page_draws_accuracy_against_latency_by_limit():
    cases = [
        msgspec.structs.replace(
            case(name, [[ms, 1.1 * ms, 1.5 * ms]], limit=name),
            accuracy=Accuracy(inputs=100, giou=giou, precision_at_50=giou + 0.02),
        )
        for name, ms, giou in (("no reasoning", 50.0, 0.38), ("whole reasoning", 150.0, 0.96))
    ]
    page = render_html(report(*cases))
    assert "Accuracy against latency" in page
    assert "1  no reasoning: 55 ms, p99 75 ms" in page
    assert "2  whole reasoning: 165 ms, p99 225 ms" in page
    unmeasured = [msgspec.structs.replace(c, accuracy=None) for c in cases]
    assert "no ground truth, hence no accuracy" in render_html(report(*unmeasured))
