"""Choice and drawing of the examples that a report shows."""

import numpy as np
import pytest
from PIL import Image

from coprs_deploy.evaluation.protocols import TARGETS
from coprs_deploy.evaluation.reports.galleries import (
    PANELS,
    choose_examples,
    draw_gallery,
    draw_panels,
    prior_map,
)
from coprs_deploy.evaluation.rows import EvaluationRow, MaskCounts
from tests.unit.evaluation.report_samples import make_dataset, segment


def row(index, iou, *, image="", area=50_000, same=None, **others):
    """Return a row with an IoU in hundredths."""
    counts = MaskCounts(iou, 100, iou, area)
    settings = {"num_targets": 1, "num_found": 1, "mask": counts, "prior": counts, **others}
    return EvaluationRow(index=index, id=str(index), image=image, num_same_class=same, **settings)


def chosen(rows):
    found = choose_examples(rows, TARGETS)
    return {name: [each.index for each in group] for name, group in found.items()}


def test_choose_examples_best_median_and_worst_are_disjoint():
    rows = [row(index, iou) for index, iou in enumerate([50, 90, 10, 70, 30, 80, 20, 60, 40])]
    assert chosen(rows) == {"best": [1, 5, 3], "median": [0, 8, 7], "worst": [2, 6, 4]}


def test_choose_examples_failure_groups():
    rows = [row(index, 50 + index) for index in range(20)]
    rows += [row(20 + n, 40 + n, area=100 + n) for n in range(3)]
    rows += [row(30 + n, 45 - n, same=3 + n) for n in range(2)] + [row(40, 49, same=2)]
    found = chosen(rows)
    assert found["worst"] == [20, 21, 22]
    assert "small" not in found  # they are among the worst already
    assert found["crowd"] == [31, 30]


def test_choose_examples_prefers_different_images():
    rows = [row(index, 90 - index, image=f"{index // 3}.jpg") for index in range(12)]
    assert chosen(rows)["best"] == [0, 3, 6]
    assert chosen([row(index, 90 - index, image="a.jpg") for index in range(3)])["best"] == [
        0,
        1,
        2,
    ]


def test_choose_examples_leaves_out_no_match_and_failed_rows():
    rows = [row(0, 50, area=0), row(1, 50, error="E: x"), row(2, 50, mask=None)]
    assert chosen(rows) == {}
    assert chosen([*rows, row(3, 50)]) == {"best": [3]}
    assert chosen([]) == {}


def test_draw_gallery_draws_once_and_again_for_another_row(tmp_path):
    dataset = make_dataset(tmp_path, 2, 0)
    calls = []

    def counting(*arguments):
        calls.append(arguments)
        return segment(*arguments)

    first = draw_gallery(tmp_path, dataset.rows, dataset.task, lambda: counting)
    assert [set(each.panels) for each in first] == [set(PANELS)] * 2
    assert calls[0][1:] == (dataset.rows[0].instruction, dataset.task.max_targets)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.webp")}
    draw_gallery(tmp_path, dataset.rows, dataset.task, lambda: counting)
    assert len(calls) == 2
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.webp")} == times
    other = make_dataset(tmp_path, 3, 0).rows[2:]
    draw_gallery(tmp_path, other, make_dataset(tmp_path, 3, 0).task, lambda: counting)
    assert len(calls) == 3


def test_draw_panels_shows_the_masks_of_the_row_and_the_ground_truth(tmp_path):
    dataset = make_dataset(tmp_path, 1, 0)
    example = dataset.task.examples[0]
    prior = np.zeros(example.image.shape[:2], np.float32)
    panels = draw_panels(example, dataset.rows[0], prior)
    assert list(panels) == list(PANELS)
    assert {max(panel.size) for panel in panels.values()} == {280}
    same = np.asarray(panels["mask"]), np.asarray(panels["ground_truth"])
    assert np.array_equal(*same)  # the first row has the masks of the ground truth
    empty = draw_panels(example, EvaluationRow(**{**row(0, 0).to_json(), "mask": None}), None)
    assert "prior" not in empty
    assert np.abs(np.asarray(empty["mask"], int) - np.asarray(empty["image"], int)).mean() < 12


def test_prior_map_is_the_largest_of_all_targets():
    logits = np.array([[[-9.0, 0.0]], [[9.0, -9.0]]], np.float32)
    assert prior_map(logits, (1, 2)) == pytest.approx(np.array([[1, 0.5]]), abs=2e-4)
    assert prior_map(logits[:0], (1, 2)).tolist() == [[0, 0]]


def test_panels_are_images(tmp_path):
    dataset = make_dataset(tmp_path, 1, 0)
    (example,) = draw_gallery(tmp_path, dataset.rows, dataset.task, lambda: segment)
    for path in example.panels.values():
        with Image.open(path) as image:
            assert image.format == "WEBP"
