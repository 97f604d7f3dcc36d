"""ReasonSeg in the layout of LISA."""

import json
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coprs_deploy.data.readers.polygon_fill import fill_polygon
from coprs_deploy.data.readers.reasonseg import ReasonSegExamples, Shape, paint_shapes
from coprs_deploy.errors import ArtifactError
from tests.unit.data.readers.layouts import HEIGHT, WIDTH, painted, write_image


def corners(x0, y0, x1, y1):
    """Return the points whose polygon covers the pixels x0..x1-1, y0..y1-1, rim included."""
    return [[x0, y0], [x1 - 1, y0], [x1 - 1, y1 - 1], [x0, y1 - 1]]


def add(root, stem, text, shapes, *, split="val", is_sentence=True, encoding="utf-8"):
    """Write an image and its annotation; shapes are pairs of label and points."""
    folder = root / "ReasonSeg" / split
    write_image(folder / f"{stem}.jpg", len(stem))
    annotation = {
        "text": text,
        "is_sentence": is_sentence,
        "shapes": [
            {"label": label, "points": points, "shape_type": "polygon", "group_id": None}
            for label, points in shapes
        ],
    }
    content = json.dumps(annotation, ensure_ascii=False).encode(encoding)
    (folder / f"{stem}.json").write_bytes(content)


def test_reasonseg_paints_one_target_and_an_ignore_mask(tmp_path):
    large, ignored, small = (2, 2, 30, 22), (5, 5, 25, 20), (8, 8, 12, 12)
    shapes = [("target", corners(*small)), ("Ignore_1", corners(*ignored))]
    shapes += [("flag", corners(0, 0, 32, 24)), ("target", corners(*large))]
    add(tmp_path, "1_a", ["what holds the tea?"], shapes)
    (example,) = ReasonSegExamples(tmp_path, "val")
    hole = painted(ignored) & ~painted(small)
    np.testing.assert_array_equal(example.masks, [painted(large) & ~hole])
    np.testing.assert_array_equal(example.ignore_mask, hole)
    assert example.instruction == "what holds the tea?"
    assert (example.id, example.question_type, example.response) == ("1_a-0", "long", "")


def test_reasonseg_without_ignored_shapes_has_no_ignore_mask(tmp_path):
    add(tmp_path, "1", ["cup"], [("target", corners(2, 2, 9, 9))], is_sentence=False)
    add(tmp_path, "2", ["dog"], [("FLAG", corners(2, 2, 9, 9))], is_sentence=False)
    found = ReasonSegExamples(tmp_path, "val")
    assert [example.ignore_mask for example in found] == [None, None]
    assert [len(example.masks) for example in found] == found.num_targets == [1, 0]
    assert found.question_types == ["short", "short"]


def test_reasonseg_train_has_all_queries_and_evaluation_the_first(tmp_path):
    for split in ("train", "val", "test"):
        add(tmp_path, "1", ["a", "b", "c"], [("target", corners(2, 2, 9, 9))], split=split)
    counts = {split: len(ReasonSegExamples(tmp_path, split)) for split in ("train", "val", "test")}
    assert counts == {"train": 3, "val": 1, "test": 1}
    assert len(ReasonSegExamples(tmp_path, "val", first_sentences=False)) == 3
    assert len(ReasonSegExamples(tmp_path, "train", first_sentences=True)) == 1


@pytest.mark.parametrize("encoding", ["utf-8", "cp1252"])
def test_reasonseg_reads_both_encodings(tmp_path, encoding):
    query = "the café’s menu"  # noqa: RUF001
    add(tmp_path, "1", [query], [("target", corners(2, 2, 9, 9))], encoding=encoding)
    (example,) = ReasonSegExamples(tmp_path, "val")
    assert example.instruction == query


