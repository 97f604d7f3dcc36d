"""Sources of batch rows: images, tables, WebDataset shards, and URLs."""

import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from coprs_deploy.batch.files import beside, list_files
from coprs_deploy.batch.sources import RowSource, SourceColumns
from coprs_deploy.errors import ArtifactError, MissingDependencyError
from coprs_deploy.images import load_image

RING = SourceColumns(("a ring",))


def rows_of(source, columns=None):
    """Return all rows of a source, which must be the same in a second pass."""
    opened = RowSource(str(source), columns or SourceColumns())
    rows = list(opened)
    assert rows == list(opened)
    assert [row.row for row in rows] == list(range(opened.num_rows))
    return rows


def add_member(tar, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def shard(tmp_path, images):
    """Return a shard: two samples with JSON and text, one without an image, one damaged."""
    path = tmp_path / "shard-000.tar"
    image = (images / "a.png").read_bytes()
    with tarfile.open(path, "w") as tar:
        add_member(tar, "x/001.png", image)
        add_member(tar, "x/001.json", b'{"ask": ["a", "b"], "image_id": 9}')
        add_member(tar, "x/002.PNG", image)
        add_member(tar, "x/002.txt", "größer".encode())
        add_member(tar, "x/003.txt", b"no image")
        add_member(tar, "x/004.png", image)
        add_member(tar, "x/004.json", b"{")
        add_member(tar, "x/README", b"no sample")
    return path


def test_folder_gives_each_image_with_each_instruction(images):
    rows = rows_of(images, SourceColumns(("a ring", "the cup")))
    names = ["a.png", "b.jpg", "c.png", "d.png", "more/e.png"]
    assert [row.image for row in rows] == [name for name in names for _ in range(2)]
    assert [row.instruction for row in rows[:2]] == ["a ring", "the cup"]
    assert [row.id for row in rows[:2]] == ["a.png#1", "a.png#2"]
    assert all(load_image(row.location).shape == (20, 30, 3) for row in rows)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.png", ["a.png", "c.png", "d.png"]),
        ("**/*.png", ["a.png", "c.png", "d.png", "more/e.png"]),
    ],
)
def test_pattern_gives_the_images_that_match(images, pattern, expected):
    assert [row.image for row in rows_of(f"{images}/{pattern}", RING)] == expected
    assert [row.id for row in rows_of(f"{images}/{pattern}", RING)] == expected


def test_single_image_is_one_row(images):
    (row,) = rows_of(images / "c.png", RING)
    assert (row.image, row.image_id, row.problem) == ("c.png", "c", "")


def test_json_lines_take_path_instruction_and_ids_of_a_row(images, tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [
        {"id": "first", "image": "images/a.png", "instruction": "a ring", "image_id": 17},
        {"image": "images/COCO_train2014_000000000009.jpg", "instruction": ["x", "y"]},
    ]
    path.write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    first, second, third = rows_of(path)
    assert (first.id, first.image_id, first.instruction) == ("first", "17", "a ring")
    assert first.location == str(images / "a.png")
    assert [second.instruction, third.instruction] == ["x", "y"]
    assert [second.id, third.id] == ["rows.jsonl:3#1", "rows.jsonl:3#2"]
    assert second.image_id == "9"


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "not valid JSON"),
        ("[1]", "no JSON object"),
        ('{"image": "a.png"}', "instruction is None"),
        ('{"image": "a.png", "instruction": []}', "instruction is []"),
        ('{"image": "a.png", "instruction": ["x", " "]}', "instruction is ['x', ' ']"),
        ('{"instruction": "x"}', "image_path is None"),
        ('{"image": 4, "instruction": "x"}', "image is 4"),
    ],
)
def test_invalid_row_is_a_row_with_its_problem(tmp_path, line, problem):
    path = tmp_path / "rows.jsonl"
    path.write_text(line + '\n{"image": "a.png", "instruction": "x"}\n')
    bad, good = rows_of(path)
    assert problem in bad.problem
    assert good.problem == ""


