"""Rows as annotations of supervision, FiftyOne and Label Studio."""

import base64
import io
import json
import sys
import zlib
from xml.etree import ElementTree

import numpy as np
import pytest

from coprs_deploy.batch import (
    OutputRow,
    to_supervision,
    write_fiftyone,
    write_label_studio,
)
from coprs_deploy.batch.annotations import labeling_setup
from coprs_deploy.batch.brush_rle import encode_brush
from coprs_deploy.data.rle import encode_mask
from coprs_deploy.errors import MissingDependencyError

supervision = pytest.importorskip("supervision")

HEIGHT, WIDTH = 20, 30


def mask_of(x1, y1, x2, y2):
    mask = np.zeros((HEIGHT, WIDTH), np.bool_)
    mask[y1:y2, x1:x2] = True
    return mask


def row_of(number, image, instruction, *boxes, error=""):
    return OutputRow(
        row=number,
        id=str(number),
        image=image,
        instruction=instruction,
        found=bool(boxes),
        masks=[encode_mask(mask_of(*box)) for box in boxes],
        boxes=[list(box) for box in boxes],
        areas=[int(mask_of(*box).sum()) for box in boxes],
        scores=[0.5 + 0.1 * n for n in range(len(boxes))],
        reasoning=f"reasons of {number}",
        image_size=[] if error else [HEIGHT, WIDTH],
        error=error,
        bundle="0123456789abcdef",
        version="1.2",
    )


ROWS = [
    row_of(0, "a b.png", "a ring", (3, 4, 9, 12), (10, 1, 30, 20)),
    row_of(1, "a b.png", "a <star>"),
    row_of(2, "broken.png", "a ring", error="no image"),
    row_of(3, "more/c.png", "a ring", error="too slow"),
    row_of(4, "more/c.png", "a <star>", (0, 0, 30, 20)),
    row_of(5, "d.png", "a ring", (0, 0, 0, 0)),
]


def decode_brush(data):
    """Decode @thi.ng/rle-pack as its ``decode`` does, bit by bit."""
    bits = "".join(f"{byte:08b}" for byte in data)
    position = 0

    def read(size):
        nonlocal position
        position += size
        return int(bits[position - size : position], 2)

    count, width = read(32), read(5) + 1
    lengths = [read(4) + 1 for _ in range(4)]
    values = []
    while len(values) < count:
        is_run = read(1)
        length = read(lengths[read(2)]) + 1
        values += [read(width)] * length if is_run else [read(width) for _ in range(length)]
    assert len(values) == count
    return np.array(values, np.uint8)


@pytest.mark.parametrize(
    "mask",
    [
        mask_of(3, 4, 9, 12),
        mask_of(0, 0, 30, 20),
        mask_of(0, 0, 0, 0),
        np.indices((9, 7)).sum(axis=0) % 2 == 0,
        np.arange(300 * 200).reshape(300, 200) > 70_000 // 4,
        np.ones((200, 400), np.bool_),
    ],
)
def test_brush_encoding_is_decoded_to_the_mask(mask):
    channels = decode_brush(encode_brush(mask)).reshape(*mask.shape, 4)
    assert np.array_equal(channels, 255 * np.repeat(mask[..., None], 4, axis=2))


def test_label_studio_tasks_have_images_regions_and_reasoning(tmp_path):
    path = tmp_path / "tasks.json"
    assert write_label_studio(path, ROWS) == 3
    first, second, third = json.loads(path.read_text())
    assert first["data"] == {
        "image": "/data/local-files/?d=a%20b.png",
        "reasoning": "a ring: reasons of 0\na <star>: reasons of 1",
    }
    (prediction,) = first["predictions"]
    assert prediction["model_version"] == "coprs-deploy 1.2, 0123456789ab"
    assert prediction["score"] == 0.5
    regions = prediction["result"]
    assert [region["id"] for region in regions] == ["0-0", "0-1"]
    for region, mask in zip(regions, (mask_of(3, 4, 9, 12), mask_of(10, 1, 30, 20)), strict=True):
        assert (region["original_height"], region["original_width"]) == (HEIGHT, WIDTH)
        assert region["value"]["brushlabels"] == ["a ring"]
        decoded = decode_brush(region["value"]["rle"]).reshape(HEIGHT, WIDTH, 4)[..., 3]
        assert np.array_equal(decoded > 0, mask)
    assert second["data"]["image"] == "/data/local-files/?d=more/c.png"
    assert [each["type"] for each in second["predictions"][0]["result"]] == ["brushlabels"]
    assert third["predictions"] == [
        {"model_version": "coprs-deploy 1.2, 0123456789ab", "result": []}
    ]


