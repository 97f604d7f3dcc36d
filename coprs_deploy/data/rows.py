"""Rows of example files as they lie on disk, in JSON lines and in Parquet.

Here a row is text and bytes; what they mean is checked in
:mod:`coprs_deploy.data.examples`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import msgspec

from coprs_deploy.data.rle import Rle
from coprs_deploy.errors import ArtifactError, MissingDependencyError
from coprs_deploy.specs import Record

SUFFIXES = (".parquet", ".jsonl")

ROWS_PER_GROUP = 64
"""Rows of a Parquet row group: what reading one row has to decompress."""


class ExampleRow(Record, frozen=True, omit_defaults=True):
    """The fields of a row; see :mod:`coprs_deploy.data.examples`."""

    id: str
    instruction: str
    masks: list[Rle]
    image: bytes | None = None
    image_path: str | None = None
    response: str = ""
    kind: str = ""
    tier: str = ""


class RowSource(Protocol):
    """Rows of an opened file, by index from 0."""

    def __len__(self) -> int:
        """Return the number of rows, bad ones included."""

    def read(self, index: int) -> ExampleRow:
        """Read a row.

        Raises:
            ValueError: it is not what a row must be.
        """


def open_rows(path: Path) -> RowSource:
    """Open a file by its suffix.

    Raises:
        ValueError: the suffix is another than ``SUFFIXES``.
        FileNotFoundError: there is no such file.
        ArtifactError: the file is not what its suffix says.
        MissingDependencyError: a Parquet file, and pyarrow is not installed.
    """
    _check_suffix(path.suffix)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file")
    return _ParquetRows(path) if path.suffix == ".parquet" else _JsonRows(path)


@contextmanager
def row_writer(path: Path, suffix: str) -> Generator[Callable[[ExampleRow], None]]:
    """Open a file for writing in the format of a suffix, and give a function that adds a row.

    A file that could not be written to its end is removed.

    Raises:
        ValueError: the suffix is another than ``SUFFIXES``.
        MissingDependencyError: Parquet, and pyarrow is not installed.
    """
    _check_suffix(suffix)
    opening = _writing_parquet if suffix == ".parquet" else _writing_json_lines
    try:
        with opening(path) as write:
            yield write
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _check_suffix(suffix: str) -> None:
    if suffix not in SUFFIXES:
        raise ValueError(f"the file's name ends in {suffix!r}; accepted: {', '.join(SUFFIXES)}")


def _converted(convert: Callable[[], ExampleRow]) -> ExampleRow:
    try:
        return convert()
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(str(error)) from error


class _JsonRows:
    """One JSON object a line; a blank line is a bad row."""

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
        with self._path.open("rb") as file:
            file.seek(self._starts[index])
            line = file.readline()
        return _converted(lambda: msgspec.json.decode(line, type=ExampleRow))


@contextmanager
def _writing_json_lines(path: Path) -> Generator[Callable[[ExampleRow], None]]:
    with path.open("wb") as file:

        def write(row: ExampleRow) -> None:
            file.write(msgspec.json.encode(row) + b"\n")

        yield write


class _ParquetRows:
    """Rows of a Parquet file; the row group that was read last is kept."""

    def __init__(self, path: Path) -> None:
        self._path = path
        file = _open_parquet(path)
        columns = set(file.schema_arrow.names)
        fields = {field.name: field for field in msgspec.structs.fields(ExampleRow)}
        missing = [name for name, field in fields.items() if field.required and name not in columns]
        unknown = sorted(columns - set(fields))
        if unknown or missing:
            raise ArtifactError(
                f"{path} has unknown columns ({', '.join(unknown) or 'none'}) or lacks some "
                f"({', '.join(missing) or 'none'}); accepted: {', '.join(fields)}"
            )
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
        self._places = [(group, row) for group, size in enumerate(sizes) for row in range(size)]
        self._group_number = -1
        self._group: Any = None

    def __len__(self) -> int:
        return len(self._places)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_group_number": -1, "_group": None}

    def read(self, index: int) -> ExampleRow:
        group, row = self._places[index]
        if group != self._group_number:
            self._group = _open_parquet(self._path).read_row_group(group)
            self._group_number = group
        data = self._group.slice(row, 1).to_pylist()[0]
        present = {name: value for name, value in data.items() if value is not None}
        return _converted(lambda: msgspec.convert(present, ExampleRow))


@contextmanager
def _writing_parquet(path: Path) -> Generator[Callable[[ExampleRow], None]]:
    pyarrow, parquet = _import_pyarrow()
    text = pyarrow.string()
    run_lengths = pyarrow.struct([("size", pyarrow.list_(pyarrow.int32())), ("counts", text)])
    schema = pyarrow.schema(
        [
            pyarrow.field("id", text, nullable=False),
            pyarrow.field("instruction", text, nullable=False),
            pyarrow.field("masks", pyarrow.list_(run_lengths), nullable=False),
            pyarrow.field("image", pyarrow.binary()),
            pyarrow.field("image_path", text),
            pyarrow.field("response", text),
            pyarrow.field("kind", text),
            pyarrow.field("tier", text),
        ]
    )
    waiting: list[dict[str, Any]] = []
    with parquet.ParquetWriter(path, schema) as file:

        def flush() -> None:
            file.write_table(pyarrow.Table.from_pylist(waiting, schema=schema))
            waiting.clear()

        def write(row: ExampleRow) -> None:
            waiting.append({**row.to_json(), "image": row.image})
            if len(waiting) == ROWS_PER_GROUP:
                flush()

        yield write
        if waiting:
            flush()


def _open_parquet(path: Path) -> Any:
    pyarrow, parquet = _import_pyarrow()
    try:
        return parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ArtifactError(f"{path} is no Parquet file: {error}") from error


def _import_pyarrow() -> tuple[Any, Any]:
    try:
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise MissingDependencyError(
            "Parquet files need pyarrow, which is not installed: pip install pyarrow"
        ) from error
