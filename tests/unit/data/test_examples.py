"""Example files: writing, reading and validation."""

from __future__ import annotations

import base64
import io
import json
import pickle
import sys
import warnings
from dataclasses import fields, replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageOps
from pycocotools import mask as coco

from coprs_deploy.data.examples import Example, ExampleFile, example_from_row, write_examples
from coprs_deploy.data.rle import encode_mask
from coprs_deploy.data.rows import ROWS_PER_GROUP, FieldError
from coprs_deploy.data.synthetic import FULL, SceneExamples
from coprs_deploy.errors import ArtifactError, MissingDependencyError

SIDE = FULL.image_size


@pytest.fixture(scope="module")
def examples():
    """Six generated examples: with one target, with several and with none."""
    found = list(SceneExamples(FULL, 40))
    chosen = [next(e for e in found if len(e.masks) == count) for count in (0, 2)]
    return [*found[:4], *chosen]


def assert_same(found: Example, expected: Example) -> None:
    for field in fields(Example):
        np.testing.assert_array_equal(getattr(found, field.name), getattr(expected, field.name))


formats = pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])


@formats
def test_example_file_returns_the_written_examples(tmp_path, examples, suffix):
    path = tmp_path / f"scenes{suffix}"
    assert write_examples(path, examples) == 6
    found = ExampleFile(path)
    assert found.problems == () and found.summary().endswith("all 6 rows are valid")
    assert len(found) == 6
    for example, expected in zip(found, examples, strict=True):
        assert_same(example, expected)
    assert_same(found[-1], examples[-1])
    assert [example.id for example in found[1:3]] == [example.id for example in examples[1:3]]
    assert not list(tmp_path.glob("*.partial"))


@formats
def test_example_file_can_be_pickled(tmp_path, examples, suffix):
    path = tmp_path / f"scenes{suffix}"
    write_examples(path, examples)
    found = ExampleFile(path)
    assert_same(pickle.loads(pickle.dumps(found))[2], examples[2])


def test_parquet_rows_are_read_from_several_groups(tmp_path, examples):
    count = 2 * ROWS_PER_GROUP + 3
    small = replace(examples[0], image=examples[0].image[:8, :8], masks=np.ones((1, 8, 8), bool))
    numbered = [replace(small, id=str(number)) for number in range(count)]
    write_examples(tmp_path / "many.parquet", numbered)
    found = ExampleFile(tmp_path / "many.parquet")
    assert [found[i].id for i in (count - 1, 0, ROWS_PER_GROUP)] == [
        str(count - 1),
        "0",
        str(ROWS_PER_GROUP),
    ]


@formats
def test_file_without_rows_is_refused(tmp_path, suffix):
    path = tmp_path / f"none{suffix}"
    assert write_examples(path, []) == 0
    with pytest.raises(ArtifactError, match=r"none\S+ has no rows; at least one row must be valid"):
        ExampleFile(path)


def _drop_image(row):
    del row["image"]


def _short_mask(row):
    row["masks"][0]["counts"] = ""


def _wrong_character(row):
    row["masks"][0]["counts"] = "é" + row["masks"][0]["counts"]


def _other_size(row):
    row["masks"][0] = {"size": [8, 9], "counts": encode_mask(np.ones((8, 9), bool)).counts}


def _empty_mask(row):
    row["masks"][0]["counts"] = encode_mask(np.zeros((SIDE, SIDE), bool)).counts