def test_label_studio_setup_names_all_instructions(tmp_path):
    write_label_studio(tmp_path / "tasks.json", ROWS)
    setup = ElementTree.parse(tmp_path / "tasks.xml").getroot()
    (brush,) = setup.findall("BrushLabels")
    assert (brush.get("name"), brush.get("toName")) == ("label", "image")
    assert [label.get("value") for label in brush] == ["a ring", "a <star>"]
    assert setup.find("Image").get("value") == "$image"
    assert ElementTree.fromstring(labeling_setup(["\"quoted\" & 'both'"]))[1][0].get("value") == (
        "\"quoted\" & 'both'"
    )


@pytest.mark.parametrize(
    ("root", "expected"),
    [
        ("https://images.org/photos", "https://images.org/photos/a%20b.png"),
        ("s3://bucket/", "s3://bucket/a%20b.png"),
        ("/photos", "/photos/a b.png"),
        ("", "a b.png"),
    ],
)
def test_image_root_precedes_the_name(tmp_path, root, expected):
    write_label_studio(tmp_path / "tasks.json", ROWS[:1], root)
    (task,) = json.loads((tmp_path / "tasks.json").read_text())
    assert task["data"]["image"] == expected


def test_image_that_is_a_url_is_kept(tmp_path):
    write_label_studio(tmp_path / "tasks.json", [row_of(0, "s3://b/a.png", "a")], "https://x.org")
    assert json.loads((tmp_path / "tasks.json").read_text())[0]["data"]["image"] == "s3://b/a.png"


def test_fiftyone_samples_have_boxes_and_cropped_masks(tmp_path):
    assert write_fiftyone(tmp_path / "dataset", ROWS, "/photos/") == 3
    assert [path.name for path in (tmp_path / "dataset").iterdir()] == ["samples.json"]
    samples = json.loads((tmp_path / "dataset" / "samples.json").read_text())["samples"]
    assert [sample["filepath"] for sample in samples] == [
        "/photos/a b.png",
        "/photos/more/c.png",
        "/photos/d.png",
    ]
    first, second = samples[0]["predictions"]["detections"]
    assert (first["_cls"], first["label"], first["reasoning"]) == (
        "Detection",
        "a ring",
        "reasons of 0",
    )
    assert first["bounding_box"] == pytest.approx([0.1, 0.2, 0.2, 0.4])
    assert (first["confidence"], second["confidence"]) == (0.5, 0.6)
    packed = zlib.decompress(base64.b64decode(first["mask"]))
    mask = np.load(io.BytesIO(packed), allow_pickle=False)
    assert mask.shape == (8, 6)
    assert mask.all()
    assert [len(sample["predictions"]["detections"]) for sample in samples] == [2, 1, 0]


def test_detections_of_an_image_have_a_class_an_instruction():
    detections = to_supervision([ROWS[4], row_of(6, "more/c.png", "a ring", (3, 4, 9, 12))])
    assert isinstance(detections, supervision.Detections)
    assert detections.class_id.tolist() == [0, 1]
    assert detections.data["class_name"].tolist() == ["a <star>", "a ring"]
    assert detections.area.tolist() == [600, 48]
    assert detections.xyxy.tolist() == [[0, 0, 30, 20], [3, 4, 9, 12]]
    assert detections.confidence.tolist() == [0.5, 0.5]
    assert np.array_equal(detections.mask[1], mask_of(3, 4, 9, 12))


def test_detections_of_nothing_are_empty_and_of_several_images_refused(monkeypatch):
    assert len(to_supervision(ROWS[1])) == 0
    assert len(to_supervision([])) == 0
    with pytest.raises(ValueError, match="the rows are on 2 images"):
        to_supervision([ROWS[0], ROWS[4]])
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(MissingDependencyError, match="to_supervision needs supervision"):
        to_supervision(ROWS[0])


def test_rows_without_a_result_leave_valid_files(tmp_path):
    failed = [row_of(0, "a.png", "a", error="broken")]
    assert write_label_studio(tmp_path / "tasks.json", failed) == 0
    assert write_fiftyone(tmp_path, failed) == 0
    assert json.loads((tmp_path / "tasks.json").read_text()) == []
    assert json.loads((tmp_path / "samples.json").read_text()) == {"samples": []}
