"""Rows judged by the masks of their answers."""

import numpy as np

from coprs_deploy.benchmarks.arrays import OUTPUT_FILE, write_arrays
from coprs_deploy.benchmarks.mask_judge import judge_masks, mask_agreement, read_masks


def mask(*columns):
    found = np.zeros((4, 8), dtype=np.bool_)
    found[:, list(columns)] = True
    return found


TRUTH = {"0.truth": mask(0, 1), "1.truth": mask(4, 5, 6, 7)}
FLOAT32 = {"0.mask": mask(0, 1), "1.mask": mask(4, 5, 6), **TRUTH}


def test_masks_are_compared_with_float32_and_with_the_truth():
    worse = {"0.mask": mask(0), "1.mask": mask(4), **TRUTH}
    judged = judge_masks({"same": FLOAT32, "worse": worse}, FLOAT32, has_truth=True)
    assert judged["same"].mask_iou == judged["same"].mask_iou_worst == 1
    assert judged["same"].truth_iou == (1 + 3 / 4) / 2
    assert judged["same"].precision_at_half == 1
    assert judged["worse"].mask_iou == (1 / 2 + 1 / 3) / 2
    assert judged["worse"].mask_iou_worst == 1 / 3
    assert judged["worse"].truth_iou == (1 / 2 + 1 / 4) / 2
    assert judged["worse"].precision_at_half == 0
    assert judged["worse"].inputs == 2


def test_a_row_may_have_answered_fewer_questions():
    judged = judge_masks({"one": {"0.mask": mask(0, 1)}}, FLOAT32, has_truth=True)["one"]
    assert (judged.inputs, judged.mask_iou, judged.truth_iou) == (1, 1, None)


def test_random_weights_have_no_truth_and_a_lone_bundle_no_float32():
    judged = judge_masks({"row": FLOAT32}, None, has_truth=False)["row"]
    assert (judged.inputs, judged.mask_iou, judged.truth_iou) == (2, None, None)


def test_nothing_agrees_with_nothing_only():
    assert mask_agreement(mask(), mask()) == 1
    assert mask_agreement(mask(), mask(3)) == 0


def test_rows_that_left_no_masks_are_not_judged(tmp_path):
    rows = {name: tmp_path / name for name in ("answers", "imports")}
    for folder in rows.values():
        folder.mkdir()
    write_arrays(rows["answers"] / OUTPUT_FILE, FLOAT32)
    found = read_masks(rows)
    assert list(found) == ["answers"]
    assert all(np.array_equal(found["answers"][key], FLOAT32[key]) for key in FLOAT32)
