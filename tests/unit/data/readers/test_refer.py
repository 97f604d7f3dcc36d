"""The REFER layouts: RefCOCO, RefCOCO+, RefCOCOg and gRefCOCO."""

import builtins
import collections
import contextlib
import json
import os
import pickle
import tracemalloc
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from coprs_deploy.data.examples import Example
from coprs_deploy.data.readers.pickles import read_plain_pickle
from coprs_deploy.data.readers.refer import ReferExamples, in_split
from coprs_deploy.data.rle import decode_segmentation
from coprs_deploy.data.selection import Selection
from coprs_deploy.errors import ArtifactError
from tests.unit.damage import Damaged, damages
from tests.unit.data.readers.layouts import (
    BOXES,
    HEIGHT,
    WIDTH,
    Refer,
    coco_name,
    compressed,
    painted,
    rectangle,
    uncompressed,
)

FORMS = list(BOXES)


@pytest.fixture
def refcoco(tmp_path):
    """One image and reference a form of segmentation, with two sentences each, all of train."""
    builder = Refer(tmp_path)
    for image_id, form in enumerate(FORMS, start=41):
        builder.refer(image_id, builder.annotate(image_id, form), "train", f"the {form}", "it")
    return builder


def test_refcoco_reads_every_sentence_with_the_mask_of_its_form(refcoco):
    found = ReferExamples(refcoco.write(), "refcoco", "train")
    assert len(found) == found.num_rows == 2 * len(FORMS)
    assert (found.num_refs, found.problems, found.images.missing) == (len(FORMS), (), [])
    for example, form in zip(found[::2], FORMS, strict=True):
        expected = painted(*BOXES[form])
        np.testing.assert_array_equal(example.masks, expected[None][: int(expected.any())])
        assert example.instruction == f"the {form}"
    assert [example.instruction for example in found[1::2]] == ["it"] * len(FORMS)
    assert list(found.num_targets[::2]) == [int(bool(BOXES[form])) for form in FORMS]
    assert len({example.id for example in found}) == len(found)


def test_refcoco_takes_the_image_of_the_instances_and_not_the_name_of_the_reference(refcoco):
    found = ReferExamples(refcoco.write(), "refcoco", "train")
    path = refcoco.root / refcoco.image_folder / coco_name(41)
    np.testing.assert_array_equal(found[1].image, np.array(Image.open(path)))
    assert found.image_file(1) == path
    assert found.image_name(1) == "coco-41"


@pytest.mark.parametrize("folder", ["images/train2014", "train2014", "coco/train2014"])
def test_refcoco_finds_images_in_other_usual_folders(tmp_path, folder):
    builder = Refer(tmp_path, image_folder=folder)
    builder.refer(1, builder.annotate(1, "polygon"), "val", "cup")
    found = ReferExamples(builder.write(), "refcoco", "val")
    assert found.images.folder == tmp_path / folder
    assert found[0].image.shape == (HEIGHT, WIDTH, 3)


def test_refcoco_with_a_named_image_folder_looks_only_there(refcoco, tmp_path):
    found = ReferExamples(refcoco.write(), "refcoco", "train", image_folder=tmp_path / "other")
    assert len(found.images.missing) == len(FORMS)


def test_refcoco_first_sentences_takes_one_sentence_of_each_reference(refcoco):
    found = ReferExamples(refcoco.write(), "refcoco", "train", first_sentences=True)
    assert [example.instruction for example in found] == [f"the {form}" for form in FORMS]


@pytest.mark.parametrize(
    ("found", "split", "expected"),
    [
        ("testA", "testA", True),
        ("testAB", "testA", True),
        ("testAB", "testB", True),
        ("testB", "testA", False),
        ("testA", "test", True),
        ("test", "test", True),
        ("val", "test", False),
        ("trainval", "train", False),
    ],
)
def test_in_split_follows_the_rules_of_refer(found, split, expected):
    assert in_split(found, split) is expected


def test_refcoco_splits_are_counted_by_references_and_sentences(tmp_path):
    builder = Refer(tmp_path)
    for number, split in enumerate(["train", "testA", "testAB", "testB", "testB", "val"]):
        ann_id = builder.annotate(number, "polygon")
        builder.refer(number, ann_id, split, *["cup"] * (number + 1))
    builder.write()
    counts = {}
    for split in ("train", "val", "testA", "testB"):
        found = ReferExamples(tmp_path, "refcoco", split)
        counts[split] = (found.num_refs, len(found))
    assert counts == {"train": (1, 1), "val": (1, 6), "testA": (2, 5), "testB": (3, 12)}
    assert found.splits == {"train": 1, "testA": 1, "testAB": 1, "testB": 2, "val": 1}


