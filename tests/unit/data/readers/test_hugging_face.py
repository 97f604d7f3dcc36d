"""The Hugging Face forms: rows of jxu124, masks of Seg-Zero, folders of the public CoPRS code."""

import io
import json
import pickle

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from coprs_deploy.data.readers.arrow import saved_files
from coprs_deploy.data.readers.hugging_face import MaskRows, ReferenceRows, open_rows_of_hub
from coprs_deploy.errors import ArtifactError
from tests.unit.data.readers.layouts import (
    BOXES,
    HEIGHT,
    WIDTH,
    coco_name,
    painted,
    segmentation,
    write_image,
)

FORMS = list(BOXES)


def write_parquet(path, rows, rows_per_group=3):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(rows), path, row_group_size=rows_per_group
    )
    return path


def reference_row(number, form):
    """Return a row of jxu124/refcoco as its data set card describes it."""
    image_id = 50 + number
    sentences = [
        {"raw": text, "sent": text, "sent_id": 10 * number + i, "tokens": text.split()}
        for i, text in enumerate((f"the {form}", "it"))
    ]
    info = {"license": 1, "file_name": coco_name(image_id), "height": HEIGHT, "width": WIDTH}
    return {
        "sent_ids": [sentence["sent_id"] for sentence in sentences],
        "file_name": f"COCO_train2014_{image_id:012d}_{number}.jpg",
        "ann_id": 900 + number,
        "ref_id": number,
        "image_id": image_id,
        "split": "train",
        "sentences": sentences,
        "category_id": 1,
        "raw_anns": json.dumps({"segmentation": segmentation(form), "area": 1.5, "iscrowd": 0}),
        "raw_image_info": json.dumps({**info, "id": image_id}),
        "raw_sentences": json.dumps(sentences),
        "image_path": f"coco/train2014/{coco_name(image_id)}",
        "bbox": [4.0, 3.0, 12.0, 9.0],
        "captions": [sentence["sent"] for sentence in sentences],
        "global_image_id": f"coco.{image_id}",
        "anns_id": str(900 + number),
    }


@pytest.fixture
def references(tmp_path):
    """Rows of jxu124 in two files, with their images below the folder of the data set."""
    for number in range(len(FORMS)):
        write_image(tmp_path / "coco/train2014" / coco_name(50 + number), number)
    rows = [reference_row(number, form) for number, form in enumerate(FORMS)]
    return [
        write_parquet(tmp_path / "data/train-00000-of-00002-0a.parquet", rows[:4]),
        write_parquet(tmp_path / "data/train-00001-of-00002-0b.parquet", rows[4:]),
    ]


def test_reference_rows_have_every_sentence_with_its_mask(references, tmp_path):
    found = ReferenceRows(references, "jxu124")
    assert len(found) == found.num_rows == 2 * len(FORMS)
    assert (found.num_refs, found.problems, found.images.missing) == (len(FORMS), (), [])
    for index, form in enumerate(FORMS):
        example, expected = found[2 * index], painted(*BOXES[form])
        np.testing.assert_array_equal(example.masks, expected[None][: int(expected.any())])
        assert example.instruction == f"the {form}"
        path = tmp_path / "coco/train2014" / coco_name(50 + index)
        np.testing.assert_array_equal(example.image, np.array(Image.open(path)))
        assert found.image_file(2 * index + 1) == path
    assert [found.image_name(index) for index in (0, 1, 2)] == ["coco-50", "coco-50", "coco-51"]
    assert len({example.id for example in found}) == len(found)


def test_reference_rows_first_sentences_and_pickling(references):
    found = pickle.loads(pickle.dumps(ReferenceRows(references, "", first_sentences=True)))
    assert [example.instruction for example in found] == [f"the {form}" for form in FORMS]


