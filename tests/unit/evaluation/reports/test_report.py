"""Report of an evaluation: page, Markdown, JSON, and what stands in them."""

import json
import re
from html.parser import HTMLParser

import pytest
from msgspec import structs

from coprs_deploy.evaluation.chat_endpoint import ChatEndpoint
from coprs_deploy.evaluation.judge import JudgeSettings
from coprs_deploy.evaluation.protocols import TARGETS
from coprs_deploy.evaluation.reports.report import ReportOptions, write_report
from coprs_deploy.evaluation.reports.report_parts import LISTED_FAILURES, dataset_lines
from coprs_deploy.evaluation.summary import row_iou, summarize_dataset
from tests.unit.evaluation.judge_server import answer, judge_server
from tests.unit.evaluation.report_samples import make_dataset, segment


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Write a report with everything in it; return its folder and the outcome of the judge."""
    path = tmp_path_factory.mktemp("report")
    log = path / "log.jsonl"
    lines = [{"loss/prior_bce": 0.1 * n, "loss/mask_dice": 0.2 * n} for n in range(4)]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with judge_server(lambda n, r: answer()) as (url, requests):
        options = ReportOptions(
            segment=lambda: segment,
            judge=JudgeSettings(url, "a-judge"),
            training_run=log,
            head=[("bundle", "tiny")],
            foot="5 images/s",
        )
        outcome = write_report(path, "Evaluation", [make_dataset(path)], options)
        assert len(requests) == 9
    return path, outcome


def test_page_stands_alone_and_is_well_formed(written):
    page = (written[0] / "report.html").read_text()
    assert not re.findall(r"(?:src|href|srcset)=\"(?!data:)", page)
    assert "<script" not in page and "@import" not in page and "url(" not in page
    assert page.count("(prefers-color-scheme: dark)") == 4  # colors, and three plots
    open_tags = []

    class Check(HTMLParser):
        def handle_starttag(self, tag, attrs):
            if tag not in ("meta", "img", "br", "source"):
                open_tags.append(tag)
            if tag == "img":
                assert dict(attrs)["alt"]

        def handle_endtag(self, tag):
            assert open_tags.pop() == tag

    Check().feed(page.partition("<html")[1] + page.partition("<html")[2])
    assert open_tags == []


def test_page_has_metrics_galleries_reasoning_and_the_foot(written):
    page = (written[0] / "report.html").read_text()
    for text in ("<h1>Evaluation</h1>", "tiny", "precision_at_90", "Best masks", "a-judge"):
        assert text in page
    assert "It is *object* 0 &lt;left&gt;." in page
    assert "<footer><p>5 images/s</p>" in page
    assert page.count('<div class="panels">') == 9  # every example with a target, once


def test_markdown_refers_to_files_that_exist_and_has_no_foot(written):
    path = written[0]
    text = (path / "report.md").read_text()
    names = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    assert len(names) == 3 + 4 * 9
    assert all((path / name).is_file() for name in names)
    assert "It is \\*object\\* 0 \\<left\\>." in text
    assert "5 images/s" not in text


def test_json_has_summary_galleries_judge_and_correlations(written):
    path, outcome = written
    report = json.loads((path / "report.json").read_text())
    dataset = report["datasets"]["synthetic:full"]
    assert 0 < dataset["metrics"]["giou"]["value"] < 1
    rows = make_dataset(path).rows[:9]
    ranked = sorted(rows, key=lambda row: row_iou(row, TARGETS))
    assert dataset["galleries"]["best"][0] == ranked[-1].index == 0
    assert dataset["galleries"]["worst"][0] == ranked[0].index
    assert dataset["reasoning"]["quality"] == pytest.approx(0.475)
    assert dataset["reasoning"]["pearson_r_mask_iou"] is None  # the quality is constant
    assert report["judge"] == outcome.to_json()
    assert report["training_pearson_r"] == pytest.approx(1)
    assert report["published"] == []


def test_write_report_again_writes_the_same_and_opens_no_model(written):
    path, _ = written
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}

    def no_model():
        raise AssertionError("every prior has been drawn")

    options = ReportOptions(
        segment=no_model,
        judge=JudgeSettings("http://127.0.0.1:9/v1", "a-judge"),
        training_run=path / "log.jsonl",
        head=[("bundle", "tiny")],
        foot="5 images/s",
    )
    write_report(path, "Evaluation", [make_dataset(path)], options)
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before


def test_write_report_without_judge_training_or_model_says_so(tmp_path):
    dataset = make_dataset(tmp_path, 2, 0)
    (dataset.folder / "gallery").mkdir()
    (dataset.folder / "gallery" / "0-earlier-image.webp").write_bytes(b"")
    assert write_report(tmp_path, "Evaluation", [dataset], ReportOptions()) is None
    text = (tmp_path / "report.md").read_text()
    assert "No judge was given" in text
    assert "No training run was given" in text
    assert "![prior]" not in text and "![image]" in text
    assert not list(dataset.folder.glob("gallery/*earlier*"))


def test_write_report_of_no_match_and_failed_rows_alone(tmp_path):
    dataset = make_dataset(tmp_path, 1, 2)
    rows = [structs.replace(dataset.rows[0], error="PolicyError: no memory"), *dataset.rows[1:]]
    summary = summarize_dataset(rows, dataset.task.protocol)
    dataset = type(dataset)(dataset.task, dataset.description, dataset.folder, rows, summary)
    write_report(tmp_path, "Evaluation", [dataset], ReportOptions(segment=lambda: segment))
    text = (tmp_path / "report.md").read_text()
    assert "PolicyError: no memory" in text
    assert "![" not in text


def test_write_report_judge_without_connection_keeps_the_rest(tmp_path, monkeypatch):
    monkeypatch.setattr(JudgeSettings, "open", lambda s: ChatEndpoint(s.url, "m", max_attempts=1))
    settings = JudgeSettings("http://127.0.0.1:9/v1", "m", concurrency=1)
    monkeypatch.setattr("coprs_deploy.evaluation.judge.MAX_FAILURES_IN_A_ROW", 1)
    dataset = make_dataset(tmp_path, 2, 0)
    outcome = write_report(tmp_path, "Evaluation", [dataset], ReportOptions(judge=settings))
    assert "gave up after 1 failures" in outcome.error
    text = (tmp_path / "report.md").read_text()
    assert "**The judge gave up**" in text
    assert "| no connection | 1 |" in text
    assert "Best masks" in text


def test_dataset_lines_have_the_protocol_groups_and_the_first_failed_rows(tmp_path):
    dataset = make_dataset(tmp_path, 30, 1)
    rows = [structs.replace(row, error="PolicyError: a|b") for row in dataset.rows[:25]]
    rows += dataset.rows[25:]
    summary = summarize_dataset(rows, dataset.task.protocol)
    text = "\n".join(dataset_lines("some scenes", summary, rows))
    assert "## some scenes" in text
    assert "Protocol `targets`; 31 instructions on 31 images, 25 failed" in text
    assert f"| 0 | {rows[0].id} | PolicyError: a\\|b |" in text
    assert f"And {25 - LISTED_FAILURES} more." in text
    assert "| question type | rows |" in text and "| object size | rows |" in text