INVALID_ROWS = {
    "broken image": (
        lambda row: row.update(image=row["image"][:400]),
        "image",
        "cannot be decoded",
    ),
    "no image at all": (_drop_image, "image", "it has neither"),
    "two images": (lambda row: row.update(image_path="x.png"), "image", "it has both"),
    "not base64": (lambda row: row.update(image="a.png"), "image", "a path belongs in image_path"),
    "not an image": (lambda row: row.update(image="AAAA"), "image", "not an image"),
    "empty image": (lambda row: row.update(image=""), "image", "the image has 0 bytes"),
    "image as pixels": (lambda row: row.update(image=[[0, 0]]), "image", "image is a list"),
    "image without content": (
        lambda row: row.update(image={"bytes": None, "path": None}),
        "image",
        "image is null",
    ),
    "lost image file": (
        lambda row: (row.pop("image"), row.update(image_path="lost.png")),
        "image_path",
        "lost.png does not exist",
    ),
    "image path that is a directory": (
        lambda row: (row.pop("image"), row.update(image_path=".")),
        "image_path",
        "does not exist",
    ),
    "image path with a null character": (
        lambda row: (row.pop("image"), row.update(image_path="a\0b")),
        "image_path",
        "",
    ),
    "image path that is too long": (
        lambda row: (row.pop("image"), row.update(image_path="a" * 5000)),
        "image_path",
        "",
    ),
    "image as a URL": (
        lambda row: (row.pop("image"), row.update(image_path="https://x.org/a.png")),
        "image_path",
        "is a URL, which is not fetched",
    ),
    "mask too short": (
        _short_mask,
        "masks",
        f"mask 1: the runs add up to 0 pixels and the size to {SIDE**2}",
    ),
    "mask with a wrong character": (_wrong_character, "masks", "mask 1: the counts have 'é'"),
    "mask of another size": (
        _other_size,
        "masks",
        f"mask 1: size is [8, 9], but the image is [{SIDE}, {SIDE}]",
    ),
    "empty mask": (_empty_mask, "masks", "mask 1 is empty"),
    "one segmentation instead of a list": (
        lambda row: row.update(masks=row["masks"][0]),
        "masks",
        "masks is an object; accepted: a list with one COCO segmentation per target",
    ),
    "null masks": (lambda row: row.update(masks=None), "masks", "masks is missing or null"),
    "missing instruction": (
        lambda row: row.pop("instruction"),
        "instruction",
        "instruction is missing or null; accepted: text",
    ),
    "wrong type": (lambda row: row.update(instruction=7), "instruction", "is an integer"),
    "blank instruction": (
        lambda row: row.update(instruction="  "),
        "instruction",
        "instruction is empty",
    ),
    "fraction as id": (lambda row: row.update(id=1.5), "id", "accepted: text or an integer"),
    "boolean as id": (lambda row: row.update(id=True), "id", "id is true or false"),
    "wrong type of an optional column": (
        lambda row: row.update(question_type=3),
        "question_type",
        "question_type is an integer",
    ),
    "one reference too few": (
        lambda row: row.update(response="<think>a</think>"),
        "response",
        "holds 0 <REF_POS>",
    ),
}


