"""Sources of batch rows: images of a folder or pattern, tables, and WebDataset shards.

    FOLDER, "images/**/*.jpg"    images, with the same instructions for each
    FILE.jsonl, FILE.csv         an image path and an instruction a row
    FILE.parquet                 the same, or the bytes of the image
    FILE.tar                     WebDataset: members that share a name up to the first dot

A folder or pattern of tables or shards is read as one. Paths in a table are relative to it. Every
location may be a URL of fsspec. Rows come in the same order in every pass.
"""

from __future__ import annotations

import csv
import hashlib
import io
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from coprs_deploy.batch.files import SourceFile, beside, list_files, open_file
from coprs_deploy.batch.rows import InputRow
from coprs_deploy.data.image_columns import image_name_of
from coprs_deploy.data.rows import import_pyarrow
from coprs_deploy.errors import ArtifactError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".heic")

DEFAULT_COLUMN = "instruction"
IMAGE_COLUMNS = ("image_path", "image")
"""Columns of a table that are looked for if none is named."""

_ROWS_PER_READ = 64
_HASHED_BYTES = 1 << 20


@dataclass(frozen=True)
class SourceColumns:
    """Instructions about the images, and the columns where a table has them.

    Attributes:
        instructions: instructions about every image; empty takes them from a column.
        instruction_column: column with an instruction, or a list of them.
        image_column: column with the path or URL of the image, or its bytes; None takes
            ``image_path``, else ``image``.
    """

    instructions: tuple[str, ...] = ()
    instruction_column: str = ""
    image_column: str | None = None

    def __post_init__(self) -> None:
        if self.instructions and self.instruction_column:
            raise ValueError(
                "both instructions and a column of instructions are given; accepted: one of the two"
            )
        if any(not text.strip() for text in self.instructions):
            raise ValueError("an instruction is empty; accepted: text")


@dataclass(frozen=True)
class _Record:
    """One image of a source, with the columns of its row."""

    id: str
    image: str = ""
    location: str = ""
    content: bytes | NDArray[Any] | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""


class RowSource:
    """The rows of a source.

    Attributes:
        description: source and number of files.
        num_rows: number of rows.
        fingerprint: hash of the names of the files, the contents of tables, and the sizes of
            shards; an image may be replaced, so that rows that failed can be repeated.
    """

    def __init__(self, source: str, columns: SourceColumns) -> None:
        """List the files, and count the rows in one pass without images.

        Raises:
            ValueError: no instruction is given for images, or the kind of file is not accepted.
            FileNotFoundError: there is no such file.
            ArtifactError: a table cannot be read, lacks a column, or there is no row.
            MissingDependencyError: fsspec or pyarrow is needed and not installed.
        """
        self._columns = columns
        listed = list_files(source)
        tables = [file for file in listed if file.suffix in READERS]
        self._files = tables or [file for file in listed if file.suffix in IMAGE_SUFFIXES]
        if not self._files:
            raise ValueError(
                f"{source} has none of the files that are read; accepted: "
                f"{', '.join((*READERS, *IMAGE_SUFFIXES))}"
            )
        if tables and len(tables) < len(listed) and any(f.suffix in IMAGE_SUFFIXES for f in listed):
            tables_of = ", ".join(sorted({file.suffix for file in tables}))
            raise ValueError(
                f"{source} has images and tables ({tables_of}); name one of the two, as in "
                f"{source.rstrip('/')}/*{tables[0].suffix}"
            )
        if not tables and not columns.instructions:
            raise ValueError(
                f"{source} has images and no instructions; name what to segment with --instruction"
            )
        self.num_rows = sum(1 for _ in self._rows(with_images=False))
        if not self.num_rows:
            raise ArtifactError(f"{source} has no rows")
        kind = "files" if tables else "images"
        self.description = f"{source} ({len(self._files):,} {kind}, {self.num_rows:,} rows)"
        digest = hashlib.sha256()
        for file in self._files:
            digest.update(f"{file.name} {_content_hash(file)}\n".encode())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return self.num_rows

    def __iter__(self) -> Iterator[InputRow]:
        return self._rows(with_images=True)

    def _rows(self, with_images: bool) -> Iterator[InputRow]:
        number = 0
        for record in self._records(with_images):
            for row in _rows_of(record, self._columns, number):
                yield row
                number += 1

    def _records(self, with_images: bool) -> Iterator[_Record]:
        for file in self._files:
            if file.suffix in READERS:
                yield from READERS[file.suffix](file, self._columns, with_images)
            else:
                yield _Record(file.name, file.name, file.location)


