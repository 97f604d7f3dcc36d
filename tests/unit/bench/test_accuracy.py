"""Accuracy of masks against float32 and the ground truth."""

import numpy as np

from coprs_deploy.bench.accuracy import SceneReference, mask_agreement, scenes
from coprs_deploy.bench.case import write_arrays


def mask(*columns):
    found = np.zeros((4, 8), dtype=np.bool_)
    found[:, list(columns)] = True
    return found


GROUND_TRUTH = {"0.ground_truth": mask(0, 1), "1.ground_truth": mask(4, 5, 6, 7)}
FLOAT32 = {"0.mask": mask(0, 1), "1.mask": mask(4, 5, 6), **GROUND_TRUTH}


def compare(tmp_path, found, expected, has_gt=True, note=""):
    file = None if expected is None else tmp_path / "expected.safetensors"
    if file is not None:
        write_arrays(file, expected)
    return SceneReference(file, has_gt, note).accuracy(found)


def test_masks_are_compared_with_float32_and_ground_truth(tmp_path):
    worse = {"0.mask": mask(0), "1.mask": mask(4), **GROUND_TRUTH}
    same = compare(tmp_path, FLOAT32, FLOAT32)
    assert same.mask_iou_mean == same.mask_iou_min == 1
    assert same.giou == (1 + 3 / 4) / 2
    assert same.precision_at_50 == 1
    found = compare(tmp_path, worse, FLOAT32, note="a note")
    assert found.mask_iou_mean == (1 / 2 + 1 / 3) / 2
    assert found.mask_iou_min == 1 / 3
    assert found.giou == (1 / 2 + 1 / 4) / 2
    assert found.precision_at_50 == 0
    assert (found.inputs, found.note) == (2, "a note")


def test_masks_of_fewer_scenes_count_those(tmp_path):
    fewer = {"0.mask": mask(0, 1), "0.ground_truth": mask(0, 1)}
    found = compare(tmp_path, fewer, FLOAT32)
    assert (found.inputs, found.mask_iou_mean, found.giou) == (1, 1, 1)


def test_masks_without_float32_and_ground_truth_have_no_accuracy(tmp_path):
    found = compare(tmp_path, FLOAT32, None, has_gt=False)
    assert (found.inputs, found.mask_iou_mean, found.giou) == (2, None, None)


def test_empty_masks_agree_with_float32_but_miss_the_ground_truth(tmp_path):
    assert mask_agreement(mask(), mask()) == 1
    assert mask_agreement(mask(), mask(3)) == 0
    empty = {"0.mask": mask(), "0.ground_truth": mask()}
    found = compare(tmp_path, empty, empty)
    assert (found.mask_iou_mean, found.giou) == (1, 0)


def test_concentrations_have_the_smallest_cosine_of_scenes_with_equally_many(tmp_path):
    def values(*vectors):
        arrays = [np.array(each, np.float32).reshape(-1, 2) for each in vectors]
        concentrations = {f"{i}.concentration": each for i, each in enumerate(arrays)}
        return concentrations | {f"{i}.mask": mask(i) for i in range(len(vectors))}

    expected = values([[1, 0]], [[0, 2]], [])
    found = values([[1, 0]], [[3, 4]], [[1, 1]])
    accuracy = compare(tmp_path, found, expected, has_gt=False)
    np.testing.assert_allclose(accuracy.concentration_cosine, 0.8)


def test_scenes_enlarged_keep_instruction_and_target():
    (own,), (large,) = scenes(1), scenes(1, 512)
    assert large.image.shape == (512, 512, 3)
    assert large.masks.shape == (len(own.masks), 512, 512)
    assert large.instruction == own.instruction
    assert abs(large.masks.mean() - own.masks.mean()) < 0.01
