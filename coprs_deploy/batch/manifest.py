"""The output folder of a batch run: its manifest, and part files that are there or not.

    OUT/manifest.json           what is run: bundle, options, source; written before the first row
    OUT/part-00000.parquet      rows 0 to N-1 of the source, and so on
    OUT/masks/000000000-1.png   with saved masks: row and number of the target

A part file is written under a hidden name and renamed when it is complete, so that it has all of
its rows or does not exist. A run goes on with the parts that are missing, wherever they are made.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from coprs_deploy.artifacts import (
    atomic_write,
    check_writable,
    exclusive,
    make_directory,
    write_json,
)
from coprs_deploy.batch.rows import OutputRow, read_part, read_part_notes, write_part
from coprs_deploy.data.rows import import_pyarrow
from coprs_deploy.errors import ArtifactError
from coprs_deploy.specs import Record

MANIFEST_FILE, MASK_FOLDER, LOCK_FILE = "manifest.json", "masks", ".lock"


class BatchManifest(Record, frozen=True):
    """What a run does with what; a resumed run must have the same.

    Attributes:
        bundle: hash of the bundle's manifest.
        source: hash of the source.
        options: options that the results depend on.
        num_rows: number of rows of the source.
        rows_per_file: number of rows of a part file; the last one may have fewer.
        schema: version of the format.
    """

    bundle: str
    source: str
    options: dict[str, Any]
    num_rows: int
    rows_per_file: int
    schema: int = 1

    @property
    def fingerprint(self) -> str:
        """Hash of all fields, which every part file has."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    @property
    def num_parts(self) -> int:
        """Number of part files of a complete run."""
        return -(-self.num_rows // self.rows_per_file)

    def differences(self, other: BatchManifest) -> list[str]:
        """Return a line for each field in which a manifest differs from another."""
        found = {**self.to_json(), **self.options}
        wanted = {**other.to_json(), **other.options}
        names = sorted((found.keys() | wanted.keys()) - {"options"})
        return [
            f"{name} was {found.get(name)!r} and is {wanted.get(name)!r}"
            for name in names
            if found.get(name) != wanted.get(name)
        ]


class BatchOutput:
    """The output folder of a run.

    Attributes:
        path: the folder.
        manifest: what is run.
    """

    def __init__(self, path: Path, manifest: BatchManifest) -> None:
        self.path, self.manifest = path, manifest

    @property
    def mask_folder(self) -> Path:
        """Folder of saved masks."""
        return self.path / MASK_FOLDER

    @contextmanager
    def opened(self, *, resume: bool) -> Iterator[None]:
        """Start or go on with the run inside the block, in which no other process can.

        Raises:
            ArtifactError: the folder has a run and ``resume`` is false, or another run; or has
                other files; or another process is writing to it.
            OSError: it cannot be written.
            MissingDependencyError: pyarrow is not installed.
        """
        import_pyarrow()  # what is missing is found before the work
        check_writable(self.path)
        found = self._read_manifest()
        if found is not None and not resume:
            raise ArtifactError(
                f"{self.path} has a batch run; pass --resume to go on with it, or choose another "
                "name"
            )
        if found is None and self.path.is_dir() and any(self._foreign_files()):
            raise ArtifactError(
                f"{self.path} has files and no {MANIFEST_FILE}: it is no batch run; choose another "
                "name"
            )
        if found is not None and found != self.manifest:
            raise ArtifactError(
                f"{self.path} has another run: {'; '.join(found.differences(self.manifest))}; pass "
                "the same arguments, or choose another name"
            )
        make_directory(self.path)
        taken = f"{self.path} is being written by another process; wait for it to end"
        with exclusive(self.path / LOCK_FILE, taken):
            if found is None:
                write_json(self.path / MANIFEST_FILE, self.manifest.to_json())
            yield

    def part_path(self, part: int) -> Path:
        """Return the path of a part file, which need not exist."""
        return self.path / f"part-{part:05d}.parquet"

    def part_rows(self, part: int) -> range:
        """Return the numbers of the rows of a part."""
        size = self.manifest.rows_per_file
        return range(part * size, min((part + 1) * size, self.manifest.num_rows))

    def count_failed(self, part: int) -> int | None:
        """Return the number of failed rows of a part; None if it does not exist.

        Raises:
            ArtifactError: the file is damaged, or belongs to another run.
        """
        path = self.part_path(part)
        if not path.exists():
            return None
        fingerprint, num_rows, num_failed = read_part_notes(path)
        if fingerprint != self.manifest.fingerprint or num_rows != len(self.part_rows(part)):
            raise ArtifactError(f"{path} belongs to another run; remove it, and pass --resume")
        return num_failed

    def write_part(self, part: int, rows: Sequence[OutputRow]) -> None:
        """Write a part file, which replaces an earlier one when it is complete."""
        assert [row.row for row in rows] == [*self.part_rows(part)], "each row of the part once"
        with atomic_write(self.part_path(part)) as partial:
            write_part(partial, rows, self.manifest.fingerprint)

    def read_part(self, part: int) -> list[OutputRow]:
        """Read the rows of a part file."""
        return read_part(self.part_path(part))

    def rows(self) -> Iterator[OutputRow]:
        """Yield the rows of a complete run in the order of the source."""
        for part in range(self.manifest.num_parts):
            yield from self.read_part(part)

    def _read_manifest(self) -> BatchManifest | None:
        path = self.path / MANIFEST_FILE
        if not path.is_file():
            return None
        try:
            return msgspec.json.decode(path.read_bytes(), type=BatchManifest)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ArtifactError(f"{path} is no manifest of a batch run: {error}") from error

    def _foreign_files(self) -> Iterator[Path]:
        """Return what a killed run cannot have left before its manifest was written."""
        return (path for path in self.path.iterdir() if not path.name.startswith("."))