def test_reference_rows_that_are_damaged_are_problems(tmp_path):
    rows = [reference_row(number, form) for number, form in enumerate(FORMS)]
    rows[1]["raw_image_info"] = '{"file_name": "x.jpg"}'
    rows[2]["sentences"] = []
    rows[3]["raw_anns"] = "{}"
    for number in range(len(FORMS)):
        write_image(tmp_path / "images/train2014" / coco_name(50 + number), number)
    found = ReferenceRows([write_parquet(tmp_path / "train.parquet", rows)], "rows")
    assert [(problem.row, problem.column) for problem in found.problems] == [
        (2, "raw_image_info"),
        (3, "sentences"),
    ]
    with pytest.raises(ArtifactError, match=r"rows, example 3, raw_anns: .* field `segmentation`"):
        found[2]


def encoded(image, kind="PNG"):
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind)
    return file.getvalue()


IMAGES = np.random.default_rng(0).integers(0, 256, (5, HEIGHT, WIDTH, 3), dtype=np.uint8)
MASKS = [painted(BOXES[form][0]) for form in FORMS[:4]] + [np.zeros((HEIGHT, WIDTH), bool)]


def mask_rows(**columns):
    """Return rows of Seg-Zero's evaluation files."""
    return [
        {
            "image": {"bytes": encoded(image), "path": None},
            "mask": mask.tolist(),
            "text": f"the cup {number}",
            "image_id": str(60 + number),
            "ann_id": number,
            "img_height": HEIGHT,
            "img_width": WIDTH,
            **{name: values[number] for name, values in columns.items()},
        }
        for number, (image, mask) in enumerate(zip(IMAGES, MASKS, strict=True))
    ]


def test_mask_rows_have_the_mask_of_each_row_and_none_without_a_target(tmp_path):
    found = MaskRows([write_parquet(tmp_path / "test.parquet", mask_rows(), 2)], "seg-zero")
    for number in (4, 0, 3, 1, 2):
        example = found[number]
        np.testing.assert_array_equal(example.image, IMAGES[number])
        np.testing.assert_array_equal(example.masks, MASKS[number][None][: int(number < 4)])
        assert example.instruction == f"the cup {number}"
        assert found.image_name(number) == f"coco-{60 + number}"
        assert found.image_file(number) == encoded(IMAGES[number])
    assert list(found.num_targets) == [1, 1, 1, 1, 0]
    assert len({example.id for example in found}) == 5


def test_mask_rows_name_images_by_the_best_name_that_they_have(tmp_path):
    rows = mask_rows(image_id=["a_1", None, 7, None, None][:1] * 5)
    assert MaskRows([write_parquet(tmp_path / "a.parquet", rows)], "").image_name(0) == "a_1"
    rows = mask_rows(image_filename=[coco_name(n) for n in range(5)])
    assert MaskRows([write_parquet(tmp_path / "b.parquet", rows)], "").image_name(3) == "coco-3"
    for row in rows:
        del row["image_filename"], row["image_id"]
        row["image"]["path"] = "000000000123.jpg"
    assert MaskRows([write_parquet(tmp_path / "c.parquet", rows)], "").image_name(0) == "coco-123"
    for row in rows:
        row["image"]["path"] = None
    found = MaskRows([write_parquet(tmp_path / "d.parquet", rows)], "")
    names = [found.image_name(number) for number in range(5)]
    assert all(name.startswith("bytes-") for name in names) and len(set(names)) == 5


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (None, "mask is missing or null"),
        (painted((0, 0, 3, 3), width=WIDTH + 1).tolist(), r"mask is \(24, 33\), but the image is"),
        ([[True, False], [True]], "mask has rows of 2 lengths"),
    ],
)
def test_mask_that_does_not_fit_is_refused_with_its_example(tmp_path, mask, message):
    rows = mask_rows()
    rows[1]["mask"] = mask
    found = MaskRows([write_parquet(tmp_path / "test.parquet", rows)], "rows")
    with pytest.raises(ArtifactError, match=f"rows, example 2, mask: {message}"):
        found[1]


def test_mask_column_of_text_is_refused(tmp_path):
    rows = mask_rows(mask=["x"] * 5)
    found = MaskRows([write_parquet(tmp_path / "test.parquet", rows)], "rows")
    with pytest.raises(ArtifactError, match="mask is string; accepted: rows of booleans"):
        found[0]


