"""Figures over answers made by hand."""

import numpy as np
import pytest

from coprs_deploy.evaluation.metrics import (
    ExampleScore,
    MaskCounts,
    no_match_metrics,
    overlap,
    pearson_r,
    summarize,
    union,
)


def scored(kind, mask, prior=(1, 1), num_targets=1, num_found=1):
    return ExampleScore("x", kind, num_targets, num_found, MaskCounts(*mask), MaskCounts(*prior))


def test_an_overlap_counts_pixels():
    one, other = np.zeros((4, 4), bool), np.zeros((4, 4), bool)
    one[:2], other[1:3] = True, True
    found = overlap(one, other)
    assert found == MaskCounts(4, 12)
    assert found.iou == pytest.approx(1 / 3)
    assert overlap(one, one).iou == 1
    assert overlap(one, ~one).iou == 0
    nothing = np.zeros((4, 4), bool)
    assert overlap(nothing, nothing).iou == 0


def test_masks_are_joined_and_none_is_empty():
    masks = np.zeros((2, 2, 3), bool)
    masks[0, 0, 0] = masks[1, 1, 2] = True
    assert union(masks).sum() == 2
    assert union(masks[:0]).shape == (2, 3)
    assert not union(masks[:0]).any()


def test_the_mean_and_the_cumulative_iou_differ():
    figures = summarize([scored("a", (9, 10)), scored("b", (0, 90))])
    assert figures["mask_iou"] == pytest.approx(0.45)
    assert figures["ciou"] == pytest.approx(0.09)
    assert figures["precision_at_50"] == pytest.approx(0.5)
    assert figures["a.mask_iou"] == pytest.approx(0.9)
    assert figures["b.precision_at_50"] == 0


def test_an_iou_of_one_half_is_not_above_it():
    assert summarize([scored("a", (5, 10))])["precision_at_50"] == 0


def test_questions_without_an_answer_count_as_refusals_only():
    answers = [
        scored("a", (8, 10)),
        scored("none", (0, 0), num_targets=0, num_found=0),
        scored("none", (0, 5), num_targets=0, num_found=1),
        scored("a", (0, 10), num_found=0),
    ]
    figures = summarize(answers)
    assert figures["mask_iou"] == pytest.approx(0.4)
    assert figures["no_match_recall"] == 0.5
    assert figures["no_match_precision"] == 0.5
    assert "none.mask_iou" not in figures


def test_what_nothing_decides_is_left_out():
    assert summarize([]) == {}
    assert no_match_metrics([1], [1]) == {}
    assert pearson_r([0.5, 0.5], [0.1, 0.9]) is None
    assert pearson_r([0.1], [0.1]) is None


def test_prior_and_mask_are_correlated():
    answers = [scored("a", (i, 10), (i, 20)) for i in range(1, 6)]
    assert summarize(answers)["pearson_r"] == pytest.approx(1)
