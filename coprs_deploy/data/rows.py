"""Rows of example files on disk: JSON lines and Parquet.

A row is text and bytes; :mod:`coprs_deploy.data.examples` decodes and validates it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import msgspec

from coprs_deploy.data.rle import Rle
from coprs_deploy.errors import ArtifactError, MissingDependencyError
from coprs_deploy.specs import Record

SUFFIXES = (".parquet", ".jsonl")

ROWS_PER_GROUP = 64
"""Rows of a Parquet row group, which is decompressed as a whole to read one row."""


class ExampleRow(Record, frozen=True, omit_defaults=True):
    """Columns of an example file; see :mod:`coprs_deploy.data.examples`."""

    id: str
    instruction: str
    masks: list[Rle]
    image: bytes | None = None
    image_path: str | None = None
    response: str = ""
    question_type: str = ""
    source: str = ""


WriteRow: TypeAlias = Callable[[ExampleRow], None]


def open_rows(path: Path) -> JsonRows | ParquetRows:
    """Open a file in the format of its suffix.

    Raises:
        ValueError: the suffix is not in ``SUFFIXES``.
        FileNotFoundError: the file does not exist.
        ArtifactError: the file does not have the format of its suffix.
        MissingDependencyError: the file is Parquet and pyarrow is not installed.
    """
    _check_suffix(path.suffix)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file")
    return ParquetRows(path) if path.suffix == ".parquet" else JsonRows(path)


def row_writer(path: Path, suffix: str) -> AbstractContextManager[WriteRow]:
    """Open a file for writing in the format of a suffix; the result is a context manager.

    Raises:
        ValueError: the suffix is not in ``SUFFIXES``.
        MissingDependencyError: the format is Parquet and pyarrow is not installed.
    """
    _check_suffix(suffix)
    return _parquet_writer(path) if suffix == ".parquet" else _json_writer(path)


def _check_suffix(suffix: str) -> None:
    if suffix not in SUFFIXES:
        raise ValueError(f"suffix is {suffix!r}; accepted: {', '.join(SUFFIXES)}")


class JsonRows:
    """Rows of a file with one JSON object per line; a blank line is an invalid row."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._starts: list[int] = []
        position = 0
        with path.open("rb") as file:
            for line in file:
                self._starts.append(position)
                position += len(line)

    def __len__(self) -> int:
        return len(self._starts)

    def read(self, index: int) -> ExampleRow:
        """Read a row; ValueError if it does not match :class:`ExampleRow`."""
        with self._path.open("rb") as file:
            file.seek(self._starts[index])
            line = file.readline()
        return msgspec.json.decode(line, type=ExampleRow)


@contextmanager
def _json_writer(path: Path) -> Iterator[WriteRow]:
    with path.open("wb") as file:
        yield lambda row: file.writelines((msgspec.json.encode(row), b"\n"))


class ParquetRows:
    """Rows of a Parquet file; the last row group is cached."""

    def __init__(self, path: Path) -> None:
        self._path = path
        file = _open_parquet(path)
        columns = set(file.schema_arrow.names)
        fields = {field.name: field for field in msgspec.structs.fields(ExampleRow)}
        missing = [name for name, field in fields.items() if field.required and name not in columns]
        unknown = sorted(columns - set(fields))
        if unknown or missing:
            raise ArtifactError(
                f"{path} has unknown columns ({', '.join(unknown) or 'none'}) or missing columns "
                f"({', '.join(missing) or 'none'}); accepted: {', '.join(fields)}"
            )
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        self._locations = [(group, row) for group, size in enumerate(sizes) for row in range(size)]
        self._group_number = -1
        self._group: Any = None

    def __len__(self) -> int:
        return len(self._locations)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_group_number": -1, "_group": None}

    def read(self, index: int) -> ExampleRow:
        """Read a row; ValueError if it does not match :class:`ExampleRow`."""
        group, row = self._locations[index]
        if group != self._group_number:
            self._group = _open_parquet(self._path).read_row_group(group)
            self._group_number = group
        data = self._group.slice(row, 1).to_pylist()[0]
        present = {name: value for name, value in data.items() if value is not None}
        return ExampleRow.from_json(present)


@contextmanager
def _parquet_writer(path: Path) -> Iterator[WriteRow]:
    pyarrow = _import_pyarrow()
    text = pyarrow.string()
    rle = pyarrow.struct([("size", pyarrow.list_(pyarrow.int32())), ("counts", text)])
    schema = pyarrow.schema(
        [
            pyarrow.field("id", text, nullable=False),
            pyarrow.field("instruction", text, nullable=False),
            pyarrow.field("masks", pyarrow.list_(rle), nullable=False),
            pyarrow.field("image", pyarrow.binary()),
            pyarrow.field("image_path", text),
            pyarrow.field("response", text),
            pyarrow.field("question_type", text),
            pyarrow.field("source", text),
        ]
    )
    pending: list[dict[str, Any]] = []
    with pyarrow.parquet.ParquetWriter(path, schema) as file:

        def flush() -> None:
            file.write_table(pyarrow.Table.from_pylist(pending, schema=schema))
            pending.clear()

        def write(row: ExampleRow) -> None:
            pending.append({**row.to_json(), "image": row.image})
            if len(pending) == ROWS_PER_GROUP:
                flush()

        yield write
        if pending:
            flush()


def _open_parquet(path: Path) -> Any:
    pyarrow = _import_pyarrow()
    try:
        return pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ArtifactError(f"{path} is not a Parquet file: {error}") from error


def _import_pyarrow() -> Any:
    try:
        importlib.import_module("pyarrow.parquet")
        return importlib.import_module("pyarrow")
    except ImportError as error:
        raise MissingDependencyError(
            "Parquet files need pyarrow, which is not installed: pip install pyarrow"
        ) from error