def test_reasonseg_explanatory_has_the_query_and_response_of_the_explanation(tmp_path):
    for stem in ("1", "2"):
        add(tmp_path, stem, ["cup"], [("target", corners(2, 2, 9, 9))], split="train")
    path = tmp_path / "ReasonSeg/explanatory/train.json"
    path.parent.mkdir()
    items = [{"image": "2.jpg", "query": "why the cup?", "outputs": "Tea is hot. "}]
    items.append({"image": "9.jpg", "query": "lost", "outputs": "-"})
    path.write_text(json.dumps(items))
    found = ReasonSegExamples(tmp_path, "explanatory")
    (example,) = found
    assert (example.id, example.instruction) == ("2-0", "why the cup?")
    assert example.response == "<think>Tea is hot.</think> <REF_POS>"
    np.testing.assert_array_equal(example.masks, [painted((2, 2, 9, 9))])
    assert [(each.row, each.reason.partition(" ")[0]) for each in found.problems] == [(2, "9.json")]
    path.write_text("[{}]")
    with pytest.raises(ArtifactError, match=r"not a list of explanations.*`image`"):
        ReasonSegExamples(tmp_path, "explanatory")


@pytest.mark.parametrize("folder", ["ReasonSeg", "reason_seg/ReasonSeg", ""])
def test_reasonseg_finds_its_folder_below_the_root(tmp_path, folder):
    add(tmp_path, "1", ["cup"], [("target", corners(2, 2, 9, 9))])
    root = tmp_path / "root"
    (root / folder).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "ReasonSeg").rename(root / folder)
    assert len(ReasonSegExamples(root, "val")) == 1


def test_reasonseg_without_its_folder_says_where_it_looked(tmp_path):
    (tmp_path / "ReasonSeg/val").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"val \(no JSON files\), .* \(no such folder\)"):
        ReasonSegExamples(tmp_path, "val")
    with pytest.raises(ValueError, match="split is 'testA'; accepted: train, val, test, expl"):
        ReasonSegExamples(tmp_path, "testA")


def test_reasonseg_annotations_that_cannot_be_read_are_problems(tmp_path):
    shapes = [("target", corners(2, 2, 9, 9))]
    for stem in "abcdef":
        add(tmp_path, stem, ["cup"], shapes)
    folder = tmp_path / "ReasonSeg/val"
    (folder / "b.json").write_text('{"text": ["x"]')
    (folder / "c.json").write_text('{"text": [], "shapes": []}')
    (folder / "d.json").write_text('{"text": ["x"], "shapes": [{"label": "t", "points": []}]}')
    add(tmp_path, "d2", ["cup"], [("target", [[0, 0], [1e12, 0]])])
    (folder / "e.json").unlink()
    (folder / "f.jpg").unlink()
    found = ReasonSegExamples(tmp_path, "val")
    assert [(problem.row, problem.column) for problem in found.problems] == [
        (2, ""),
        (3, "text"),
        (4, "shapes"),
        (5, "shapes"),
    ]
    assert found.images.missing == ["f.jpg"]
    assert (len(found), found.num_images, found.num_rows) == (2, 6, 6)


def test_reasonseg_can_be_pickled_and_names_its_images(tmp_path):
    add(tmp_path, "77_x", ["cup"], [("target", corners(2, 2, 9, 9))])
    found = pickle.loads(pickle.dumps(ReasonSegExamples(tmp_path, "val")))
    assert found[0].masks.sum() == 49
    assert found.image_name(0) == "77_x"
    assert found.image_file(0) == tmp_path / "ReasonSeg/val/77_x.jpg"


points = st.lists(
    st.tuples(st.floats(-8, WIDTH + 8, width=32), st.floats(-8, HEIGHT + 8, width=32)),
    min_size=1,
    max_size=9,
)
labels = st.sampled_from(["target", "ignore", "Ignore2", "flag", "Flag", "flagged"])


@pytest.mark.fuzz
@given(st.lists(st.tuples(labels, points), max_size=6))
def test_shapes_are_painted_in_the_order_that_lisa_publishes(shapes):
    kept = [pair for pair in shapes if pair[0].lower() != "flag"]
    areas = [int(fill_polygon(each, HEIGHT, WIDTH).sum()) for _, each in kept]
    expected = np.zeros((HEIGHT, WIDTH), np.uint8)
    for index in np.argsort(areas, kind="stable")[::-1]:
        label, each = kept[index]
        value = 255 if "ignore" in label.lower() else 1
        expected[fill_polygon(each, HEIGHT, WIDTH)] = value
    found = paint_shapes([Shape(label, each) for label, each in shapes], HEIGHT, WIDTH)
    np.testing.assert_array_equal(found, expected)
