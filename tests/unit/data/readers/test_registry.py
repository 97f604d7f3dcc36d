"""Names and paths of sources, and the images that they need."""

import json
from pathlib import Path

import pytest

from coprs_deploy.data.examples import ExampleFile, write_examples
from coprs_deploy.data.readers.coco import CocoExamples
from coprs_deploy.data.readers.hugging_face import MaskRows, ReferenceRows
from coprs_deploy.data.readers.reasonseg import ReasonSegExamples
from coprs_deploy.data.readers.refer import ReferExamples
from coprs_deploy.data.readers.registry import SourceOptions, all_splits, open_source
from coprs_deploy.data.selection import exclude_images, image_names
from coprs_deploy.data.sources import open_examples
from coprs_deploy.data.synthetic import PRESETS, SceneExamples
from coprs_deploy.errors import ArtifactError
from tests.unit.data.readers.layouts import HEIGHT, WIDTH, Refer, coco_name, write_image
from tests.unit.data.readers.test_hugging_face import mask_rows, reference_row, write_parquet
from tests.unit.data.readers.test_reasonseg import add, corners


@pytest.fixture
def root(tmp_path):
    """RefCOCO, RefCOCOg in two ways, gRefCOCO and ReasonSeg below one root."""
    splits = {"refcoco": ("train", "val", "testAB"), "grefcoco": ("val",)}
    for dataset, names in splits.items():
        builder = Refer(tmp_path, dataset)
        for image_id, split in enumerate(names, start=1):
            ann_id = builder.annotate(image_id, "polygon")
            builder.refer(image_id, ann_id, split, "a cup", "the same cup")
        builder.write()
    for split_by, split in (("umd", "test"), ("google", "val")):
        builder = Refer(tmp_path, "refcocog")
        builder.refer(4, builder.annotate(4, "polygon"), split, f"by {split_by}")
        builder.write(split_by)
    add(tmp_path, "1", ["cup", "mug"], [("target", corners(2, 2, 9, 9))])
    return tmp_path


def test_names_open_their_readers_below_the_root(root):
    options = SourceOptions(root)
    kinds = {
        "refcoco:testA": (ReferExamples, 2),
        "refcoco:unc:val": (ReferExamples, 2),
        "refcocog:test": (ReferExamples, 1),
        "refcocog:google:val": (ReferExamples, 1),
        "grefcoco:val": (ReferExamples, 2),
        "reasonseg:val": (ReasonSegExamples, 1),
    }
    for name, (kind, count) in kinds.items():
        found = open_source(name, options)
        assert (type(found), len(found)) == (kind, count), name
    assert len(open_source("refcoco:val", SourceOptions(root, first_sentences=True))) == 1
    assert len(open_source("reasonseg:val", SourceOptions(root, first_sentences=False))) == 2


def test_root_is_taken_from_the_environment_or_the_current_folder(root, monkeypatch):
    monkeypatch.setenv("COPRS_DEPLOY_DATA", str(root))
    assert len(open_source("refcoco:val")) == 2
    monkeypatch.delenv("COPRS_DEPLOY_DATA")
    monkeypatch.chdir(root)
    assert len(open_source("refcoco:val")) == 2


def test_all_splits_of_a_name_are_those_on_disk(root):
    options = SourceOptions(root)
    assert all_splits("refcoco", options) == [
        *("refcoco:train", "refcoco:val", "refcoco:testA", "refcoco:testB"),
    ]
    assert all_splits("refcocog", options) == ["refcocog:test"]
    assert all_splits("refcocog:google", options) == ["refcocog:google:val"]
    assert all_splits("reasonseg", options) == ["reasonseg:val"]
    assert all_splits("refcoco:val", options) == ["refcoco:val"]


def test_paths_open_the_reader_of_their_content(tmp_path):
    write_examples(tmp_path / "own.parquet", SceneExamples(PRESETS["plain"], 2))
    write_examples(tmp_path / "own.jsonl", SceneExamples(PRESETS["plain"], 2))
    write_parquet(tmp_path / "masks.parquet", mask_rows())
    write_parquet(tmp_path / "references.parquet", [reference_row(0, "polygon")])
    image = {"id": 1, "file_name": "1.png", "height": HEIGHT, "width": WIDTH}
    annotation = {"id": 1, "image_id": 1, "caption": "cup", "segmentation": [[0, 0, 5, 0, 5, 5]]}
    (tmp_path / "coco.json").write_text(
        json.dumps({"images": [image], "annotations": [annotation]})
    )
    kinds = {
        "own.parquet": ExampleFile,
        "own.jsonl": ExampleFile,
        "masks.parquet": MaskRows,
        "references.parquet": ReferenceRows,
        "coco.json": CocoExamples,
    }
    for name, kind in kinds.items():
        assert type(open_source(tmp_path / name)) is kind, name