def rewrite(path, change):
    """Apply a function to the rows of a file of JSON lines, and write them back."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    change(rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


@pytest.mark.parametrize("problem", INVALID_ROWS)
def test_invalid_row_is_reported_and_skipped(tmp_path, examples, problem):
    spoil, column, reason = INVALID_ROWS[problem]
    path = tmp_path / "scenes.jsonl"
    write_examples(path, [e for e in examples if len(e.masks)])
    rows = rewrite(path, lambda rows: spoil(rows[2]))
    message = rf"1 of {len(rows)} rows are invalid and skipped: row 3, column {column}: "
    with pytest.warns(UserWarning, match=message):
        found = ExampleFile(path)
    (reported,) = found.problems
    assert (reported.row, reported.column) == (3, column) and reason in reported.reason
    assert [example.id for example in found] == [row["id"] for row in rows[:2] + rows[3:]]
    assert found.to_json() == {
        "path": str(path),
        "num_rows": len(rows),
        "skipped_rows": [{"row": 3, "column": column, "reason": reported.reason}],
        "ignored_columns": [],
    }


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "it may be cut short"),
        (b"[]", "the line is a list; accepted: one object a line"),
        (b"null", "the line is null"),
        (b'{"id": NaN}', "no NaN and no Infinity; write null"),
        (b'{"id": -Infinity}', "no NaN and no Infinity; write null"),
        (b'{"id": 1,}', "from byte 10 on"),
        (b'{"id": "\xff"}', "the line is not UTF-8; save the file as UTF-8"),
        (b"[" * 100_000, "the line is not valid JSON"),
        (b'{"id": ' + b"9" * 6000 + b"}", "a number is too large"),
    ],
)
def test_invalid_line_is_reported(tmp_path, examples, line, reason):
    path = tmp_path / "scenes.jsonl"
    write_examples(path, examples[:2])
    path.write_bytes(line + b"\n" + path.read_bytes())
    with pytest.warns(UserWarning, match="row 1: "):
        found = ExampleFile(path)
    assert len(found) == 2 and reason in found.problems[0].reason


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_blank_lines_are_no_rows_and_problems_name_the_line(tmp_path, examples, ending):
    path = tmp_path / "scenes.jsonl"
    write_examples(path, examples[:2])
    first, second = path.read_text().splitlines()
    path.write_text(ending.join(["", first, "  ", "{}", second, "", ""]), newline="")
    with pytest.warns(UserWarning, match=r"1 of 3 rows .*: row 4, column id: id is missing"):
        found = ExampleFile(path)
    assert [example.id for example in found] == [example.id for example in examples[:2]]


def test_byte_order_mark_is_no_part_of_the_first_row(tmp_path, examples):
    path = tmp_path / "scenes.jsonl"
    write_examples(path, examples[:2])
    path.write_text(path.read_text(), encoding="utf-8-sig")
    found = ExampleFile(path)
    assert [example.id for example in found] == [example.id for example in examples[:2]]
    path.write_text(path.read_text(encoding="utf-8-sig"), encoding="utf-16")
    with pytest.raises(ArtifactError, match="is UTF-16; save it as UTF-8"):
        ExampleFile(path)


def test_warning_lists_the_first_problems_and_counts_the_others(tmp_path, examples):
    path = tmp_path / "scenes.jsonl"
    write_examples(path, examples[:1])
    path.write_text(path.read_text() + "{}\n" * 8)
    with pytest.warns(UserWarning, match=r"8 of 9 rows .* row 6, .*; and 3 more$"):
        found = ExampleFile(path)
    assert len(found.problems) == 8 and len(found) == 1


@formats
def test_file_without_a_valid_row_is_refused(tmp_path, examples, suffix):
    path = tmp_path / f"scenes{suffix}"
    write_table(path, [{"id": "a", "instruction": "", "masks": [], "image": None}] * 3)
    with pytest.raises(ArtifactError, match=r"3 of 3 rows .* row 1, column image: .*must be valid"):
        ExampleFile(path)


def test_file_is_read_up_to_the_wanted_number_of_examples(tmp_path, examples):
    path = tmp_path / "scenes.jsonl"
    write_examples(path, examples)
    rewrite(path, lambda rows: (rows[0].update(id=None), rows[4].update(id=None)))
    seen = []
    with pytest.warns(UserWarning, match="1 of 4 rows"):
        found = ExampleFile(path, max_examples=3, inspect=seen.append)
    assert [example.id for example in seen] == [example.id for example in found]
    assert [example.id for example in found] == [example.id for example in examples[1:4]]
    assert found.num_targets == tuple(len(example.masks) for example in examples[1:4])
    assert found.question_types == tuple(example.question_type for example in examples[1:4])


def test_row_with_more_masks_than_memory_is_refused(tmp_path):
    photo = np.zeros((4000, 4000, 3), np.uint8)
    row = {"id": 1, "instruction": "a", "image": png_bytes(photo), "masks": [None] * 10_000_000}
    with pytest.raises(FieldError, match="mask 1: it is null"):
        example_from_row(row, tmp_path)


def write_table(path, rows):
    """Write rows to Parquet, or to JSON lines with bytes as base64."""
    if path.suffix == ".parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        import pyarrow

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_bytes(b"".join(msgspec.json.encode(row) + b"\n" for row in rows))


def png_bytes(image, **options):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", **options)
    return buffer.getvalue()


PIXELS = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
BOX = np.zeros((6, 8), bool)
BOX[1:4, 2:7] = True
OF_PYCOCOTOOLS = coco.encode(np.asfortranarray(BOX, dtype=np.uint8))
SEGMENTATIONS = {
    "pycocotools": OF_PYCOCOTOOLS,
    "text": {**OF_PYCOCOTOOLS, "counts": OF_PYCOCOTOOLS["counts"].decode()},
    "uncompressed": {"size": [6, 8], "counts": [13, *([3, 3] * 5)[:-1], 8]},
    "polygon": [[2, 1, 7, 1, 7, 4, 2, 4]],
    "two polygons": [[2.0, 1, 4, 1, 4, 4, 2, 4], [4.0, 1, 7, 1, 7, 4, 4, 4]],
}
IMAGES = {
    "bytes": {"image": png_bytes(PIXELS)},
    "path": {"image_path": "6x8.png"},
    "Hugging Face, bytes": {"image": {"bytes": png_bytes(PIXELS), "path": "lost.png"}},
    "Hugging Face, bytes alone": {"image": {"bytes": png_bytes(PIXELS), "path": None}},
    "Hugging Face, path": {"image": {"bytes": None, "path": "6x8.png"}},
}


@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize(
    ("suffix", "segmentation"),
    [
        *((".parquet", name) for name in SEGMENTATIONS),
        *((".jsonl", name) for name in SEGMENTATIONS if name != "pycocotools"),  # no bytes in JSON
    ],
)
def test_images_and_masks_are_read_in_every_form(tmp_path, suffix, image, segmentation):
    (tmp_path / "6x8.png").write_bytes(png_bytes(PIXELS))
    path = tmp_path / f"rows{suffix}"
    row = {"id": 7, "instruction": "the box", "masks": [SEGMENTATIONS[segmentation]] * 2}
    write_table(path, [{**row, **IMAGES[image], "response": None}])
    (found,) = ExampleFile(path)
    assert (found.id, found.response) == ("7", "")
    np.testing.assert_array_equal(found.image, PIXELS)
    np.testing.assert_array_equal(found.masks, [BOX, BOX])


def test_files_of_the_datasets_library_are_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    image = Image.fromarray(PIXELS)
    row = {"id": 7, "instruction": "the box", "image": image, "masks": [OF_PYCOCOTOOLS] * 2}
    datasets.Dataset.from_list([row]).to_parquet(tmp_path / "list.parquet")
    features = datasets.Features(
        id=datasets.Value("int64"),
        instruction=datasets.Value("string"),
        image=datasets.Image(),
        masks=datasets.Sequence(
            {"size": datasets.List(datasets.Value("int32")), "counts": datasets.Value("binary")}
        ),
    )
    columns = {name: [OF_PYCOCOTOOLS[name]] * 2 for name in ("size", "counts")}
    rows = [{**row, "masks": columns}, {**row, "masks": {"size": [], "counts": []}}]
    datasets.Dataset.from_list(rows, features).to_parquet(tmp_path / "sequence.parquet")
    (listed,) = ExampleFile(tmp_path / "list.parquet")
    with_masks, without = ExampleFile(tmp_path / "sequence.parquet")
    for found in (listed, with_masks):
        np.testing.assert_array_equal(found.image, PIXELS)
        np.testing.assert_array_equal(found.masks, [BOX, BOX])
    assert without.masks.shape == (0, 6, 8)


@formats
def test_null_is_a_missing_optional_column(tmp_path, suffix):
    path = tmp_path / f"rows{suffix}"
    row = {"id": "a", "instruction": "the box", "masks": [], "image": png_bytes(PIXELS)}
    optional = dict.fromkeys(["image_path", "response", "question_type", "source"])
    write_table(path, [{**row, **optional}])
    (found,) = ExampleFile(path)
    assert (found.response, found.question_type, found.source) == ("", "", "")


@formats
def test_other_columns_are_ignored_and_named_once(tmp_path, suffix):
    path = tmp_path / f"rows{suffix}"
    row = {"id": "a", "instruction": "the box", "masks": [], "image": png_bytes(PIXELS)}
    write_table(path, [{**row, "split": "train", "respnse": "x"}] * 3)
    with pytest.warns(UserWarning, match="all 3 rows are valid; ignored columns: ") as warned:
        found = ExampleFile(path)
    assert len(warned) == 1
    assert str(warned[0].message).endswith("split; respnse (did you mean response?)")
    assert len(found) == 3 and found.to_json()["ignored_columns"] == ["split", "respnse"]


def photo(orientation):
    """Encode PIXELS without loss as an image file with an EXIF orientation."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return png_bytes(PIXELS, exif=exif)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_masks_are_in_the_frame_of_the_upright_image(tmp_path, orientation):
    """The mask is that of the red pixel, which a viewer shows in its place after the turn."""
    marked = PIXELS // 2
    marked[1, 2] = 255, 0, 0
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = png_bytes(marked, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    mask = np.all(np.asarray(upright) == (255, 0, 0), axis=-1)
    assert mask.sum() == 1 and mask.shape == ((6, 8) if orientation < 5 else (8, 6))
    row = {"id": 1, "instruction": "the red pixel", "image": data, "masks": [encode_mask(mask)]}
    write_table(tmp_path / "rows.jsonl", [row])
    (found,) = ExampleFile(tmp_path / "rows.jsonl")
    np.testing.assert_array_equal(found.image[found.masks[0]], [[255, 0, 0]])


def test_mask_in_the_frame_of_the_stored_pixels_is_refused_with_the_frame(tmp_path):
    row = {"id": 1, "instruction": "a", "image": photo(6), "masks": [encode_mask(BOX)]}
    write_table(tmp_path / "rows.jsonl", [row])
    message = (
        r"mask 1: size is \[6, 8\], but the image is \[8, 6\] \(height, width\); the image is "
        r"stored as \[6, 8\] with the EXIF orientation 6, and masks are in the frame of the upright"
    )
    with pytest.raises(ArtifactError, match=message):
        ExampleFile(tmp_path / "rows.jsonl")


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["size", "counts", "bytes", "path", "x"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)
COLUMN_VALUES = {
    "id": st.integers() | st.text(max_size=3),
    "instruction": st.text(max_size=5),
    "masks": st.lists(st.sampled_from([*SEGMENTATIONS.values()]) | JSON_VALUES, max_size=3),
    "image": st.sampled_from([png_bytes(PIXELS), photo(8), {"bytes": b"x", "path": "6x8.png"}])
    | st.binary(max_size=8),
    "image_path": st.text(max_size=5),
    "response": st.sampled_from(["", "a", "<REF_POS>"]) | st.text(max_size=5),
}


@pytest.mark.fuzz
@given(
    st.fixed_dictionaries(
        {name: COLUMN_VALUES[name] for name in ("id", "instruction", "image")},
        optional={name: COLUMN_VALUES[name] for name in ("masks", "response")},
    )
    | st.dictionaries(st.sampled_from([*COLUMN_VALUES]), JSON_VALUES)
    | st.fixed_dictionaries(
        {}, optional={name: values | JSON_VALUES for name, values in COLUMN_VALUES.items()}
    )
)
def test_any_row_is_an_example_or_an_error_with_its_column(row):
    try:
        example = example_from_row(row, Path("nowhere"))
    except FieldError as error:
        assert error.field in row or error.field in ("id", "instruction", "masks", "image")
        assert str(error)
    else:
        assert isinstance(example.id, str) and example.masks.shape[1:] == example.image.shape[:2]


@pytest.mark.fuzz
@given(st.lists(st.binary(max_size=40) | JSON_VALUES.map(json.dumps).map(str.encode), max_size=4))
def test_any_file_of_json_lines_is_opened_or_refused(tmp_path_factory, lines):
    path = tmp_path_factory.mktemp("any") / "rows.jsonl"
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(ArtifactError):  # no such line is a valid row
        ExampleFile(path)


@pytest.mark.fuzz
@given(st.data())
def test_any_damaged_file_is_opened_or_refused(tmp_path_factory, examples, data):
    suffix = data.draw(st.sampled_from([".jsonl", ".parquet"]))
    path = tmp_path_factory.mktemp("any") / f"rows{suffix}"
    small = replace(examples[0], image=examples[0].image[:8, :8], masks=np.ones((1, 8, 8), bool))
    write_examples(path, [small, small])
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = list(ExampleFile(path))
        except ArtifactError:
            return
    assert all(isinstance(example, Example) for example in found)


def test_invalid_parquet_row_is_reported(tmp_path, examples):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    path = tmp_path / "scenes.parquet"
    write_examples(path, examples)
    table = parquet.read_table(path)
    rows = table.to_pylist()
    rows[1]["image"] = b"no image"
    rows[4]["masks"] = [{"size": [3], "counts": "1"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows, schema=table.schema), path)
    with pytest.warns(UserWarning, match="2 of 6 rows"):
        found = ExampleFile(path)
    assert [problem.row for problem in found.problems] == [2, 5]
    assert len(found) == 4


def test_parquet_without_a_required_column_is_refused(tmp_path):
    path = tmp_path / "other.parquet"
    write_table(path, [{"id": "a", "photo": b"", "masks": []}])
    message = r"lacks the columns instruction; it has id, photo, masks; accepted: id, instruction,"
    with pytest.raises(ArtifactError, match=message):
        ExampleFile(path)
    path.write_bytes(b"not parquet")
    with pytest.raises(ArtifactError, match="is not a Parquet file"):
        ExampleFile(path)


def test_unsupported_suffix_or_missing_file_is_refused(tmp_path, examples):
    with pytest.raises(ValueError, match=r"suffix is '.csv'; accepted: .parquet, .jsonl"):
        write_examples(tmp_path / "scenes.csv", examples)
    with pytest.raises(ValueError, match=r"'\.csv'"):
        ExampleFile(tmp_path / "scenes.csv")
    with pytest.raises(FileNotFoundError, match="is not a file"):
        ExampleFile(tmp_path / "scenes.jsonl")


def test_parquet_without_pyarrow_is_refused_with_the_install_command(
    tmp_path, examples, monkeypatch
):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingDependencyError, match=r"pip install -e \"\.\[batch\]\""):
        write_examples(tmp_path / "scenes.parquet", examples)
    assert not list(tmp_path.iterdir())