def test_csv_takes_named_columns(images, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('\ufefffile,ask\nimages/a.png,"a ring,\nplease"\n', encoding="utf-8")
    columns = SourceColumns(instruction_column="ask", image_column="file")
    (row,) = rows_of(path, columns)
    assert (row.instruction, row.location) == ("a ring,\nplease", str(images / "a.png"))
    with pytest.raises(ArtifactError, match=r"no column 'image_path'; it has file, ask; name"):
        RowSource(str(path), SourceColumns())


def test_parquet_takes_bytes_structs_and_paths(images, tmp_path):
    data = (images / "a.png").read_bytes()
    table = pa.table(
        {
            "image": [{"bytes": data, "path": "x.png"}, {"bytes": None, "path": "images/b.jpg"}],
            "instruction": [["one", "two"], ["three"]],
            "id": [7, None],
        }
    )
    pq.write_table(table, tmp_path / "rows.parquet")
    first, second, third = rows_of(tmp_path / "rows.parquet")
    assert (first.content, first.image, first.id) == (data, "x.png", "7#1")
    assert (second.instruction, second.content) == ("two", data)
    assert (third.content, third.location) == (None, str(images / "b.jpg"))
    assert third.id == "rows.parquet:2"


def test_shard_groups_members_of_a_sample(shard):
    rows = rows_of(shard, SourceColumns(instruction_column="ask"))
    assert [row.instruction for row in rows[:2]] == ["a", "b"]
    assert (rows[0].image, rows[0].image_id) == ("x/001.png", "9")
    assert load_image(rows[1].content).shape == (20, 30, 3)
    assert "ask is None" in rows[2].problem
    assert "no image" in rows[3].problem
    assert "invalid member" in rows[4].problem
    texts = rows_of(shard, SourceColumns(instruction_column="txt"))
    assert [row.instruction for row in texts if not row.problem] == ["größer"]
    fixed = rows_of(shard, RING)
    assert [bool(row.problem) for row in fixed] == [False, False, True, True]


def test_folder_of_tables_is_read_as_one(tmp_path, images):
    for number in range(2):
        path = tmp_path / "tables" / f"{number}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text('{"image": "../images/a.png", "instruction": "x"}\n')
    assert [row.id for row in rows_of(tmp_path / "tables")] == ["0.jsonl:1", "1.jsonl:1"]


def test_fingerprint_is_that_of_the_content_and_not_of_the_place(tmp_path, images):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"image": "images/a.png", "instruction": "x"}\n')
    first = RowSource(str(path), SourceColumns()).fingerprint
    moved = tmp_path / "other" / "rows.jsonl"
    moved.parent.mkdir()
    moved.write_bytes(path.read_bytes())
    assert RowSource(str(moved), SourceColumns()).fingerprint == first
    path.write_text('{"image": "images/b.png", "instruction": "x"}\n')
    assert RowSource(str(path), SourceColumns()).fingerprint != first
    folder = RowSource(str(images), RING).fingerprint
    (images / "d.png").unlink()
    assert RowSource(str(images), RING).fingerprint != folder


@pytest.mark.parametrize(
    ("name", "columns", "message"),
    [
        ("images", SourceColumns(), "no instructions; name what to segment with --instruction"),
        ("images/notes.txt", RING, "accepted: .jsonl, .csv, .parquet, .tar, .jpg"),
        (".", RING, "has images and tables"),
    ],
)
def test_wrong_source_states_the_fix(tmp_path, images, name, columns, message):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=message):
        RowSource(str(tmp_path / name), columns)


def test_missing_and_empty_sources_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not a file"):
        RowSource(str(tmp_path / "nowhere"), RING)
    (tmp_path / "rows.jsonl").write_text("\n")
    with pytest.raises(ArtifactError, match="has no rows"):
        RowSource(str(tmp_path / "rows.jsonl"), RING)
    for name in ("rows.parquet", "rows.tar"):
        (tmp_path / name).write_bytes(b"no such file")
        with pytest.raises(ArtifactError, match="cannot be read as"):
            RowSource(str(tmp_path / name), RING)


def test_instructions_and_a_column_of_them_are_refused_together():
    with pytest.raises(ValueError, match="one of the two"):
        SourceColumns(("a ring",), "ask")
    with pytest.raises(ValueError, match="is empty"):
        SourceColumns((" ",))


@pytest.fixture
def memory(images):
    """Copy the images and a table to fsspec's file system in memory."""
    fsspec = pytest.importorskip("fsspec")
    filesystem = fsspec.filesystem("memory")
    filesystem.pipe("/bucket/deep/a.png", (images / "a.png").read_bytes())
    filesystem.pipe("/bucket/b.png", (images / "a.png").read_bytes())
    filesystem.pipe("/bucket/rows.jsonl", b'{"image": "b.png", "instruction": "x"}\n')
    yield "memory://bucket"
    filesystem.rm("/bucket", recursive=True)


def test_url_of_fsspec_is_listed_and_read(memory):
    files = list_files(memory)
    assert [file.name for file in files] == ["b.png", "deep/a.png", "rows.jsonl"]
    (row,) = rows_of(f"{memory}/rows.jsonl")
    assert row.location == f"{memory.replace('//', '///')}/b.png" or row.location.endswith("/b.png")
    assert [row.image for row in rows_of(f"{memory}/**/*.png", RING)] == ["b.png", "deep/a.png"]


def test_url_without_fsspec_names_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "fsspec.core", None)
    with pytest.raises(MissingDependencyError, match=r"pip install -e \"\.\[batch\]\""):
        list_files("s3://bucket/images")


def test_unknown_protocol_is_refused():
    pytest.importorskip("fsspec")
    with pytest.raises(ValueError, match="nosuch://bucket cannot be opened"):
        list_files("nosuch://bucket")


def test_reference_is_relative_to_its_table():
    assert beside("/data/rows.csv", "images/a.png") == "/data/images/a.png"
    assert beside("/data/rows.csv", "/other/a.png") == "/other/a.png"
    assert beside("s3://b/rows.csv", "a.png") == "s3://b/a.png"
    assert beside("/data/rows.csv", "s3://b/a.png") == "s3://b/a.png"