def batch_rows(
    batch: Mapping[str, Sequence[Any]], columns: SourceColumns
) -> tuple[list[InputRow], list[int]]:
    """Return the rows of a batch of Ray Data, or of another library.

    Args:
        batch: values by column, all of one length; an image may also be an array, as of
            ``ray.data.read_images``. Paths are relative to the working directory.
        columns: instructions, and columns.

    Returns:
        Rows, numbered within the batch, and the index of each row's image in the batch.
    """
    file = SourceFile(str(Path.cwd() / "batch"), "batch", 0)
    rows, indices = list[InputRow](), list[int]()
    for index in range(len(next(iter(batch.values()), ()))):
        values = {name: column[index] for name, column in batch.items()}
        record = _table_record(file, columns, values, str(index))
        found = list(_rows_of(record, columns, len(rows)))
        rows += found
        indices += [index] * len(found)
    return rows, indices


def _rows_of(record: _Record, columns: SourceColumns, number: int) -> Iterator[InputRow]:
    """Yield a row for each instruction, numbered from ``number`` on."""
    texts, problem = _instructions(record, columns)
    image_id = record.columns.get("image_id")
    if image_id is None:
        image_id = image_name_of(PurePosixPath(record.image)).removeprefix("coco-")
    for index, text in enumerate(texts):
        yield InputRow(
            row=number + index,
            id=record.id if len(texts) == 1 else f"{record.id}#{index + 1}",
            image=record.image,
            instruction=text,
            location=record.location,
            content=record.content,
            image_id=str(image_id),
            problem=problem,
        )


def _instructions(record: _Record, columns: SourceColumns) -> tuple[Sequence[str], str]:
    """Return the instructions of a record, and its problem; at least one instruction.

    Their number does not depend on the image, so that rows are counted without it.
    """
    if columns.instructions:
        return columns.instructions, record.problem
    name = columns.instruction_column or DEFAULT_COLUMN
    value = record.columns.get(name)
    if isinstance(value, np.ndarray):
        value = value.tolist()
    listed = value if isinstance(value, list) else [value]
    texts = [text for text in listed if isinstance(text, str) and text.strip()]
    if not listed or len(texts) < len(listed):
        problem = f"{name} is {value!r}; accepted: text, or a list of texts"
        return ("",), record.problem or problem
    return texts, record.problem


def _read_json_lines(
    file: SourceFile, columns: SourceColumns, with_images: bool
) -> Iterator[_Record]:
    with open_file(file.location) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            name = f"{file.name}:{number}"
            try:
                row = msgspec.json.decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                yield _Record(name, problem=f"the line is not valid JSON: {error}")
                continue
            if isinstance(row, dict):
                yield _table_record(file, columns, row, name)
            else:
                yield _Record(name, problem="the line is no JSON object")


def _read_csv(file: SourceFile, columns: SourceColumns, with_images: bool) -> Iterator[_Record]:
    with (
        open_file(file.location) as raw,
        io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as text,
    ):
        try:
            rows = csv.DictReader(text)
            _check_columns(file, columns, rows.fieldnames or ())
            for number, row in enumerate(rows, start=1):
                yield _table_record(file, columns, row, f"{file.name}:{number}")
        except (csv.Error, UnicodeDecodeError) as error:
            raise ArtifactError(f"{file.location} is not CSV in UTF-8: {error}") from error


def _read_parquet(file: SourceFile, columns: SourceColumns, with_images: bool) -> Iterator[_Record]:
    pyarrow = import_pyarrow()
    with open_file(file.location) as raw:
        try:
            parquet = pyarrow.parquet.ParquetFile(raw)
            names = parquet.schema_arrow.names
            _check_columns(file, columns, names)
            image = _image_column(columns, names)
            requested = columns.instruction_column or DEFAULT_COLUMN
            wanted = [name for name in (image, requested, "id", "image_id") if name in names]
            if not with_images:
                wanted = [name for name in wanted if name != image] or names[:1]
            number = 0
            for batch in parquet.iter_batches(_ROWS_PER_READ, columns=wanted):
                for row in batch.to_pylist():
                    number += 1
                    yield _table_record(file, columns, row, f"{file.name}:{number}")
        except (pyarrow.ArrowException, OSError) as error:
            raise ArtifactError(f"{file.location} cannot be read as Parquet: {error}") from error