@pytest.mark.parametrize("kind", ["sequence", "array"])
def test_folder_of_save_to_disk_is_read_as_datasets_reads_it(tmp_path, kind):
    datasets = pytest.importorskip("datasets")
    shape = {
        "sequence": datasets.Sequence(datasets.Sequence(datasets.Value("bool"))),
        "array": datasets.Array2D((HEIGHT, WIDTH), "bool"),
    }
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "image_filename": datasets.Value("string"),
            "image_id": datasets.Value("int64"),
            "ann_id": datasets.Value("int64"),
            "text": datasets.Sequence(datasets.Value("string")),
            "mask": shape[kind],
            "bbox": datasets.Sequence(datasets.Value("float64")),
            "embed_path": datasets.Value("string"),
        }
    )
    rows = {
        "image": [Image.fromarray(image) for image in IMAGES],
        "image_filename": [coco_name(number) for number in range(5)],
        "image_id": list(range(5)),
        "ann_id": list(range(5)),
        "text": [[f"the cup {number}", "it"] for number in range(5)],
        "mask": [mask.tolist() for mask in MASKS],
        "bbox": [[0.0, 0.0, 1.0, 1.0]] * 5,
        "embed_path": ["0.pt"] * 5,
    }
    dataset = datasets.Dataset.from_dict(rows, features=features)
    dataset.save_to_disk(tmp_path / "saved", num_shards=2)
    found = MaskRows(saved_files(tmp_path / "saved"), "saved")
    assert len(found) == 10
    expected = datasets.load_from_disk(tmp_path / "saved")
    for number, row in enumerate(expected):
        example = found[2 * number + 1]
        np.testing.assert_array_equal(example.image, np.array(row["image"]))
        np.testing.assert_array_equal(example.masks, np.array([row["mask"]])[: int(number < 4)])
        assert [found[2 * number].instruction, example.instruction] == row["text"]
        assert found.image_name(2 * number) == f"coco-{number}"
    assert len(MaskRows(saved_files(tmp_path / "saved"), "", first_sentences=True)) == 5
    assert pickle.loads(pickle.dumps(found))[3].instruction == "it"


def test_folder_of_save_to_disk_that_is_incomplete_is_refused(tmp_path):
    state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}
    (tmp_path / "state.json").write_text(json.dumps(state))
    with pytest.raises(ArtifactError, match=r"lacks 1 of 1 files, data-00000-of-00001\.arrow"):
        saved_files(tmp_path)
    (tmp_path / "data-00000-of-00001.arrow").write_bytes(b"ARROW")
    with pytest.raises(
        ArtifactError, match="cannot be read as Arrow, or the download is incomplete"
    ):
        MaskRows(saved_files(tmp_path), "saved")
    (tmp_path / "state.json").write_text(
        json.dumps({**state, "_indices_files": [{"filename": "indices.arrow"}]})
    )
    with pytest.raises(ArtifactError, match=r"selects its rows by indices\.arrow"):
        saved_files(tmp_path)
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(ArtifactError, match="not the state of a saved data set"):
        saved_files(tmp_path)


def test_rows_of_the_hub_are_told_apart_by_their_columns(tmp_path, references):
    masks = write_parquet(tmp_path / "masks.parquet", mask_rows())
    options = {"first_sentences": False, "root": None, "image_folder": None}
    assert isinstance(open_rows_of_hub(references, "", **options), ReferenceRows)
    assert isinstance(open_rows_of_hub([masks], "", **options), MaskRows)
    training = {"id": "1", "problem": "cup", "solution": "[]", "img_height": 840, "img_width": 840}
    boxes = write_parquet(tmp_path / "boxes.parquet", [training])
    with pytest.raises(ArtifactError, match="has boxes and points, not masks"):
        open_rows_of_hub([boxes], "", **options)
    other = write_parquet(tmp_path / "other.parquet", [{"a": 1}])
    with pytest.raises(ArtifactError, match="has the columns a; accepted: raw_anns"):
        open_rows_of_hub([other], "", **options)
    with pytest.raises(ArtifactError, match=r"masks\.parquet has the columns .* one data set"):
        open_rows_of_hub([other, masks], "", **options)
