"""Report of an evaluation."""

from msgspec import structs

from coprs_deploy.data.sources import open_examples
from coprs_deploy.evaluation.evaluator import Prediction, evaluate
from coprs_deploy.evaluation.protocols import TARGETS
from coprs_deploy.evaluation.report import LISTED_FAILURES, EvaluatedDataset, write_report
from coprs_deploy.evaluation.summary import summarize_dataset


def test_report_has_the_protocol_metrics_groups_failed_rows_and_the_plot(tmp_path):
    dataset = open_examples("synthetic:full", 30, 1)
    rows = evaluate(
        lambda batch: [Prediction(each.masks, each.masks, "text") for each in batch],
        dataset.examples,
    )
    rows = [structs.replace(row, error="PolicyError: a|b") for row in rows[:25]] + rows[25:]
    summary = summarize_dataset(rows, TARGETS)
    folder = tmp_path / "scenes"
    folder.mkdir()
    found = EvaluatedDataset(dataset.description, folder, TARGETS, rows, summary)
    write_report(tmp_path, "Evaluation", [found])
    page = (tmp_path / "report.md").read_text()
    assert f"## {dataset.description}" in page
    assert "Protocol `targets`; 31 instructions on 31 images, 25 failed" in page
    assert f"| giou | {5 / 30:.4f} |" in page
    assert f"| 0 | {rows[0].id} | PolicyError: a\\|b |" in page
    assert f"And {25 - LISTED_FAILURES} more." in page
    assert "| question type | rows |" in page and "| object size | rows |" in page
    assert "![IoU of the prior against IoU of the mask](scenes/prior_against_mask.png)" in page
    assert (folder / "prior_against_mask.png").is_file()
