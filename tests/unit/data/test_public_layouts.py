"""Examples written in public layouts: what the readers and public code find there."""

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from coprs_deploy.data.public_layouts import LAYOUTS, write_layout
from coprs_deploy.data.readers.registry import SourceOptions, open_source
from coprs_deploy.data.synthetic import FULL, SceneExamples
from coprs_deploy.data.synthetic.examples import with_question_types
from coprs_deploy.errors import ArtifactError


@pytest.fixture(scope="module")
def examples():
    """Scenes with a target, with several, and without one."""
    kinds = [("attribute", 3), ("several", 3), ("none", 2)]
    presets = [(with_question_types(FULL, {name: 1.0}), count) for name, count in kinds]
    found = [example for preset, count in presets for example in SceneExamples(preset, count)]
    assert {0, 1, 2} <= {len(example.masks) for example in found}
    return found


@pytest.fixture
def written(request, examples, tmp_path):
    layout = request.param
    source = write_layout(tmp_path / "root", layout, examples, "val")
    return layout, open_source(source, SourceOptions(tmp_path / "root"))


each_layout = pytest.mark.parametrize("written", LAYOUTS, indirect=True)


@each_layout
def test_write_layout_gives_the_reader_the_same_pixels_and_sentences(written, examples):
    layout, found = written
    assert (len(found), found.problems) == (len(examples), ())
    for example, read in zip(examples, found, strict=True):
        np.testing.assert_array_equal(read.image, example.image)
        assert read.instruction == example.instruction
        assert read.ignore_mask is None
        if layout == "grefcoco":
            np.testing.assert_array_equal(read.masks, example.masks)
        else:
            merged = example.masks.any(axis=0)
            np.testing.assert_array_equal(read.masks, merged[None][: int(merged.any())])


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools
@pytest.mark.parametrize("written", ["refer"], indirect=True)
def test_refer_layout_is_what_public_code_reads(written, examples, tmp_path):
    root = tmp_path / "root"
    references = pickle.loads((root / "refcoco" / "refs(unc).p").read_bytes())
    instances = json.loads((root / "refcoco" / "instances.json").read_text())
    ids = {"ref_id", "ann_id", "image_id", "category_id", "sent_ids"}
    annotations = {each["id"]: each for each in instances["annotations"]}
    names = {each["id"]: each["file_name"] for each in instances["images"]}
    for reference, example in zip(references, examples, strict=True):
        assert set(reference) == ids | {"split", "file_name", "sentences"}
        assert set(reference["sentences"][0]) == {"sent_id", "sent", "raw", "tokens"}
        # The public code encodes the counts of each RLE in a list and takes their sum.
        rle = [
            {**each, "counts": each["counts"].encode()}
            for each in annotations[reference["ann_id"]]["segmentation"]
        ]
        shape = example.image.shape[:2]
        mask = np.sum(coco.decode(rle), axis=2) if rle else np.zeros(shape)
        np.testing.assert_array_equal(mask, example.masks.any(axis=0))
        name = names[reference["image_id"]]
        assert reference["file_name"] != name
        path = root / "images/mscoco/images/train2014" / name
        np.testing.assert_array_equal(np.array(Image.open(path)), example.image)


@pytest.mark.parametrize("written", ["grefcoco"], indirect=True)
def test_grefcoco_layout_marks_what_has_no_target(written, examples, tmp_path):
    references = json.loads((tmp_path / "root/grefcoco/grefs(unc).json").read_text())
    for reference, example in zip(references, examples, strict=True):
        assert reference["no_target"] is (not len(example.masks))
        assert len(reference["ann_id"]) == max(1, len(example.masks))
        assert (reference["ann_id"] == [-1]) is reference["no_target"]


@each_layout
def test_written_images_are_read_by_their_content(written, tmp_path):
    for path in tmp_path.rglob("*.jpg"):
        with Image.open(path) as image:
            assert image.format == "PNG"


def test_write_layout_replaces_nothing(examples, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="choose another name"):
        write_layout(tmp_path, "refer", examples, "val")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_write_layout_refuses_what_it_cannot_keep(examples, tmp_path):
    ignored = np.ones(examples[0].image.shape[:2], dtype=bool)
    with pytest.raises(ValueError, match="ignore mask"):
        write_layout(tmp_path / "a", "refer", [replace(examples[0], ignore_mask=ignored)], "val")
    with pytest.raises(ValueError, match="accepted: refer, grefcoco, reasonseg, parquet"):
        write_layout(tmp_path / "a", "coco", examples, "val")
    assert not list(tmp_path.iterdir())