def test_refcocog_is_split_by_umd_unless_google_is_requested(tmp_path):
    for split_by, sentence in (("umd", "from umd"), ("google", "from google")):
        builder = Refer(tmp_path, "refcocog")
        builder.refer(1, builder.annotate(1, "polygon"), "val", sentence)
        builder.write(split_by)
    assert ReferExamples(tmp_path, "refcocog", "val")[0].instruction == "from umd"
    google = ReferExamples(tmp_path, "refcocog", "val", "google")
    assert google[0].instruction == "from google"
    assert google[0].source == google.description == "refcocog:google:val"


@pytest.mark.parametrize("suffix", [".json", ".p"])
def test_grefcoco_reads_no_target_one_and_several_without_crowds(tmp_path, suffix):
    builder = Refer(tmp_path, "grefcoco")
    first = builder.annotate(5, "polygon")
    second = builder.annotate(5, "compressed RLE")
    crowd = builder.annotate(5, "uncompressed RLE", is_crowd=True)
    builder.refer(5, [first], "val", "the cup")
    builder.refer(5, [second, first, crowd], "val", "both cups", "all of them")
    builder.refer(5, [-1], "val", "the unicorn")
    found = ReferExamples(builder.write(suffix=suffix), "grefcoco", "val")
    one, two = painted(*BOXES["polygon"]), painted(*BOXES["compressed RLE"])
    expected = [np.stack([one]), np.stack([two, one]), np.stack([two, one]), np.zeros((0, 24, 32))]
    for example, masks in zip(found, expected, strict=True):
        np.testing.assert_array_equal(example.masks, masks)
    assert list(found.num_targets) == [1, 2, 2, 0]
    kinds = ["single_target", "multi_target", "multi_target", "no_target"]
    assert [example.question_type for example in found] == found.question_types == kinds


def test_refer_examples_can_be_pickled(refcoco):
    found = pickle.loads(pickle.dumps(ReferExamples(refcoco.write(), "refcoco", "train")))
    expected = ReferExamples(refcoco.root, "refcoco", "train")[2]
    for each in fields(Example):
        np.testing.assert_array_equal(getattr(found[2], each.name), getattr(expected, each.name))