def test_folder_of_the_hub_is_opened_by_its_splits(tmp_path):
    for name in ("train-00000-of-00001-a", "validation-00000-of-00001-b", "test-00000-of-00001"):
        write_parquet(tmp_path / f"data/{name}.parquet", [reference_row(0, "polygon")])
    assert all_splits(tmp_path) == [f"{tmp_path}:{s}" for s in ("test", "train", "validation")]
    for split in ("train", "val", "validation", "testA"):
        assert len(open_source(f"{tmp_path}:{split}")) == 2
    with pytest.raises(ValueError, match=r"has several splits; accepted: .* with test, train"):
        open_source(tmp_path)
    with pytest.raises(ValueError, match="has no split 'testB'"):
        open_source(f"{tmp_path}:testB")


def test_saved_folder_is_opened_whole_or_by_its_splits(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list(mask_rows())
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "several")
    assert len(open_source(tmp_path / "one")) == 5
    assert all_splits(tmp_path / "one") == [str(tmp_path / "one")]
    assert len(open_source(f"{tmp_path}/several:test")) == 5
    assert all_splits(tmp_path / "several") == [
        f"{tmp_path}/several:{s}" for s in ("train", "test")
    ]


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("refcoko:val", ValueError, r"neither a path .* did you mean refcoco:val\?"),
        ("photos.csv", ValueError, "neither a path that exists nor a known name; accepted: refc"),
        ("lost.parquet", FileNotFoundError, r"lost\.parquet is not a file"),
        ("lost.json", FileNotFoundError, r"lost\.json is not a file"),
        ("refcoco", ValueError, "refcoco names no split; accepted: refcoco:val"),
        ("reasonseg:a:b", ValueError, "reasonseg:a:b names no split"),
        (".", ArtifactError, r"has no state\.json, dataset_dict\.json or Parquet files"),
    ],
)
def test_unknown_sources_are_refused_with_what_is_accepted(
    tmp_path, monkeypatch, source, error, message
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        open_source(source)


def test_open_examples_takes_a_data_set_whole_or_in_part(root):
    whole = open_examples("refcoco:testA", options=SourceOptions(root))
    assert whole.description == "2 examples of refcoco:unc:testA"
    assert (whole.max_targets, whole.num_no_match) == (1, 0)
    part = open_examples("refcoco:testA", 1, options=SourceOptions(root))
    assert [example.instruction for example in part.examples] == ["a cup"]
    assert part.to_json()["skipped_rows"] == []


def test_open_examples_refuses_a_data_set_without_its_images(root):
    (root / "images/mscoco/images/train2014" / coco_name(3)).unlink()
    with pytest.raises(ArtifactError, match=r"refcoco:unc:testA: 0 of 1 images found; looked in"):
        open_examples("refcoco:testA", options=SourceOptions(root))
    write_image(root / "mine" / coco_name(3), 0)
    options = SourceOptions(root, image_folder=root / "mine")
    assert len(open_examples("refcoco:testA", options=options).examples) == 2


def test_excluded_images_are_recognized_across_forms(root, tmp_path):
    training = open_source("refcoco:train", SourceOptions(root))
    rows = write_parquet(tmp_path / "rows.parquet", [{**reference_row(0, "polygon")}])
    assert len(exclude_images(training, image_names(open_source(rows)))) == 2
    rows = write_parquet(tmp_path / "masks.parquet", mask_rows(image_id=["1"] * 5))
    assert len(exclude_images(training, image_names(open_source(rows)))) == 0
    assert len(exclude_images(training, set())) == 2
    unnamed = mask_rows()
    for row in unnamed:
        del row["image_id"]
    rows = write_parquet(tmp_path / "bytes.parquet", unnamed)
    with pytest.raises(ValueError, match="cannot be compared: some have a file name"):
        exclude_images(training, image_names(open_source(rows)))


def test_source_names_do_not_hide_a_path_that_exists(tmp_path):
    path = Path(tmp_path / "odd:name")
    path.mkdir()
    write_parquet(path / "test-0.parquet", mask_rows())
    assert len(open_source(path)) == 5
