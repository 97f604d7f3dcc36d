"""Predictions as COCO results, read by pycocotools."""

import contextlib
import io
import json

import numpy as np
import pytest
from msgspec import structs
from pycocotools.coco import COCO

from coprs_deploy.data.rle import decode_mask
from coprs_deploy.evaluation.reports.coco_results import (
    IMAGES_FILE,
    RESULTS_FILE,
    write_coco_results,
)
from tests.unit.evaluation.report_samples import make_dataset


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_coco_results_are_read_by_pycocotools(tmp_path):
    dataset = make_dataset(tmp_path, 4, 1)
    rows = [structs.replace(row, image=f"{row.index}.jpg") for row in dataset.rows]
    write_coco_results(tmp_path, rows)
    with contextlib.redirect_stdout(io.StringIO()):
        images = COCO(str(tmp_path / IMAGES_FILE))
        results = images.loadRes(str(tmp_path / RESULTS_FILE))
    assert len(images.getImgIds()) == 5
    for row in rows:
        found = results.loadAnns(results.getAnnIds(imgIds=[row.index]))
        assert len(found) == len(row.masks)
        for annotation, mask in zip(found, row.masks, strict=True):
            expected = decode_mask(mask, *row.image_size)
            assert np.array_equal(results.annToMask(annotation), expected)
            assert annotation["area"] == expected.sum()
            assert annotation["score"] == 0.5
    (image,) = images.loadImgs([2])
    assert (image["file_name"], image["instruction"]) == ("2.jpg", rows[2].instruction)


def test_coco_results_row_without_a_size_is_left_out(tmp_path):
    dataset = make_dataset(tmp_path, 2, 0)
    failed = structs.replace(dataset.rows[0], image_size=None, masks=(), error="ArtifactError: x")
    write_coco_results(tmp_path, [failed, structs.replace(dataset.rows[1], scores=())])
    results = json.loads((tmp_path / RESULTS_FILE).read_text())
    assert {result["image_id"] for result in results} == {1}
    assert {result["score"] for result in results} == {1}
    assert len(json.loads((tmp_path / IMAGES_FILE).read_text())["images"]) == 1