def _read_tar(file: SourceFile, columns: SourceColumns, with_images: bool) -> Iterator[_Record]:
    key, found = "", dict[str, Any]()
    with open_file(file.location) as raw:
        try:
            with tarfile.open(fileobj=raw, mode="r|*") as tar:
                for member in tar:
                    folder, _, name = member.name.rpartition("/")
                    stem, _, kind = name.partition(".")
                    if not member.isfile() or not stem or not kind:
                        continue
                    sample = f"{folder}/{stem}" if folder else stem
                    if sample != key and found:
                        yield _tar_record(key, found)
                        found = {}
                    key, is_image = sample, f".{kind.lower()}" in IMAGE_SUFFIXES
                    if is_image and not with_images:
                        found["image"] = (member.name, b"")
                    elif is_image or kind in ("json", "txt"):
                        stream = tar.extractfile(member)
                        content = stream.read() if stream else b""
                        found["image" if is_image else kind] = (member.name, content)
        except tarfile.TarError as error:
            raise ArtifactError(f"{file.location} cannot be read as tar: {error}") from error
    if found:
        yield _tar_record(key, found)


def _tar_record(key: str, found: Mapping[str, tuple[str, bytes]]) -> _Record:
    """Return a sample of WebDataset; the columns are those of its JSON, and ``txt``."""
    columns: dict[str, Any] = {}
    problem = "" if "image" in found else f"{key} has no image in the shard"
    try:
        if "json" in found:
            columns |= msgspec.json.decode(found["json"][1], type=dict[str, Any])
        if "txt" in found:
            columns["txt"] = found["txt"][1].decode("utf-8")
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        problem = f"{key} has an invalid member: {error}"
    name, content = found.get("image", (key, b""))
    return _Record(key, name, content=content, columns=columns, problem=problem)


def _table_record(
    file: SourceFile, columns: SourceColumns, row: Mapping[str, Any], name: str
) -> _Record:
    column = _image_column(columns, row)
    identifier = str(row["id"]) if row.get("id") not in (None, "") else name
    value = row.get(column)
    content: bytes | NDArray[Any] | None = None
    if isinstance(value, Mapping):  # the image of Hugging Face datasets
        content, value = value.get("bytes"), value.get("path")
    if isinstance(value, bytes | np.ndarray):
        content, value = value, None
    if content is not None:
        return _Record(identifier, value or identifier, content=content, columns=row)
    if not isinstance(value, str) or not value:
        problem = f"{column} is {value!r}; accepted: the path, the URL or the bytes of an image"
        return _Record(identifier, columns=row, problem=problem)
    return _Record(identifier, value, beside(file.location, value), columns=row)


def _image_column(columns: SourceColumns, names: Sequence[str] | Mapping[str, Any]) -> str:
    if columns.image_column is not None:
        return columns.image_column
    return next((name for name in IMAGE_COLUMNS if name in names), IMAGE_COLUMNS[0])


def _check_columns(file: SourceFile, columns: SourceColumns, names: Sequence[str]) -> None:
    """Refuse a table that lacks the column of the images or of the instructions."""
    wanted = [_image_column(columns, names)]
    if not columns.instructions:
        wanted.append(columns.instruction_column or DEFAULT_COLUMN)
    if missing := [name for name in wanted if name not in names]:
        raise ArtifactError(
            f"{file.location} has no column {missing[0]!r}; it has {', '.join(names)}; name the "
            "columns with --image-column and --instruction-column"
        )


def _content_hash(file: SourceFile) -> str:
    """Return the SHA-256 of a table, the size of a shard, and nothing for an image."""
    if file.suffix not in READERS:
        return ""
    if file.suffix == ".tar":  # too large to be read once more
        return str(file.size_bytes)
    digest = hashlib.sha256()
    with open_file(file.location) as content:
        while block := content.read(_HASHED_BYTES):
            digest.update(block)
    return digest.hexdigest()


Reader = Callable[[SourceFile, SourceColumns, bool], Iterator[_Record]]

READERS: dict[str, Reader] = {
    ".jsonl": _read_json_lines,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".tar": _read_tar,
}
"""Suffix of a table to the function that reads it."""
