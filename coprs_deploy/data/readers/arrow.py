"""Rows of Hugging Face data sets on disk: Parquet files, and the folders of ``save_to_disk``."""

from __future__ import annotations

import bisect
import importlib
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from coprs_deploy.data.rows import FieldError, import_pyarrow
from coprs_deploy.errors import ArtifactError

STATE_FILE = "state.json"
"""File that marks a folder of ``save_to_disk``."""


class _DataFile(msgspec.Struct):
    filename: str


class _State(msgspec.Struct):
    data_files: list[_DataFile] = msgspec.field(name="_data_files")
    indices_files: list[_DataFile] | None = msgspec.field(name="_indices_files", default=None)


class ArrowRows:
    """Rows of Parquet or Arrow files with the same columns, read by position.

    Of Parquet, the row group that was read last is kept; Arrow files are mapped.

    Attributes:
        paths: the files, in order.
        columns: names of the columns.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        """Open files.

        Args:
            paths: at least one file, ``.parquet`` or ``.arrow``.

        Raises:
            ArtifactError: a file has not the format of its suffix, or other columns.
            MissingDependencyError: pyarrow is not installed.
        """
        self.paths = list(paths)
        self._parts: list[tuple[int, int]] = []
        sizes: list[int] = []
        self.columns: tuple[str, ...] = ()
        for number, path in enumerate(self.paths):
            columns, parts = self._open(path)
            if number and set(columns) != set(self.columns):
                raise ArtifactError(
                    f"{path} has the columns {', '.join(columns)}, and {self.paths[0].name} "
                    f"{', '.join(self.columns)}; name files of one data set"
                )
            self.columns = self.columns or columns
            self._parts += [(number, part) for part in range(len(parts))]
            sizes += parts
        self._ends = list(itertools.accumulate(sizes))
        self._cached: dict[tuple[str, ...], tuple[int, Any]] = {}

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cached": {}}

    def column(self, name: str) -> list[Any]:
        """Read the values of a small column."""
        values: list[Any] = []
        for part in range(len(self._parts)):
            values += self._table(part, (name,)).column(name).to_pylist()
        del self._cached[(name,)]
        return values

    def scalars(self, index: int, columns: Iterable[str]) -> dict[str, Any]:
        """Read columns of a row as Arrow scalars, without their null values.

        Raises:
            FieldError: the file is damaged there.
        """
        part = bisect.bisect_right(self._ends, index)
        begin = self._ends[part - 1] if part else 0
        try:
            table = self._table(part, tuple(columns))
            found = {name: table.column(name)[index - begin] for name in columns}
        except (import_pyarrow().ArrowException, OSError, LookupError, ValueError) as error:
            raise FieldError("", f"it cannot be read; the file is damaged ({error})") from error
        return {name: scalar for name, scalar in found.items() if scalar.is_valid}

    def _open(self, path: Path) -> tuple[tuple[str, ...], list[int]]:
        """Return the columns of a file, and the number of rows of each part of it."""
        pyarrow = import_pyarrow()
        try:
            if path.suffix == ".parquet":
                metadata = pyarrow.parquet.ParquetFile(path)
                count = metadata.num_row_groups
                rows = [metadata.metadata.row_group(i).num_rows for i in range(count)]
                return tuple(metadata.schema_arrow.names), rows
            table = _map_arrow(path)
            return tuple(table.column_names), [table.num_rows]
        except (pyarrow.ArrowException, OSError) as error:
            raise ArtifactError(
                f"{path} cannot be read as {path.suffix[1:].capitalize()}, or the download is "
                f"incomplete: {error}"
            ) from error

    def _table(self, part: int, columns: tuple[str, ...]) -> Any:
        """Read columns of a part, or return them if these columns were read there last."""
        cached, table = self._cached.get(columns, (-1, None))
        if cached != part:
            number, group = self._parts[part]
            path = self.paths[number]
            if path.suffix == ".parquet":
                file = import_pyarrow().parquet.ParquetFile(path)
                table = file.read_row_group(group, columns=list(columns))
            else:
                table = _map_arrow(path)
            self._cached[columns] = (part, table)
        return table


def _map_arrow(path: Path) -> Any:
    ipc = importlib.import_module("pyarrow.ipc")
    pyarrow = import_pyarrow()
    with ipc.open_stream(pyarrow.memory_map(str(path))) as stream:
        return stream.read_all()


def saved_files(folder: Path) -> list[Path]:
    """Return the Arrow files of a folder of ``save_to_disk``.

    Raises:
        ArtifactError: the folder is damaged, or its rows are selected by a file of indices.
    """
    path = folder / STATE_FILE
    try:
        state = msgspec.json.decode(path.read_bytes(), type=_State)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path} is not the state of a saved data set: {error}") from error
    if state.indices_files:
        raise ArtifactError(
            f"{folder} selects its rows by {state.indices_files[0].filename}; save it again after "
            "dataset.flatten_indices()"
        )
    files = [folder / each.filename for each in state.data_files]
    if missing := [file.name for file in files if not file.is_file()]:
        raise ArtifactError(
            f"{folder} lacks {len(missing)} of {len(files)} files, {missing[0]} first; copy the "
            "whole folder"
        )
    return files
