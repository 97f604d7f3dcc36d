"""Accuracy of masks against float32 and the ground truth."""

import numpy as np

from coprs_deploy.bench.accuracy import compare_masks, evaluate_masks, mask_agreement
from coprs_deploy.bench.case import OUTPUT_FILE, write_arrays


def mask(*columns):
    found = np.zeros((4, 8), dtype=np.bool_)
    found[:, list(columns)] = True
    return found


GROUND_TRUTH = {"0.ground_truth": mask(0, 1), "1.ground_truth": mask(4, 5, 6, 7)}
FLOAT32 = {"0.mask": mask(0, 1), "1.mask": mask(4, 5, 6), **GROUND_TRUTH}


def test_compare_masks_with_float32_and_ground_truth():
    worse = {"0.mask": mask(0), "1.mask": mask(4), **GROUND_TRUTH}
    same = compare_masks(FLOAT32, FLOAT32, True, "")
    assert same.mask_iou_mean == same.mask_iou_min == 1
    assert same.giou == (1 + 3 / 4) / 2
    assert same.precision_at_50 == 1
    found = compare_masks(worse, FLOAT32, True, "a note")
    assert found.mask_iou_mean == (1 / 2 + 1 / 3) / 2
    assert found.mask_iou_min == 1 / 3
    assert found.giou == (1 / 2 + 1 / 4) / 2
    assert found.precision_at_50 == 0
    assert (found.inputs, found.note) == (2, "a note")


def test_compare_masks_of_fewer_questions_counts_those():
    found = compare_masks({"0.mask": mask(0, 1)}, FLOAT32, True, "")
    assert (found.inputs, found.mask_iou_mean, found.giou) == (1, 1, None)


def test_compare_masks_without_ground_truth_and_float32_gives_none():
    found = compare_masks(FLOAT32, None, False, "")
    assert (found.inputs, found.mask_iou_mean, found.giou) == (2, None, None)


def test_empty_masks_agree_with_float32_but_miss_the_ground_truth():
    assert mask_agreement(mask(), mask()) == 1
    assert mask_agreement(mask(), mask(3)) == 0
    empty = {"0.mask": mask(), "0.ground_truth": mask()}
    found = compare_masks(empty, empty, True, "")
    assert (found.mask_iou_mean, found.giou) == (1, 0)


def test_evaluate_masks_skips_cases_without_outputs(tmp_path):
    outputs = {name: tmp_path / name for name in ("requests", "imports")}
    for folder in outputs.values():
        folder.mkdir()
    write_arrays(outputs["requests"] / OUTPUT_FILE, FLOAT32)
    places = {name: str(folder) for name, folder in outputs.items()}
    found = evaluate_masks(places, has_gt=True, reference="requests")
    assert list(found) == ["requests"]
    assert found["requests"]["mask_iou_mean"] == 1
