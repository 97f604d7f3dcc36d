"""Rows of example files on disk: JSON lines and Parquet.

A row that is read is a mapping of the columns as they are stored, without null values;
:mod:`coprs_deploy.data.examples` decodes and validates it.
"""

from __future__ import annotations

import codecs
import importlib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import msgspec

from coprs_deploy.data.rle import Rle, json_type
from coprs_deploy.errors import ArtifactError, import_failure, install_hint
from coprs_deploy.specs import Record

SUFFIXES = (".parquet", ".jsonl")

ROWS_PER_GROUP = 64
"""Rows of a Parquet row group, which is decompressed as a whole to read one row."""


class ExampleRow(Record, frozen=True, omit_defaults=True):
    """Columns of an example file as this package writes them."""

    id: str
    instruction: str
    masks: list[Rle]
    image: bytes | None = None
    image_path: str | None = None
    response: str = ""
    question_type: str = ""
    source: str = ""
    ignore_mask: Rle | None = None


COLUMNS = ExampleRow.__struct_fields__
REQUIRED_COLUMNS = ("id", "instruction", "masks")

Row: TypeAlias = dict[str, Any]
WriteRow: TypeAlias = Callable[[ExampleRow], None]


class FieldError(ValueError):
    """A field of an example, or the column of a row, is invalid.

    Attributes:
        field: name of the field or column; empty if the row as a whole is invalid.
    """

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(field, reason)
        self.field = field

    def __str__(self) -> str:
        return str(self.args[1])


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
    """Rows of a file with one JSON object per line; blank lines are no rows.

    Attributes:
        numbers: number of the line of each row, from 1.
        ignored_columns: other columns of the rows that have been read, in their order.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.ignored_columns: dict[str, None] = {}
        self._starts: list[int] = []
        numbers: list[int] = []
        with path.open("rb") as file:
            start = file.read(len(codecs.BOM_UTF8))
            if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise ArtifactError(f"{path} is UTF-16; save it as UTF-8")
            position = len(start) if start == codecs.BOM_UTF8 else 0
            file.seek(position)
            for number, line in enumerate(file, start=1):
                if line.strip():
                    numbers.append(number)
                    self._starts.append(position)
                position += len(line)
        self.numbers: Sequence[int] = numbers

    def __len__(self) -> int:
        return len(self._starts)

    def read(self, index: int) -> Row:
        """Read a row; FieldError if its line is not a JSON object."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._starts[index])
                line = file.readline()
            data = msgspec.json.decode(line)
        except OSError as error:
            raise FieldError("", f"it cannot be read ({error.strerror})") from error
        except UnicodeDecodeError as error:
            raise FieldError("", "the line is not UTF-8; save the file as UTF-8") from error
        except (msgspec.DecodeError, RecursionError) as error:
            raise FieldError("", _syntax_problem(line, str(error))) from error
        if not isinstance(data, dict):
            raise FieldError("", f"the line is {json_type(data)}; accepted: one object a line")
        self.ignored_columns |= dict.fromkeys(name for name in data if name not in COLUMNS)
        return {name: data[name] for name in COLUMNS if data.get(name) is not None}


def _syntax_problem(line: bytes, message: str) -> str:
    """Describe why a line is not JSON, from the message of the decoder."""
    position = re.search(r"byte (\d+)", message)
    if position is None:
        hint = "a number is too large" if "out of range" in message else "it may be cut short"
        return f"the line is not valid JSON; {hint}"
    if line[int(position[1]) :].lstrip(b"-").startswith((b"NaN", b"Infinity")):
        return "the line is not valid JSON, which has no NaN and no Infinity; write null"
    return f"the line is not valid JSON from byte {int(position[1]) + 1} on"


@contextmanager
def _json_writer(path: Path) -> Iterator[WriteRow]:
    with path.open("wb") as file:
        yield lambda row: file.writelines((msgspec.json.encode(row), b"\n"))


class ParquetRows:
    """Rows of a Parquet file; the row group read most recently is cached.

    Attributes:
        numbers: number of each row, from 1.
        ignored_columns: other columns of the file, in their order.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        file = _open_parquet(path)
        found = dict.fromkeys(file.schema_arrow.names)
        if missing := [name for name in REQUIRED_COLUMNS if name not in found]:
            raise ArtifactError(
                f"{path} lacks the columns {', '.join(missing)}; it has {', '.join(found)}; "
                f"accepted: {', '.join(COLUMNS)}"
            )
        self.ignored_columns = {name: None for name in found if name not in COLUMNS}
        self._columns = [name for name in found if name in COLUMNS]
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        self._locations = [(group, row) for group, size in enumerate(sizes) for row in range(size)]
        self.numbers: Sequence[int] = range(1, len(self._locations) + 1)
        self._group_number = -1
        self._group: Any = None

    def __len__(self) -> int:
        return len(self._locations)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_group_number": -1, "_group": None}

    def read(self, index: int) -> Row:
        """Read a row; FieldError if the file is damaged there."""
        group, row = self._locations[index]
        file = _open_parquet(self._path) if group != self._group_number else None
        try:
            if file is not None:
                self._group = file.read_row_group(group, columns=self._columns)
                self._group_number = group
            rows = self._group.slice(row, 1).to_pylist()
        except (import_pyarrow().ArrowException, OSError, LookupError, ValueError) as error:
            raise FieldError("", f"it cannot be read; the file is damaged ({error})") from error
        if not rows:
            raise FieldError("", "it no longer exists")
        return {name: value for name, value in rows[0].items() if value is not None}


@contextmanager
def _parquet_writer(path: Path) -> Iterator[WriteRow]:
    pyarrow = import_pyarrow()
    text = pyarrow.string()
    rle = pyarrow.struct([("size", pyarrow.list_(pyarrow.int32())), ("counts", text)])
    others = {"masks": pyarrow.list_(rle), "image": pyarrow.binary(), "ignore_mask": rle}
    schema = pyarrow.schema(dict.fromkeys(COLUMNS, text) | others)
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
    pyarrow = import_pyarrow()
    try:
        return pyarrow.parquet.ParquetFile(path)
    except PermissionError:
        raise
    except (pyarrow.ArrowException, OSError) as error:
        raise ArtifactError(f"{path} is not a Parquet file: {error}") from error


def import_pyarrow() -> Any:
    """Import pyarrow and its Parquet module; MissingDependencyError if it is not installed."""
    try:
        importlib.import_module("pyarrow.parquet")
        return importlib.import_module("pyarrow")
    except ImportError as error:
        hint = install_hint("batch")
        raise import_failure(error, "pyarrow", hint, needed_by="a Parquet file") from error