class _Exploit:
    """An object whose pickle creates a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickle_that_would_run_code_is_refused_and_runs_nothing(tmp_path, protocol):
    path = tmp_path / "refs(unc).p"
    path.write_bytes(pickle.dumps([_Exploit(tmp_path / "made")], protocol=protocol))
    with pytest.raises(ArtifactError, match=r"refused: it names posix\.mkdir"):
        read_plain_pickle(path)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "value",
    [np.float64(1), np.zeros(2), collections.OrderedDict(a=1), Path("x"), builtins.print, {1, 2}],
    ids=lambda value: type(value).__name__,
)
def test_pickle_with_anything_but_plain_containers_is_refused(tmp_path, value):
    path = tmp_path / "refs(unc).p"
    path.write_bytes(pickle.dumps([value], protocol=2))
    with pytest.raises(ArtifactError, match=r"refused: it names \w+"):
        read_plain_pickle(path)


@pytest.mark.parametrize("opcode", [b"r\xff\xff\xff\xff", b"p4294967295\n"])
def test_pickle_with_a_large_index_takes_no_memory(tmp_path, opcode):
    path = tmp_path / "refs(unc).p"
    path.write_bytes(b"\x80\x02]" + opcode + b".")
    tracemalloc.start()
    try:
        assert read_plain_pickle(path) == []
        assert tracemalloc.get_traced_memory()[1] < 10**7
    finally:
        tracemalloc.stop()


def test_pickle_of_plain_containers_is_read_as_pickle_reads_it(tmp_path):
    content = [{"a": [1, -(2**70), 2.5, None, True], "b": ("x", "é"), 3: {"c": []}}]
    path = tmp_path / "refs(unc).p"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        path.write_bytes(pickle.dumps(content, protocol=protocol))
        assert read_plain_pickle(path) == content


def test_pickle_of_python_2_is_read_as_latin1(tmp_path):
    path = tmp_path / "refs(unc).p"
    path.write_bytes(b"\x80\x02]q\x00U\x04caf\xe9q\x01a.")  # SHORT_BINSTRING, a str of Python 2
    assert read_plain_pickle(path) == ["café"]


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04", b"\x80\x02]q\x00(K\x01", b"<html>", b"I1\n"])
def test_pickle_that_is_damaged_is_refused(tmp_path, data):
    path = tmp_path / "refs(unc).p"
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="not a pickle, or the download is incomplete"):
        read_plain_pickle(path)


def test_references_in_another_form_are_refused_with_their_place(refcoco):
    refcoco.refs[3]["sentences"][1]["sent"] = 7
    with pytest.raises(ArtifactError, match=r"Expected `str`, got `int`.*\[3\]\.sentences\[1\]"):
        ReferExamples(refcoco.write(), "refcoco", "train")


def test_other_split_by_than_on_disk_is_answered_with_what_is_there(tmp_path):
    builder = Refer(tmp_path, "refcocog")
    builder.refer(1, builder.annotate(1, "polygon"), "val", "cup")
    builder.write("google")
    with pytest.raises(
        FileNotFoundError,
        match=r"has refs\(google\)\.p where refs\(umd\)\.p was requested.*refcocog:google:val",
    ):
        ReferExamples(tmp_path, "refcocog", "val")
    with pytest.raises(ValueError, match="refcocog is split by 'unc'; accepted: umd, google"):
        ReferExamples(tmp_path, "refcocog", "val", "unc")


def test_missing_data_set_says_where_the_reader_looked(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"looked in .*refcoco \(no such folder\)"):
        ReferExamples(tmp_path, "refcoco", "val")


def test_missing_images_are_counted_and_named_with_the_folders(refcoco):
    root = refcoco.write()
    for image_id in (41, 43):
        (root / refcoco.image_folder / coco_name(image_id)).unlink()
    found = ReferExamples(root, "refcoco", "train")
    report = found.images.report()
    assert report.startswith(f"{len(FORMS) - 2} of {len(FORMS)} images found; looked in ")
    assert f"{root / 'images/train2014'} (no such folder)" in report
    assert report.endswith(f"missing: {coco_name(41)}, {coco_name(43)}")
    with pytest.raises(ArtifactError, match=r"refcoco:unc:train, example 1, image: .* not exist"):
        found[0]


def test_unknown_split_names_the_splits_of_the_file(refcoco):
    with pytest.raises(ValueError, match=r"split is 'testC'; .* has the splits train \(7\)"):
        ReferExamples(refcoco.write(), "refcoco", "testC")


def test_references_without_annotation_or_image_are_problems_with_their_number(refcoco):
    refcoco.refs[1]["ann_id"] = 5
    refcoco.refs[2]["image_id"] = 6
    refcoco.refs[3]["image_id"] = 41
    refcoco.refs[4]["sentences"][0]["sent"] = " "
    found = ReferExamples(refcoco.write(), "refcoco", "train")
    assert len(found) == 2 * len(FORMS) - 7 and found.num_rows == 2 * len(FORMS)
    assert [(problem.row, problem.column) for problem in found.problems] == [
        (2, "ann_id"),
        (3, "ann_id"),
        (4, "ann_id"),
        (5, "sentences"),
    ]
    assert "annotation 5 is not in" in str(found.problems[0])
    assert "image 6 is not in" in str(found.problems[1])
    assert "is on image 44, the reference on image 41" in str(found.problems[2])


def test_image_of_another_size_than_its_record_is_refused(refcoco):
    root = refcoco.write()
    Image.new("RGB", (10, 20)).save(root / refcoco.image_folder / coco_name(41))
    found = ReferExamples(root, "refcoco", "train")
    with pytest.raises(ArtifactError, match=r"is 10 x 20 and the annotations are for 32 x 24"):
        found[0]


def test_instances_that_are_cut_short_are_refused(refcoco):
    root = refcoco.write()
    path = root / "refcoco/instances.json"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ArtifactError, match=r"not an instance file .* download is incomplete"):
        ReferExamples(root, "refcoco", "train")
    path.write_bytes(b"")
    with pytest.raises(ArtifactError, match="is empty; download it again"):
        ReferExamples(root, "refcoco", "train")


def test_instances_with_a_repeated_id_are_refused(refcoco):
    refcoco.annotations[1]["id"] = refcoco.annotations[0]["id"]
    with pytest.raises(ArtifactError, match="two annotations with the id 100"):
        ReferExamples(refcoco.write(), "refcoco", "train")


def test_mask_that_does_not_fit_the_image_names_its_annotation(refcoco):
    refcoco.annotations[5]["segmentation"]["size"] = [HEIGHT, WIDTH + 1]
    found = ReferExamples(refcoco.write(), "refcoco", "train")
    with pytest.raises(ArtifactError, match=r"annotation 135: size is \[24, 33\], but the image"):
        found[10]


def test_instances_that_change_after_opening_are_refused(refcoco):
    root = refcoco.write()
    found = ReferExamples(root, "refcoco", "train")
    path = root / "refcoco/instances.json"
    path.write_text(json.dumps({"images": [], "annotations": []}))
    with pytest.raises(ArtifactError, match="changed after it was opened"):
        found[0]


@pytest.mark.fuzz
@given(st.integers(0, 2**32))
def test_mask_of_random_annotations_equals_the_painted_one(seed):
    random = np.random.default_rng(seed)
    height, width = random.integers(4, 40, 2).tolist()
    corner = random.integers((-4, -4), (width, height), (random.integers(1, 5), 2))
    sides = random.integers(1, (width, height), corner.shape, endpoint=True)
    boxes = np.hstack((corner, corner + sides)).tolist()
    mask = painted(*boxes, height=height, width=width)
    single = [painted(box, height=height, width=width) for box in boxes]
    forms = [
        [rectangle(*box) for box in boxes],
        [[float(number) for number in rectangle(*box)] for box in boxes],
        compressed(mask),
        uncompressed(mask),
        [compressed(each) for each in single],
        [*map(uncompressed, single[1:]), rectangle(*boxes[0])],
    ]
    for form in forms:
        decoded = decode_segmentation(json.loads(json.dumps(form)), height, width)
        np.testing.assert_array_equal(decoded, mask)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    builder = Refer(folder / "data")
    for image_id, form in enumerate(FORMS, start=41):
        builder.refer(image_id, builder.annotate(image_id, form), "train", f"the {form}")
    return Damaged(builder.write(), folder / "damaged")


@pytest.mark.fuzz
@pytest.mark.parametrize("name", ["refs(unc).p", "instances.json"])
@given(damage=damages())
def test_damaged_file_is_read_or_refused_with_an_error_of_the_package(written, name, damage):
    with written.file(f"refcoco/{name}", damage), contextlib.suppress(ArtifactError, ValueError):
        list(ReferExamples(written.root, "refcoco", "train"))
    assert len(ReferExamples(written.root, "refcoco", "train")) == len(FORMS)


@pytest.mark.parametrize("dataset", ["refcoco", "grefcoco"])
def test_refer_counts_other_objects_of_the_class_of_the_targets(tmp_path, dataset):
    builder = Refer(tmp_path, dataset)
    ids = [builder.annotate(1, "polygon") for _ in range(4)]
    builder.annotate(1, "polygon", is_crowd=True)
    alone = builder.annotate(2, "polygon")
    for annotation, category in zip(builder.annotations, (1, 1, 2, 1, 1, 1), strict=True):
        annotation["category_id"] = category
    several = dataset == "grefcoco"
    builder.refer(1, [ids[0]] if several else ids[0], "val", "one", "two")
    builder.refer(1, [ids[0], ids[2]] if several else ids[2], "val", "other")
    builder.refer(2, [alone] if several else alone, "val", "alone")
    if several:
        builder.refer(2, [-1], "val", "nothing")
    found = ReferExamples(builder.write(), dataset, "val")
    expected = [2, 2, 2, 0, None] if several else [2, 2, 0, 0]
    assert [found.num_same_class(index) for index in range(len(found))] == expected
    picked = Selection(found, [3, 1])
    assert [picked.num_same_class(index) for index in range(2)] == [0, 2]
    assert picked.has_references and picked.has_no_match == several
    assert [path.name for path in picked.files][1] == "instances.json"


def test_refer_without_categories_knows_no_class(tmp_path):
    builder = Refer(tmp_path)
    builder.refer(1, builder.annotate(1, "polygon"), "val", "one")
    del builder.annotations[0]["category_id"]
    assert ReferExamples(builder.write(), "refcoco", "val").num_same_class(0) is None
