"""Files of an evaluation that can be resumed after a kill at any moment.

    evaluation.json            identity of the run; when finished, the metrics by data set
    DATASET/rows.partial.jsonl rows in the order in which they were finished
    DATASET/rows.jsonl         all rows in the order of the source, when the data set is finished

Rows are appended one by one; a line that a kill cut short is dropped. Nothing in these files
depends on when, how fast, or in how many runs the rows were computed.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec

from coprs_deploy.artifacts import atomic_write, exclusive, make_directory, write_json
from coprs_deploy.errors import ArtifactError
from coprs_deploy.evaluation.rows import (
    ROWS_FILE,
    EvaluationRow,
    decode_row,
    encode_row,
    read_rows,
)
from coprs_deploy.evaluation.runner import EvaluationTask
from coprs_deploy.evaluation.summary import EvaluationSummary
from coprs_deploy.version import __version__

EVALUATION_FILE = "evaluation.json"
LOCK_FILE = ".evaluation.lock"
PARTIAL_FILE = "rows.partial.jsonl"

SYNC_SECONDS = 1.0
"""Time after which appended rows are also safe from a power loss."""


class RowFile:
    """Rows of a data set, which are appended in any order.

    Attributes:
        rows: by position in the source.
    """

    def __init__(self, directory: Path, num_rows: int) -> None:
        """Read the rows of an earlier run, without a last line that was cut short.

        Args:
            directory: created if it does not exist.
            num_rows: number of rows of the data set.

        Raises:
            ArtifactError: another line is damaged, or belongs to no row of the data set.
        """
        make_directory(directory)
        self._final, self._partial = directory / ROWS_FILE, directory / PARTIAL_FILE
        self._num_rows, self._synced = num_rows, time.monotonic()
        self.rows: dict[int, EvaluationRow] = {}
        if self._final.is_file():
            self.rows = {row.index: row for row in read_rows(self._final)}
            self._partial.unlink(missing_ok=True)
        elif self._partial.is_file():
            self._recover()
        if wrong := [index for index in self.rows if not 0 <= index < num_rows]:
            raise ArtifactError(
                f"{directory} has a row {wrong[0]} of {num_rows} examples; pass --overwrite to "
                "start again"
            )

    def _recover(self) -> None:
        """Read the finished rows, and cut off a line that was not written to its end."""
        complete = 0
        with self._partial.open("r+b") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break
                try:
                    row = decode_row(line)
                except ValueError as error:
                    if file.read(1):
                        raise ArtifactError(
                            f"{self._partial}, line {number} is damaged: {error}; pass --overwrite "
                            "to start again"
                        ) from error
                    break  # a power loss may leave zeros at the end
                self.rows[row.index] = row
                complete += len(line)
            file.truncate(complete)

    def __len__(self) -> int:
        return self._num_rows

    @property
    def is_complete(self) -> bool:
        """Whether every example has a row."""
        return len(self.rows) == self._num_rows

    @contextmanager
    def appending(self) -> Iterator[None]:
        """Open the file for :meth:`append`."""
        with self._partial.open("ab") as self._file:
            try:
                yield
            finally:
                os.fsync(self._file.fileno())

    def append(self, row: EvaluationRow) -> None:
        """Add a row; from then on it survives the end of the process."""
        self._file.write(encode_row(row))
        self._file.flush()
        self.rows[row.index] = row
        if time.monotonic() - self._synced > SYNC_SECONDS:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()

    def finish(self) -> list[EvaluationRow]:
        """Write all rows in the order of the source, and return them."""
        assert self.is_complete, "every example has a row"
        rows = [self.rows[index] for index in range(self._num_rows)]
        if not self._final.is_file():
            with atomic_write(self._final) as partial, partial.open("wb") as file:
                file.writelines(map(encode_row, rows))
        self._partial.unlink(missing_ok=True)
        return rows


class EvaluationStore:
    """Directory of an evaluation; use :meth:`open`.

    Attributes:
        directory: the directory.
        folders: folder of each data set, by its name.
    """

    def __init__(self, directory: Path, identity: Mapping[str, Any]) -> None:
        self.directory, self._identity = directory, identity
        self.folders = {each["name"]: directory / each["folder"] for each in identity["datasets"]}

    @classmethod
    @contextmanager
    def open(
        cls, directory: Path, identity: Mapping[str, Any], *, overwrite: bool = False
    ) -> Iterator[EvaluationStore]:
        """Open a directory for the evaluation of an identity, and lock it.

        Args:
            directory: created if it does not exist.
            identity: from :func:`evaluation_identity`.
            overwrite: whether the rows of another evaluation are removed.

        Raises:
            ArtifactError: it has another evaluation, which the message compares; or another
                process is using it.
        """
        make_directory(directory)
        taken = f"{directory} is used by another evaluation; wait for it to end"
        with exclusive(directory / LOCK_FILE, taken):
            store, path = cls(directory, identity), directory / EVALUATION_FILE
            known = _read_identity(path) if path.is_file() else None
            if overwrite or known is None:
                store._remove_rows(known)
            elif known is not None and (found := _differences(known, identity)):
                raise ArtifactError(
                    f"{directory} has another evaluation: {'; '.join(found)}; choose another "
                    "directory, or pass --overwrite to remove its rows"
                )
            if known is None or overwrite:
                store._write({})
            yield store

    def row_file(self, task: EvaluationTask) -> RowFile:
        """Return the rows of a data set."""
        return RowFile(self.folders[task.name], len(task.examples))

    def finish(self, summaries: Mapping[str, EvaluationSummary]) -> None:
        """Write the metrics of all data sets."""
        self._write({name: summary.to_json() for name, summary in summaries.items()})

    def _write(self, summaries: Mapping[str, Any]) -> None:
        write_json(
            self.directory / EVALUATION_FILE,
            {"identity": self._identity, "datasets": summaries},
        )

    def _remove_rows(self, known: Mapping[str, Any] | None) -> None:
        names = [each["folder"] for each in (known or {}).get("datasets", [])]
        for folder in {*self.folders.values(), *(self.directory / name for name in names)}:
            for file in (ROWS_FILE, PARTIAL_FILE):
                (folder / file).unlink(missing_ok=True)


def evaluation_identity(
    bundle: str, tasks: Sequence[EvaluationTask], options: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what two runs must share, so that one can continue the rows of the other.

    Args:
        bundle: fingerprint of the bundle.
        tasks: the data sets.
        options: options of the runtime.

    Raises:
        ValueError: two data sets have the same name.
    """
    names = [task.name for task in tasks]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{repeated[0]} is given twice; name each data set once")
    datasets: list[dict[str, Any]] = []
    for task in tasks:
        folder = re.sub(r"[^\w.+-]+", "-", task.name).strip("-.") or "dataset"
        taken = sum(each["folder"] == folder for each in datasets)
        datasets.append(
            {
                "name": task.name,
                "folder": f"{folder}-{len(datasets)}" if taken else folder,
                "num_examples": len(task.examples),
                "fingerprint": task.fingerprint(),
                "max_targets": task.max_targets,
                "protocol": asdict(task.protocol),
            }
        )
    return {
        "library_version": __version__,
        "bundle": bundle,
        "datasets": datasets,
        "options": dict(options),
    }


def _read_identity(path: Path) -> dict[str, Any]:
    try:
        identity = msgspec.json.decode(path.read_bytes())["identity"]
        _flatten(identity)
        assert isinstance(identity["datasets"], list)
    except (msgspec.DecodeError, LookupError, TypeError, AssertionError) as error:
        raise ArtifactError(
            f"{path} is not the file of an evaluation ({error}); choose another directory"
        ) from error
    found: dict[str, Any] = identity
    return found


def _differences(known: Mapping[str, Any], identity: Mapping[str, Any]) -> list[str]:
    """Name what differs between the identity in the directory and that of this run."""
    there, here = _flatten(known), _flatten(identity)
    names = dict.fromkeys([*there, *here])
    return [
        f"{name} is {there.get(name)!r} there and {here.get(name)!r} now"
        for name in names
        if there.get(name) != here.get(name)
    ][:3]


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested JSON by their path."""
    if isinstance(value, Mapping):
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, list):
        items = [(item["name"], item) for item in value]
    else:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in items:
        flat |= _flatten(item, f"{prefix}.{key}" if prefix else key)
    return flat