@formats
def test_interrupted_write_keeps_the_old_file(tmp_path, examples, suffix):
    path = tmp_path / f"scenes{suffix}"
    write_examples(path, examples[:1])

    def interrupted():
        yield examples[1]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_examples(path, interrupted())
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert ExampleFile(path)[0].id == examples[0].id


def test_file_changed_after_opening_is_refused(tmp_path, examples):
    path = tmp_path / "scenes.jsonl"
    write_examples(path, examples)

    def store_images(rows):
        for number, row in enumerate(rows, start=1):
            row["image_path"] = f"{number}.png"
            (tmp_path / row["image_path"]).write_bytes(base64.b64decode(row.pop("image")))

    rewrite(path, store_images)
    found = ExampleFile(path)
    assert_same(found[1], examples[1])
    (tmp_path / "2.png").unlink()
    with pytest.raises(ArtifactError, match="changed after it was opened: row 2, column image_pat"):
        found[1]
    path.unlink()
    with pytest.raises(ArtifactError, match=r"row 1: it cannot be read \(No such file"):
        found[0]


@formats
def test_file_cut_after_opening_is_refused(tmp_path, examples, suffix):
    path = tmp_path / f"scenes{suffix}"
    write_examples(path, examples)
    found = ExampleFile(path)
    write_examples(path, examples[:2])
    found = pickle.loads(pickle.dumps(found))  # forgets the row group that it has read
    with pytest.raises(ArtifactError, match="changed after it was opened: row 6"):
        found[5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": np.zeros((4, 4), np.uint8)}, r"image is uint8 \(4, 4\)"),
        ({"image": np.zeros((4, 5, 3), np.float32)}, "image is float32"),
        ({"masks": np.zeros((1, 5, 4), bool)}, r"masks are bool \(1, 5, 4\)"),
        ({"masks": np.ones((1, 4, 5), np.uint8)}, "masks are uint8"),
        ({"masks": np.zeros((1, 4, 5), bool)}, "mask 1 is empty"),
        ({"instruction": ""}, "instruction is empty"),
        ({"response": "<think>x</think> nothing matches"}, "holds 0 <REF_POS> for 1 masks"),
    ],
)
def test_invalid_example_is_refused(change, message):
    valid = {
        "id": "a",
        "image": np.zeros((4, 5, 3), np.uint8),
        "instruction": "the cup",
        "masks": np.ones((1, 4, 5), bool),
    }
    assert Example(**valid).source == ""
    with pytest.raises(ValueError, match=message):
        Example(**{**valid, **change})


