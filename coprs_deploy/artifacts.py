"""Files on disk: atomic writes, locks between processes, and content hashes."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
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

    If the block raises, nothing is left behind and ``path`` is unchanged. What appears at ``path``
    meanwhile is kept, and the block fails. Files and directories get the permissions that the umask
    gives new ones. A mount point, or a directory in a read-only parent, is filled in place.

    Args:
        path: directory to create or replace.
        marker: file that identifies a directory of this kind; no other is ever replaced.
        overwrite: whether an existing directory is replaced.

    Raises:
        ArtifactError: ``path`` exists, and ``overwrite`` is false or it has no marker; or another
            process is writing it.
        OSError: ``path`` cannot be written; its ``errno`` is ``ENOSPC`` on a full disk, whatever
            the block raised.
    """
    path = path.absolute()  # "." has no name
    check_replaceable(path, marker, overwrite)
    with scratch_directory(path, "partial") as partial:
        mode = partial.stat().st_mode & 0o777
        try:
            yield partial
            _reset_modes(partial, mode)
            _sync(partial)
            check_replaceable(path, marker, overwrite)
            _replace(path, partial, marker)
        except Exception as error:
            if _is_full_disk(error):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
            raise


@contextmanager
def scratch_directory(path: Path, kind: str) -> Iterator[Path]:
    """Yield a hidden directory on the file system of ``path``, which is removed at the end.

    Leftovers of killed processes are removed first, and an old directory that one of them moved
    aside is moved back.

    Args:
        path: absolute path that the directory is made for.
        kind: distinguishes several scratch directories of one path; part of the name.

    Raises:
        ArtifactError: another process has one of this kind.
    """
    inside = _is_filled_in_place(path)
    parent = path if inside else path.parent
    parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{path.name}.{kind}"
    lock = parent / f"{prefix}.lock"
    with exclusive(lock, f"{path} is being written by another process; wait for it to end"):
        try:
            for left in parent.glob(f"{glob.escape(f'.{path.name}.old')}-*"):
                _recover(path, left)
            for left in parent.glob(f"{glob.escape(prefix)}-*"):
                _remove(left)
            directory = parent / f"{prefix}-{os.getpid()}"
            directory.mkdir()
            try:
                yield directory
            finally:
                _remove(directory)
        finally:
            lock.unlink(missing_ok=True)


def _is_filled_in_place(path: Path) -> bool:
    """Whether a directory cannot be replaced by a rename in its parent."""
    return path.is_dir() and (os.path.ismount(path) or not os.access(path.parent, os.W_OK))


def _replace(path: Path, partial: Path, marker: str) -> None:
    """Move a written directory to its place; the marker of one that is filled in place is last."""
    old = partial.with_name(f".{path.name}.old-{os.getpid()}")
    if partial.parent != path:
        if not path.exists() or not any(path.iterdir()):
            partial.rename(path)  # fails if files appear in ``path`` at this moment
            return
        old.mkdir()
        path.rename(old / path.name)
        try:
            partial.rename(path)
        except BaseException:
            (old / path.name).rename(path)
            raise
        finally:
            _remove(old)
        return
    old.mkdir()
    for entry in list(_entries(path)):
        entry.rename(old / entry.name)
    for entry in sorted(partial.iterdir(), key=lambda entry: entry.name == marker):
        entry.rename(path / entry.name)
    _remove(old)


def _recover(path: Path, old: Path) -> None:
    """Move a directory back that a killed process moved aside, unless it was replaced."""
    moved = old / path.name
    if moved.exists() and not path.exists():
        moved.rename(path)
    _remove(old)


def _reset_modes(root: Path, mode: int) -> None:
    """Give copied and library-written files the permissions of new ones."""
    for path in (root, *root.rglob("*")):
        if not path.is_symlink():
            path.chmod(mode if path.is_dir() else mode & 0o666)


def _is_full_disk(error: BaseException) -> bool:
    """Whether an error, which need not be an ``OSError``, reports a full disk or quota."""
    return any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT))


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
    is_empty = path.is_dir() and not any(_entries(path))
    if not is_empty and not (path / marker).is_file():
        raise ArtifactError(
            f"{path} exists and has no {marker}: it is not replaced; choose another name"
        )
    if not is_empty and not overwrite:
        raise ArtifactError(
            f"{path} exists; pass --overwrite to replace it, or choose another name"
        )


def _entries(path: Path) -> Iterator[Path]:
    """List a directory without what its file system or an unfinished write keeps there."""
    for entry in path.iterdir():
        if entry.name != "lost+found" and not entry.name.startswith(f".{path.name}."):
            yield entry


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def record_files(root: Path, parts: Collection[str] | None = None) -> tuple[FileRecord, ...]:
    """Hash the files below a directory in parallel; sorted by path.

    Hidden files and directories do not count: a model hub keeps its own notes in them.

    Args:
        root: the directory.
        parts: names of its files and directories to hash; None hashes all.
    """

    def counts(path: Path) -> bool:
        names = path.relative_to(root).parts
        is_hidden = any(name.startswith(".") for name in names)
        return path.is_file() and not is_hidden and (parts is None or names[0] in parts)

    paths = sorted(filter(counts, root.rglob("*")))

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
    """Remove a file or a directory, read-only ones included; nothing happens if it is missing."""
    if path.is_dir() and not path.is_symlink():
        path.chmod(0o700)
        for top, names, _ in os.walk(path):
            for name in names:
                if not (directory := Path(top, name)).is_symlink():
                    directory.chmod(0o700)
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
