"""The output folder of a batch run: its manifest, and part files that are there or not.

    OUT/manifest.json           what is run: bundle, options, source; written before the first row
    OUT/part-00000.parquet      rows 0 to N-1 of the source, and so on
    OUT/masks/000000000-1.png   with saved masks: row and number of the target

A part file has all of its rows or does not exist; :mod:`coprs_deploy.batch.folders` says how. A run
goes on with the parts that are missing, wherever they are made.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from coprs_deploy.batch.folders import in_memory, open_folder
from coprs_deploy.batch.rows import OutputRow, encode_part, read_part, read_part_notes
from coprs_deploy.data.rows import import_pyarrow
from coprs_deploy.errors import ArtifactError
from coprs_deploy.specs import Record

MANIFEST_FILE, MASK_FOLDER = "manifest.json", "masks"

FILES_AT_ONCE = 16
"""Part files whose notes are read at the same time."""


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
        path: path or URL of the folder.
        manifest: what is run.

    Raises:
        MissingDependencyError: it is a URL, and fsspec or its protocol's package is not installed.
    """

    def __init__(self, path: str | Path, manifest: BatchManifest) -> None:
        self._folder, self.manifest = open_folder(path), manifest
        self.path = self._folder.location

    @property
    def mask_folder(self) -> str:
        """Folder of saved masks."""
        return self._folder.below(MASK_FOLDER)

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
        self._folder.check_writable()
        found = self._read_manifest()
        if found is not None and not resume:
            raise ArtifactError(
                f"{self.path} has a batch run; pass --resume to go on with it, or choose another "
                "name"
            )
        if found is None and self._folder.names():
            raise ArtifactError(
                f"{self.path} has files and no {MANIFEST_FILE}: it is no batch run; choose another "
                "name"
            )
        if found is not None and found != self.manifest:
            raise ArtifactError(
                f"{self.path} has another run: {'; '.join(found.differences(self.manifest))}; pass "
                "the same arguments, or choose another name"
            )
        self._folder.create()
        with self._folder.exclusive():
            if found is None:
                content = json.dumps(self.manifest.to_json(), indent=2, ensure_ascii=False) + "\n"
                self._folder.write(MANIFEST_FILE, content.encode())
            yield

    def part_rows(self, part: int) -> range:
        """Return the numbers of the rows of a part."""
        size = self.manifest.rows_per_file
        return range(part * size, min((part + 1) * size, self.manifest.num_rows))

    def count_failed(self) -> dict[int, int]:
        """Return the number of failed rows of each part that exists.

        Raises:
            ArtifactError: a file is damaged, or belongs to another run.
        """
        names = set(self._folder.names())
        parts = [n for n in range(self.manifest.num_parts) if part_name(n) in names]
        with ThreadPoolExecutor(FILES_AT_ONCE, thread_name_prefix="parts") as pool:
            return dict(zip(parts, pool.map(self._count_failed, parts), strict=True))

    def _count_failed(self, part: int) -> int:
        path = self._folder.below(part_name(part))
        with self._folder.open(part_name(part)) as file:
            fingerprint, num_rows, num_failed = read_part_notes(path, file)
        if fingerprint != self.manifest.fingerprint or num_rows != len(self.part_rows(part)):
            raise ArtifactError(f"{path} belongs to another run; remove it, and pass --resume")
        return num_failed

    def write_part(self, part: int, rows: Sequence[OutputRow]) -> None:
        """Write a part file, which replaces an earlier one when it is complete."""
        assert [row.row for row in rows] == [*self.part_rows(part)], "each row of the part once"
        self._folder.write(part_name(part), encode_part(rows, self.manifest.fingerprint))

    def read_part(self, part: int) -> list[OutputRow]:
        """Read the rows of a part file."""
        name = part_name(part)
        return read_part(self._folder.below(name), in_memory(self._folder.open(name)))

    def rows(self) -> Iterator[OutputRow]:
        """Yield the rows of a complete run in the order of the source."""
        for part in range(self.manifest.num_parts):
            yield from self.read_part(part)

    def _read_manifest(self) -> BatchManifest | None:
        try:
            content = in_memory(self._folder.open(MANIFEST_FILE)).read()
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            return msgspec.json.decode(content, type=BatchManifest)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            path = self._folder.below(MANIFEST_FILE)
            raise ArtifactError(f"{path} is no manifest of a batch run: {error}") from error


def part_name(part: int) -> str:
    """Return the name of a part file."""
    return f"part-{part:05d}.parquet"