@formats
def test_ignore_mask_is_written_and_read(tmp_path, examples, suffix):
    ignored = np.zeros((SIDE, SIDE), dtype=bool)
    ignored[3:9, 2:5] = True
    path = tmp_path / f"scenes{suffix}"
    write_examples(path, [replace(examples[0], ignore_mask=ignored), examples[1]])
    with_ignored, without = ExampleFile(path)
    np.testing.assert_array_equal(with_ignored.ignore_mask, ignored)
    assert without.ignore_mask is None


@pytest.mark.parametrize("ignored", [np.zeros((SIDE, SIDE)), np.zeros((SIDE, SIDE + 1), bool)])
def test_ignore_mask_of_another_size_or_dtype_is_refused(examples, ignored):
    with pytest.raises(FieldError, match=rf"ignore_mask is .* accepted: bool \({SIDE}, {SIDE}\)"):
        replace(examples[0], ignore_mask=ignored)


def test_invalid_ignore_mask_of_a_row_is_a_problem_of_its_column(tmp_path, examples):
    path = tmp_path / "scenes.jsonl"
    write_examples(path, examples[:2])
    first, second = map(json.loads, path.read_text().splitlines())
    first["ignore_mask"] = {"size": [SIDE, SIDE + 1], "counts": "0"}
    path.write_text(f"{json.dumps(first)}\n{json.dumps(second)}\n")
    with pytest.warns(UserWarning, match="row 1, column ignore_mask: ignore_mask: size is"):
        found = ExampleFile(path)
    assert [example.id for example in found] == [examples[1].id]


def test_rows_name_their_image_by_its_path_or_its_bytes(tmp_path, examples):
    Image.fromarray(examples[0].image).save(tmp_path / "COCO_train2014_000000000042.png")
    image = (tmp_path / "COCO_train2014_000000000042.png").read_bytes()
    row = {"id": 1, "instruction": "it", "masks": []}
    encoded = base64.b64encode(image).decode()
    rows = [
        {**row, "image_path": "COCO_train2014_000000000042.png"},
        {**row, "image": {"bytes": encoded, "path": "train2017/000000000042.jpg"}},
        {**row, "image": encoded},
        {**row, "image": {"bytes": encoded, "path": None}},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(each)}\n" for each in rows))
    found = ExampleFile(path)
    names = [found.image_name(index) for index in range(4)]
    assert names[0] == names[1] == "coco-42"
    assert names[2] == names[3] != names[0]
    assert found.image_file(0) == tmp_path / "COCO_train2014_000000000042.png"
    assert found.image_file(1) == found.image_file(2) == image
