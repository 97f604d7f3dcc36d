"""Metrics on scores made by hand."""

import numpy as np
import pytest

from coprs_deploy.evaluation.metrics import (
    ciou,
    count_pixels,
    giou,
    iou,
    pearson_r,
    precision_at,
    standard_error,
    union,
)
from coprs_deploy.evaluation.protocols import TARGETS
from coprs_deploy.evaluation.rows import EvaluationRow, MaskCounts
from coprs_deploy.evaluation.summary import measure, row_iou, summarize


def score(question_type, mask, prior=(1, 1), num_targets=1, num_found=1, extra=None):
    return EvaluationRow(
        index=0,
        id="x",
        question_type=question_type,
        num_targets=num_targets,
        num_found=num_found,
        mask=MaskCounts(*mask, 0, 0),
        prior=MaskCounts(*prior, 0, 0),
        extra=extra or {},
    )


def test_count_pixels_of_two_masks_returns_intersection_and_union():
    one, other = np.zeros((4, 4), bool), np.zeros((4, 4), bool)
    one[:2], other[1:3] = True, True
    counts = count_pixels(one, other)
    assert counts == MaskCounts(4, 12, 8, 8)
    assert iou(counts, empty=0) == pytest.approx(1 / 3)
    assert iou(count_pixels(one, one), empty=0) == 1
    assert iou(count_pixels(one, ~one), empty=1) == 0


@pytest.mark.parametrize("empty", [0.0, 1.0])
def test_iou_of_empty_masks_is_the_value_of_the_protocol(empty):
    nothing = np.zeros((4, 4), bool)
    counts = count_pixels(nothing, nothing)
    assert iou(counts, empty=empty) == empty
    assert ciou([counts], empty=empty) == empty
    assert giou([counts, MaskCounts(1, 1, 1, 1)], empty=empty) == (1 + empty) / 2
    assert precision_at([counts], 0.5, empty=empty) == empty


def test_row_of_empty_masks_has_iou_0():
    nothing = score("none", (0, 0), (0, 0), num_targets=0, num_found=0)
    assert row_iou(nothing, TARGETS) == row_iou(nothing, TARGETS, "prior") == 0


def test_union_merges_masks_and_is_empty_without_masks():
    masks = np.zeros((2, 2, 3), bool)
    masks[0, 0, 0] = masks[1, 1, 2] = True
    assert union(masks).sum() == 2
    assert union(masks[:0]).shape == (2, 3)
    assert not union(masks[:0]).any()


def test_summarize_distinguishes_giou_and_ciou():
    metrics = summarize([score("a", (9, 10)), score("b", (0, 90))])
    assert metrics["giou"] == pytest.approx(0.45)
    assert metrics["ciou"] == pytest.approx(0.09)
    assert metrics["precision_at_50"] == pytest.approx(0.5)
    assert metrics["a.giou"] == pytest.approx(0.9)
    assert metrics["b.precision_at_50"] == 0


def test_precision_at_excludes_the_threshold_itself():
    assert summarize([score("a", (5, 10))])["precision_at_50"] == 0
    counts = [MaskCounts(5, 10, 10, 5), MaskCounts(8, 10, 10, 8)]
    assert precision_at(counts, 0.7, empty=0) == 0.5
    assert precision_at(counts, 0.8, empty=0) == 0


def test_summarize_counts_no_match_examples_for_no_match_metrics_only():
    scores = [
        score("a", (8, 10)),
        score("none", (0, 0), num_targets=0, num_found=0),
        score("none", (0, 5), num_targets=0, num_found=1),
        score("a", (0, 10), num_found=0),
    ]
    metrics = summarize(scores)
    assert metrics["giou"] == pytest.approx(0.4)
    assert metrics["no_match_recall"] == 0.5
    assert metrics["no_match_precision"] == 0.5
    assert "none.giou" not in metrics


def test_summarize_averages_extra_metrics_over_examples_with_a_target():
    scores = [
        score("a", (8, 10), extra={"exact_match": 1.0}),
        score("b", (8, 10), extra={"exact_match": 0.0}),
        score("none", (0, 0), num_targets=0, num_found=0, extra={"exact_match": 1.0}),
    ]
    metrics = summarize(scores)
    assert metrics["exact_match"] == 0.5
    assert metrics["a.exact_match"] == 1
    assert measure(scores[1:2], TARGETS)["exact_match"].value == 0


def test_undefined_metrics_are_left_out():
    assert summarize([]) == {}
    assert measure([], TARGETS) == {}
    assert pearson_r([0.5, 0.5], [0.1, 0.9]) is None
    assert pearson_r([0.1], [0.1]) is None


def test_summarize_correlates_prior_and_mask():
    scores = [score("a", (i, 10), (i, 20)) for i in range(1, 6)]
    assert summarize(scores)["pearson_r"] == pytest.approx(1)


def test_standard_error_is_that_of_the_mean():
    values = [0.2, 0.4, 0.9, 0.5]
    assert standard_error(values) == pytest.approx(np.std(values, ddof=1) / 2)
    assert np.isnan(standard_error([0.3]))
