"""Reports on disk: what is written is read, old ones too, and every form holds the figures."""

import json
import re

import msgspec
import pytest

from coprs_deploy.benchmarks.committed import REPORTS, shown
from coprs_deploy.benchmarks.outputs import write_outputs
from coprs_deploy.benchmarks.page import render_html
from coprs_deploy.benchmarks.report import READABLE_VERSIONS, GroupResult, Row, read_report
from coprs_deploy.benchmarks.text import render_markdown, render_text
from coprs_deploy.errors import ArtifactError
from tests import ROOT
from tests.unit.benchmarks.sample_reports import report, row

GOLDEN = ROOT / "tests" / "golden"


def test_what_is_written_is_read(tmp_path):
    made = report()
    (path, *_), left_out = write_outputs(tmp_path, made)
    assert path.name == "shipped-cpu-2-cores-avx2-2026-11-25.json"
    assert read_report(path) == made
    assert left_out == ""
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".html", ".json", ".md"]


def test_tables_show_the_best_machine_and_there_the_newest_report(tmp_path):
    folder = tmp_path / REPORTS
    machine = report().machine
    kinds = ("cpu-16-cores-avx512", "cpu-2-cores-avx2")
    machines = [msgspec.structs.replace(machine, kind=kind) for kind in kinds]
    wide, narrow = (
        [report(date=day, machine=m) for day in ("2026-01-01", "2026-02-02")] for m in machines
    )
    assert shown(tmp_path, "shipped") is None
    for number, made in enumerate((narrow[1], narrow[0], wide[1], wide[0])):
        write_outputs(folder, made)
        assert shown(tmp_path, "shipped") == (narrow[1] if number < 2 else wide[1])
    graphics = msgspec.structs.replace(machine, kind="a-gpu", gpu="A GPU")
    write_outputs(folder, report(date="2025-12-12", machine=graphics))
    assert shown(tmp_path, "shipped").machine == graphics
    assert shown(tmp_path, "full-size") is None


@pytest.mark.parametrize("version", READABLE_VERSIONS)
def test_reports_of_every_readable_version_are_read(version):
    old = read_report(GOLDEN / f"benchmark-report-v{version}.json")
    assert old.groups[0].rows[0].latency.p50 == 10.0
    assert old.groups[0].rows[1].reason == "out of memory"


def test_a_report_of_another_version_says_what_to_do(tmp_path):
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report().to_json() | {"schema_version": 99}))
    with pytest.raises(ArtifactError, match=r"version 99.*measure again"):
        read_report(path)
    path.write_text("[]")
    with pytest.raises(ArtifactError, match="version None"):
        read_report(path)


def test_rows_that_failed_hold_their_reason_in_every_form():
    failed = Row("graph, bf16", reason="stopped: it took too long")
    made = report(row("base", [[1.0]]), failed)
    for text in (render_text(made), render_markdown(made), render_html(made)):
        assert "graph, bf16" in text
        assert "stopped: it took too long" in text
        assert "not installed" in text


def test_the_page_stands_alone_and_has_no_color_of_its_own_in_a_chart():
    page = render_html(report(row("base", [[1.0, 2.0]]), row("other", [[3.0, 3.5]], iou=0.9)))
    assert page.count("<svg") == 3
    assert not re.search(r"(?:src|href)=\"(?!#)", page)
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]+"', "", page)
    assert "prefers-color-scheme: dark" in page
    for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        assert "var(--ink)" in svg
        colors = re.findall(r"(?:fill|stroke): (#\w+)", svg)
        assert not colors, colors
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_a_page_of_the_same_report_is_the_same():
    assert render_html(report()) == render_html(report())


def test_names_are_escaped():
    assert "graph &lt;1&gt; | fast" in render_html(report())
    assert "graph <1> \\| fast" in render_markdown(report())


def test_rows_that_scale_are_a_curve():
    rows = [row(f"{n} targets", [[float(n), n + 0.1]], targets=str(n)) for n in (1, 2, 4)]
    made = report()
    group = GroupResult("scaling", "targets", "one call", tuple(rows), "in turns", "targets")
    page = render_html(report(groups=(group,), left_out=made.left_out))
    assert "Growing targets" in page
