"""Quality of the reasoning against IoU."""

import json

import pytest
from msgspec import structs

from coprs_deploy.evaluation.judge import WEIGHTS, JudgeSettings
from coprs_deploy.evaluation.reports.reasoning_quality import judge_lines, rate_datasets
from coprs_deploy.evaluation.summary import row_iou
from tests.unit.evaluation.judge_server import answer, judge_server
from tests.unit.evaluation.report_samples import make_dataset


def falling(_, request):
    """Score object N with 1 - N / 10."""
    text = request["body"]["messages"][0]["content"][0]["text"]
    number = int(text.rpartition("*object* ")[2].partition(" ")[0])
    return answer(json.dumps(dict.fromkeys(WEIGHTS, 1 - number / 10)))


def rate(dataset, directory, script=falling, rows=None, **settings):
    with judge_server(script) as (url, requests):
        pairs = [(dataset.task, dataset.rows if rows is None else rows)]
        found, report = rate_datasets(directory, pairs, JudgeSettings(url, "m", **settings))
    return found, report, requests


def test_rate_datasets_correlates_quality_with_both_ious(tmp_path):
    dataset = make_dataset(tmp_path, 6, 2)
    found, report, requests = rate(dataset, tmp_path)
    assert len(requests) == report.num_scored == 6  # no-match rows have no IoU to compare with
    quality = found["synthetic:full"]
    assert [score.quality for score in quality.scores] == pytest.approx(
        [1, 0.9, 0.8, 0.7, 0.6, 0.5]
    )
    protocol = dataset.task.protocol
    assert quality.mask_iou == [row_iou(row, protocol) for row in dataset.rows[:6]]
    assert quality.prior_iou == [row_iou(row, protocol, "prior") for row in dataset.rows[:6]]
    shown = quality.to_json()
    assert shown["quality"] == pytest.approx(0.75)
    assert shown["pearson_r_mask_iou"] > 0.5


def test_rate_datasets_rates_a_spread_of_rows_without_failed_and_silent_ones(tmp_path):
    dataset = make_dataset(tmp_path, 9, 0)
    rows = list(dataset.rows)
    rows[0] = structs.replace(rows[0], error="E: x")
    rows[1] = structs.replace(rows[1], response="<think> </think><REF_POS>")
    found, report, _ = rate(dataset, tmp_path, rows=rows, num_examples=3)
    qualities = [score.quality for score in found["synthetic:full"].scores]
    assert qualities == pytest.approx([0.8, 0.6, 0.4])  # of objects 2, 4 and 6
    assert report.num_examples == 3


def test_rate_datasets_without_scores_has_no_quality(tmp_path):
    dataset = make_dataset(tmp_path, 2, 0)
    found, report, _ = rate(dataset, tmp_path, lambda n, r: answer(None, refusal="no"))
    assert found == {}
    text = "\n".join(judge_lines(report))
    assert "0 of 2 reasonings rated" in text
    assert "| refusal | 2 | no |" in text


def test_judge_lines_have_weights_tokens_and_cost(tmp_path):
    _, report, _ = rate(make_dataset(tmp_path, 2, 0), tmp_path, prices=(1e6, 0))
    text = "\n".join(judge_lines(report))
    assert "200 prompt tokens and 20 completion tokens, 200.00 at the given prices." in text
    assert "0.3 logical correctness, 0.2 task relevance, 0.3 visual consistency" in text
