"""Example files: writing, reading and validation."""

from __future__ import annotations

import base64
import json
import pickle
import sys
from dataclasses import fields, replace

import numpy as np
import pytest

from coprs_deploy.data.examples import Example, ExampleFile, write_examples
from coprs_deploy.data.rle import encode_mask
from coprs_deploy.data.rows import ROWS_PER_GROUP
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
def test_write_examples_without_examples_writes_an_empty_file(tmp_path, suffix):
    path = tmp_path / f"none{suffix}"
    assert write_examples(path, []) == 0
    assert list(ExampleFile(path)) == []


def _short_mask(row):
    row["masks"][0]["counts"] = ""


def _wrong_character(row):
    row["masks"][0]["counts"] = "é" + row["masks"][0]["counts"]


def _cut_counts(row):
    row["masks"][0]["counts"] = "o"


def _other_size(row):
    row["masks"][0] = {"size": [8, 9], "counts": encode_mask(np.ones((8, 9), bool)).counts}


def _empty_mask(row):
    row["masks"][0]["counts"] = encode_mask(np.zeros((SIDE, SIDE), bool)).counts


INVALID_ROWS = {
    "broken image": (lambda row: row.update(image=row["image"][:400]), "cannot be decoded"),
    "no image at all": (lambda row: row.pop("image"), "exactly one of image and image_path"),
    "two images": (
        lambda row: row.update(image_path="x.png"),
        "exactly one of image and image_path",
    ),
    "not base64": (lambda row: row.update(image="?"), "base64"),
    "not an image": (lambda row: row.update(image="AAAA"), "not an image"),
    "lost image file": (
        lambda row: (row.pop("image"), row.update(image_path="lost.png")),
        "lost.png does not exist",
    ),
    "mask too short": (
        _short_mask,
        f"mask 1: the runs add up to 0 pixels and the size to {SIDE**2}",
    ),
    "mask with a wrong character": (_wrong_character, "mask 1: the counts have 'é'"),
    "mask cut short": (_cut_counts, "in the middle of a run length"),
    "mask of another size": (_other_size, f"mask 1 is 8 x 9, but the image is {SIDE} x {SIDE}"),
    "empty mask": (_empty_mask, "mask 1 is empty"),
    "unknown field": (lambda row: row.update(mask=[]), "unknown field `mask`"),
    "missing field": (lambda row: row.pop("instruction"), "missing required field `instruction`"),
    "wrong type": (lambda row: row.update(instruction=7), r"Expected `str`, got `int`"),
    "blank instruction": (lambda row: row.update(instruction="  "), "instruction is empty"),
    "one reference too few": (
        lambda row: row.update(response="<think>a</think>"),
        "holds 0 <REF_POS>",
    ),
}


@pytest.mark.parametrize("problem", INVALID_ROWS)
def test_invalid_row_is_reported_and_skipped(tmp_path, examples, problem):
    spoil, reason = INVALID_ROWS[problem]
    path = tmp_path / "scenes.jsonl"
    write_examples(path, [e for e in examples if len(e.masks)])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    spoil(rows[2])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.warns(
        UserWarning, match=rf"1 of {len(rows)} rows are invalid and skipped: row 3: "
    ):
        found = ExampleFile(path)
    (reported,) = found.problems
    assert reported.row == 3 and reason in reported.reason
    assert [example.id for example in found] == [row["id"] for row in rows[:2] + rows[3:]]


@pytest.mark.parametrize("line", ["{", "[]", "", "null"])
def test_invalid_line_is_reported(tmp_path, examples, line):
    path = tmp_path / "scenes.jsonl"
    write_examples(path, examples[:2])
    path.write_text(f"{line}\n{path.read_text()}")
    with pytest.warns(UserWarning, match="row 1: "):
        assert len(ExampleFile(path)) == 2


def test_warning_lists_the_first_problems_and_counts_the_others(tmp_path):
    path = tmp_path / "scenes.jsonl"
    path.write_text("{}\n" * 8)
    with pytest.warns(UserWarning, match=r"8 of 8 rows .* row 5: .*; and 3 more$"):
        found = ExampleFile(path)
    assert len(found.problems) == 8 and len(found) == 0


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


def test_wrong_parquet_columns_are_refused(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "other.parquet"
    parquet.write_table(pyarrow.table({"id": ["a"], "photo": [b""], "masks": [[]]}), path)
    with pytest.raises(ArtifactError, match=r"unknown columns \(photo\) .*\(instruction\)"):
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
    with pytest.raises(MissingDependencyError, match="pip install pyarrow"):
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
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for number, row in enumerate(rows, start=1):
        row["image_path"] = f"{number}.png"
        (tmp_path / row["image_path"]).write_bytes(base64.b64decode(row.pop("image")))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = ExampleFile(path)
    assert_same(found[1], examples[1])
    (tmp_path / "2.png").unlink()
    with pytest.raises(ArtifactError, match="changed after it was opened: row 2"):
        found[1]


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
