"""Directories that are written whole or not at all, and the hashes of the files in them."""

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
    """One file: its path below the directory (with forward slashes), its size and SHA-256."""

    path: str
    size_bytes: int
    sha256: str


@contextmanager
def new_directory(path: Path, marker: str, overwrite: bool = False) -> Iterator[Path]:
    """Give a hidden directory beside ``path`` that takes its place when the block ends well.

    When the block raises, nothing is left behind and what stood at ``path`` is untouched.

    Args:
        path: where the directory shall stand.
        marker: the file that marks a directory of this kind; only such a one is overwritten.
        overwrite: whether an existing directory may be replaced.

    Raises:
        ArtifactError: ``path`` exists and may not, or must not, be replaced.
    """
    path = path.absolute()  # "." has no name of its own
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
    """Give a hidden path beside ``path``; what is written there takes its place at the end.

    A reader sees the old or the new file, whole. If the block raises, nothing is left behind and
    what was at ``path`` is untouched; what a killed process left is overwritten by the next one.
    Two processes must not write one path at a time.

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
    """Return the lock between processes that a file stands for; the folder must exist.

    The system releases it when its process ends, however it ends; the file stays behind, empty.
    ``preserve_lock_file`` also keeps the library from falling back to a marker file, which a killed
    process would leave behind, where the file system has no locks. Threads share the lock object.
    """
    return FileLock(path, thread_local=False, preserve_lock_file=True)


@contextmanager
def exclusive(lock: Path, taken: str) -> Iterator[None]:
    """Hold a lock file for the length of a block; a process that dies lets go of it.

    Args:
        lock: the file; it stays behind, empty.
        taken: what the error says where another process holds it.

    Raises:
        ArtifactError: another process holds it.
    """
    try:
        held = file_lock(lock).acquire(blocking=False)
    except Timeout as error:
        raise ArtifactError(taken) from error
    with held:
        yield


def check_replaceable(path: Path, marker: str, overwrite: bool) -> None:
    """Refuse early what :func:`new_directory` would refuse.

    Raises:
        ArtifactError: ``path`` exists and ``overwrite`` is false, or it is something else than a
            directory with the marker file.
    """
    if not path.exists() and not path.is_symlink():
        return
    if not path.is_dir() or (any(path.iterdir()) and not (path / marker).is_file()):
        raise ArtifactError(
            f"{path} exists and holds no {marker}: it is not replaced; choose another name"
        )
    if any(path.iterdir()) and not overwrite:
        raise ArtifactError(
            f"{path} exists; pass --overwrite to replace it, or choose another name"
        )


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def record_files(root: Path, below: str = "") -> tuple[FileRecord, ...]:
    """Hash every file under ``root / below``, sorted by path; several at a time."""
    paths = sorted(p for p in (root / below).rglob("*") if p.is_file())

    def record(path: Path) -> FileRecord:
        name = path.relative_to(root).as_posix()
        return FileRecord(name, path.stat().st_size, hash_file(path))

    with ThreadPoolExecutor() as pool:
        return tuple(pool.map(record, paths))


def fingerprint(files: tuple[FileRecord, ...]) -> str:
    """Name a set of files by their paths and contents."""
    lines = (f"{file.sha256}  {file.path}\n" for file in sorted(files, key=lambda f: f.path))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write indented JSON that ends with a newline, see :func:`atomic_write`."""
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _sync(written: Path) -> None:
    """Push a file, or all in a directory, to the disk, so that it survives a loss of power."""
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
