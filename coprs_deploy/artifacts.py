"""Files on disk: atomic writes, locks between processes, and content hashes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from coprs_deploy.errors import ArtifactError
from coprs_deploy.specs import Record


class FileRecord(Record, frozen=True):
    """File with its path below the directory (forward slashes), size in bytes and SHA-256."""

    path: str
    size_bytes: int
    sha256: str


@contextmanager
def new_directory(path: Path, marker: str, overwrite: bool = False) -> Iterator[Path]:
    """Yield a hidden directory that replaces ``path`` when the block succeeds.

    If the block raises, nothing is left behind and ``path`` is unchanged.

    Args:
        path: directory to create or replace.
        marker: file that identifies a directory of this kind; no other is ever replaced.
        overwrite: whether an existing directory is replaced.

    Raises:
        ArtifactError: ``path`` exists, and ``overwrite`` is false or it has no marker.
    """
    path = path.absolute()  # "." has no name
    check_replaceable(path, marker, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.parent))
    partial.chmod(0o755)
    try:
        yield partial
        _sync(partial)
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old-", dir=path.parent))
            path.rename(old / path.name)
            try:
                partial.rename(path)
            except BaseException:
                (old / path.name).rename(path)
                raise
            finally:
                shutil.rmtree(old, ignore_errors=True)
        else:
            partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a hidden path that replaces ``path`` when the block succeeds.

    Readers see the complete old or new file. If the block raises, nothing is left behind and
    ``path`` is unchanged; leftovers of a killed process are overwritten. Two processes must not
    write the same path at the same time.

    Args:
        path: a file, which may exist, or a directory, which must not.
    """
    partial = path.with_name(f".{path.name}.partial")
    _remove(partial)
    try:
        yield partial
        _sync(partial)
        partial.replace(path)
    finally:
        _remove(partial)


def file_lock(path: Path) -> FileLock:
    """Return the lock between processes for a lock file, whose directory must exist.

    The system releases it when the process ends, even if killed; the empty file remains.
    ``preserve_lock_file`` also prevents the library's fallback to a marker file, which a killed
    process would leave behind, on file systems without locks. Threads share the lock object.
    """
    return FileLock(path, thread_local=False, preserve_lock_file=True)


@contextmanager
def exclusive(lock: Path, taken: str) -> Iterator[None]:
    """Hold a lock file, which remains, during a block; it is released if the process dies.

    Raises:
        ArtifactError: another process holds it; the message is ``taken``.
    """
    try:
        held = file_lock(lock).acquire(blocking=False)
    except Timeout as error:
        raise ArtifactError(taken) from error
    with held:
        yield


def check_replaceable(path: Path, marker: str, overwrite: bool) -> None:
    """Check early whether :func:`new_directory` would accept a path.

    Raises:
        ArtifactError: ``path`` exists, and ``overwrite`` is false or it is not a directory with
            the marker file.
    """
    if not path.exists() and not path.is_symlink():
        return
    if not path.is_dir() or (any(path.iterdir()) and not (path / marker).is_file()):
        raise ArtifactError(
            f"{path} exists and has no {marker}: it is not replaced; choose another name"
        )
    if any(path.iterdir()) and not overwrite:
        raise ArtifactError(
            f"{path} exists; pass --overwrite to replace it, or choose another name"
        )


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def record_files(root: Path) -> tuple[FileRecord, ...]:
    """Hash every file below a directory in parallel; sorted by path."""
    paths = sorted(p for p in root.rglob("*") if p.is_file())

    def record(path: Path) -> FileRecord:
        name = path.relative_to(root).as_posix()
        return FileRecord(name, path.stat().st_size, hash_file(path))

    with ThreadPoolExecutor() as pool:
        return tuple(pool.map(record, paths))


def fingerprint(files: tuple[FileRecord, ...]) -> str:
    """Hash the paths and contents of a set of files, independent of their order."""
    lines = (f"{file.sha256}  {file.path}\n" for file in sorted(files, key=lambda f: f.path))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write indented JSON with a final newline, atomically."""
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _sync(written: Path) -> None:
    """Flush a file, or all files of a directory, to disk, so that they survive a power loss."""
    for path in (written, *written.rglob("*")):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
