"""Instance files of COCO, with captions and without."""

import json
import pickle

import numpy as np
import pytest

from coprs_deploy.data.readers.coco import CocoExamples
from coprs_deploy.errors import ArtifactError, NoValidRowError
from tests.unit.data.readers.layouts import (
    BOXES,
    HEIGHT,
    WIDTH,
    painted,
    segmentation,
    write_image,
)


@pytest.fixture
def write(tmp_path):
    """Write annotations with two images beside the folder of the file; return the file's path."""

    def writer(annotations, folder="val2017", **others):
        for image_id in (7, 8):
            write_image(tmp_path / folder / f"{image_id:012d}.jpg", image_id)
        images = [
            {"id": i, "file_name": f"{i:012d}.jpg", "height": HEIGHT, "width": WIDTH}
            for i in (7, 8)
        ]
        categories = [{"id": 1, "name": "cup"}, {"id": 2, "name": "dog"}]
        numbered = [{"id": i, **each} for i, each in enumerate(annotations, start=1)]
        content = {"images": images, "annotations": numbered, "categories": categories, **others}
        path = tmp_path / "annotations/instances_val2017.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
        return path

    return writer


def annotation(image_id, form, category_id=1, **others):
    return {
        "image_id": image_id,
        "category_id": category_id,
        "segmentation": segmentation(form),
        **others,
    }


def test_categories_without_captions_are_instructions_and_crowds_are_ignored(write):
    path = write(
        [
            annotation(7, "polygon"),
            annotation(8, "polygon", 2),
            annotation(7, "compressed RLE", iscrowd=0),
            annotation(7, "uncompressed RLE", iscrowd=1),
        ]
    )
    cups, dog = CocoExamples(path)
    assert (cups.instruction, dog.instruction) == ("cup", "dog")
    expected = [painted(*BOXES[form]) for form in ("polygon", "compressed RLE")]
    np.testing.assert_array_equal(cups.masks, expected)
    np.testing.assert_array_equal(cups.ignore_mask, painted(*BOXES["uncompressed RLE"]))
    np.testing.assert_array_equal(dog.masks, [painted(*BOXES["polygon"])])
    assert dog.ignore_mask is None


def test_annotations_with_the_same_caption_on_an_image_are_one_example(write):
    path = write(
        [
            annotation(7, "polygon", caption="left of the tea"),
            annotation(7, "list of RLE", caption="left of the tea "),
            annotation(8, "polygon", caption="left of the tea"),
            annotation(7, "overlapping polygons", 2, caption="asleep"),
        ]
    )
    found = CocoExamples(path)
    assert [example.instruction for example in found] == ["left of the tea"] * 2 + ["asleep"]
    assert found.num_targets == [2, 1, 1]
    assert found.num_images == 2
    expected = [painted(*BOXES[form]) for form in ("polygon", "list of RLE")]
    np.testing.assert_array_equal(found[0].masks, expected)
    np.testing.assert_array_equal(found[2].masks, [painted(*BOXES["overlapping polygons"])])
    assert [found.image_name(index) for index in range(3)] == ["coco-7", "coco-8", "coco-7"]
    assert len({example.id for example in found}) == 3


@pytest.mark.parametrize("folder", ["val2017", "images/val2017", "images", "annotations", "."])
def test_images_are_found_beside_the_file_and_its_folder(write, folder):
    found = CocoExamples(write([annotation(7, "polygon")], folder))
    assert found.images.missing == []
    assert found[0].image.shape == (HEIGHT, WIDTH, 3)


def test_images_in_a_named_folder_are_found_there(write, tmp_path):
    path = write([annotation(7, "polygon")], "elsewhere")
    assert CocoExamples(path).images.missing == ["000000000007.jpg"]
    named = CocoExamples(path, image_folder=tmp_path / "elsewhere")
    assert named.image_file(0) == tmp_path / "elsewhere/000000000007.jpg"


def test_annotations_that_cannot_be_used_are_problems_with_their_number(write):
    path = write(
        [
            annotation(7, "polygon"),
            annotation(9, "polygon"),
            annotation(7, "empty list"),
            annotation(7, "polygon", 3),
            {"image_id": 7, "category_id": 1, "bbox": [1, 1, 4, 4]},
        ]
    )
    found = CocoExamples(path)
    assert (len(found), found.num_rows) == (1, 5)
    assert [(problem.row, problem.column) for problem in found.problems] == [
        (2, "image_id"),
        (3, "segmentation"),
        (4, "category_id"),
        (5, "segmentation"),
    ]
    assert "a bounding box is not a mask" in found.problems[3].reason


def test_captions_of_whole_images_are_refused_with_the_reason(write):
    path = write([{"image_id": 7, "caption": "A cup of tea."}])
    with pytest.raises(NoValidRowError, match="column segmentation: there is none; a bounding"):
        CocoExamples(path)


def test_polygon_that_covers_no_pixel_is_refused_when_it_is_read(write):
    path = write([annotation(7, "polygon") | {"segmentation": [[0.1, 0.1, 0.2, 0.1, 0.2, 0.2]]}])
    with pytest.raises(ArtifactError, match=r"val2017\.json, example 1, masks: annotation"):
        CocoExamples(path)[0]


def test_ids_that_are_text_are_refused_with_their_place(write):
    path = write([annotation("7", "polygon")])
    with pytest.raises(ArtifactError, match=r"Expected `int`, got `str` - at `\$\.annotations"):
        CocoExamples(path)


def test_coco_examples_can_be_pickled(write):
    found = pickle.loads(pickle.dumps(CocoExamples(write([annotation(7, "polygon")]))))
    np.testing.assert_array_equal(found[0].masks, [painted(*BOXES["polygon"])])


def test_captions_know_the_other_objects_of_the_class_of_their_targets(write):
    path = write(
        [
            annotation(7, "polygon", caption="left"),
            annotation(7, "compressed RLE", caption="right"),
            annotation(7, "uncompressed RLE", 2, caption="right"),
        ]
    )
    found = CocoExamples(path)
    assert [found.num_same_class(index) for index in range(len(found))] == [1, 1]
    assert found.files == (path,)
