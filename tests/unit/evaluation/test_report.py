"""Files of an evaluation."""

import json

from coprs_deploy.data.sources import open_examples
from coprs_deploy.evaluation.evaluator import Prediction, evaluate
from coprs_deploy.evaluation.report import metric_table, write_evaluation


def test_write_evaluation_writes_page_predictions_and_plot(tmp_path):
    dataset = open_examples("synthetic:full", 3, 1)
    evaluated = evaluate(
        lambda batch: [Prediction(each.masks, each.masks, "text") for each in batch],
        dataset.examples,
    )
    write_evaluation(tmp_path / "out", dataset.description, evaluated)
    page = (tmp_path / "out/report.md").read_text()
    assert f"# {dataset.description}" in page
    assert "| giou | 1.0000 |" in page
    lines = (tmp_path / "out/predictions.jsonl").read_text().splitlines()
    assert len(lines) == 4
    assert json.loads(lines[0])["mask_iou"] == 1
    assert json.loads(lines[0])["question_type"] == dataset.examples[0].question_type
    assert (tmp_path / "out/prior_against_mask.png").is_file()


def test_metric_table_has_one_row_per_question_type():
    lines = metric_table({"giou": 0.5, "pearson_r": 0.25, "relation.giou": 0.75, "two.giou": 1.0})
    assert lines == [
        "| metric | value |",
        "|---|---|",
        "| giou | 0.5000 |",
        "| pearson_r | 0.2500 |",
        "",
        "| question type | giou |",
        "|---|---|",
        "| relation | 0.7500 |",
        "| two | 1.0000 |",
    ]


def test_metric_table_keeps_a_question_type_with_a_dot_whole():
    lines = metric_table({"giou": 0.5, "v1.2.giou": 0.75})
    assert lines[-3:] == ["| question type | giou |", "|---|---|", "| v1.2 | 0.7500 |"]
