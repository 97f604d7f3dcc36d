"""Files on disk: atomic writes, locks between processes, and content hashes."""

from __future__ import annotations

import errno
import glob
import hashlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from coprs_deploy.errors import ArtifactError
from coprs_deploy.specs import Record

LOCK_FILE = ".lock"
"""Lock of a temporary directory."""


class FileRecord(Record, frozen=True):
    """File with its path below the directory (forward slashes), size in bytes and SHA-256."""

    path: str
    size_bytes: int
    sha256: str


@contextmanager
def new_directory(path: Path, marker: str, overwrite: bool = False) -> Iterator[Path]:
    """Yield a hidden directory whose content takes the place of ``path`` when the block succeeds.

    If the block raises, nothing is left behind and ``path`` is unchanged. What appears at ``path``
    meanwhile is kept, and the block fails. Files and directories get the permissions that the umask
    gives new ones. A directory that exists is filled in place, so that it may be a mount point, a
    working directory, or the target of a link.

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
    path = Path(os.path.realpath(path))
    check_replaceable(path, marker, overwrite)
    with scratch_directory(path, "partial") as scratch, _named_if_full(path):
        check_replaceable(path, marker, overwrite)  # after leftovers were removed
        new = scratch / NEW
        new.mkdir()
        mode = new.stat().st_mode & 0o777
        yield new
        _reset_modes(new, mode)
        _sync(new)
        check_replaceable(path, marker, overwrite)
        if path.exists():
            _replace_entries(path, scratch, marker)
        else:
            new.rename(path)


@contextmanager
def scratch_directory(path: Path, kind: str) -> Iterator[Path]:
    """Yield a hidden directory on the file system of ``path``, which is removed at the end.

    It lies in ``path`` if that is a directory, else beside it. Leftovers of killed processes are
    removed first; a replacement that one of them began is undone.

    Args:
        path: path that the directory is made for.
        kind: distinguishes several scratch directories of one path; part of the name.

    Raises:
        ArtifactError: another process has one of this kind.
    """
    path = Path(os.path.realpath(path))
    prefix = _hidden(path) + kind
    path.parent.mkdir(parents=True, exist_ok=True)
    places = [path] if path.is_dir() else []
    if not places or os.access(path.parent, os.W_OK):
        places.append(path.parent)
    with ExitStack() as stack:
        for place in places:
            lock = place / f"{prefix}.lock"
            taken = f"{path} is being written by another process; wait for it to end"
            stack.enter_context(exclusive(lock, taken))
            stack.callback(lock.unlink, missing_ok=True)
            for left in place.glob(f"{glob.escape(prefix)}-*"):
                _remove_scratch(path, left)
        directory = places[0] / f"{prefix}-{os.getpid()}"
        stack.callback(_remove_scratch, path, directory)
        directory.mkdir()
        yield directory


NEW, OLD, NAMES = "new", "old", "names.json"
"""In the scratch directory of a replacement: what moves in, what moved out, names of the first."""


def _replace_entries(path: Path, scratch: Path, marker: str) -> None:
    """Replace the content of a directory; its marker disappears first and appears last.

    Whether this fails or the process is killed, :func:`_remove_scratch` completes or undoes it.
    """
    names = sorted(os.listdir(scratch / NEW), key=lambda name: name == marker)  # noqa: PTH208
    (scratch / NAMES).write_text(json.dumps(names), encoding="utf-8")
    (scratch / OLD).mkdir()
    for written in (scratch / NAMES, scratch / OLD):  # on the disk before any rename is
        _sync(written)
    for entry in sorted(_entries(path), key=lambda entry: entry.name != marker):
        entry.rename(scratch / OLD / entry.name)
    for name in names:
        (scratch / NEW / name).rename(path / name)


def _remove_scratch(path: Path, scratch: Path) -> None:
    """Remove a scratch directory; a replacement of the content of ``path`` is undone if unfinished.

    May be interrupted at any point and called again.
    """
    new, old = scratch / NEW, scratch / OLD
    if old.is_dir() and new.is_dir() and any(new.iterdir()):
        for name in json.loads((scratch / NAMES).read_text(encoding="utf-8")):
            if not (new / name).exists():
                (path / name).rename(new / name)
        for entry in old.iterdir():
            entry.rename(path / entry.name)
        old.rmdir()
    _remove(scratch)


def _reset_modes(root: Path, mode: int) -> None:
    """Give copied and library-written files the permissions of new ones."""
    for path in (root, *root.rglob("*")):
        if not path.is_symlink():
            path.chmod(mode if path.is_dir() else mode & 0o666)


@contextmanager
def _named_if_full(path: Path) -> Iterator[None]:
    """Let any error that reports a full disk or quota be an ``OSError`` that names the path."""
    try:
        yield
    except Exception as error:
        if any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a hidden path that replaces ``path`` when the block succeeds.

    Readers see the complete old or new file; of several processes or threads that write it the last
    one wins. If the block raises, nothing is left behind and ``path`` is unchanged; leftovers of
    killed processes are removed. A link is followed. A device or pipe is written directly.

    Args:
        path: a file, which may exist, or a directory, which must not.

    Raises:
        OSError: ``path`` cannot be written; its ``errno`` is ``ENOSPC`` on a full disk, whatever
            the block raised.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file() and not path.is_dir():
        yield path
        return
    prefix = f"{_hidden(path)}new-"
    partial = path.with_name(f"{prefix}{os.getpid()}-{next(_numbers)}")
    _in_progress.add(partial)
    try:
        for left in path.parent.glob(f"{glob.escape(prefix)}*"):
            process = left.name.removeprefix(prefix).partition("-")[0]
            if left not in _in_progress and process.isdecimal() and _has_ended(int(process)):
                _remove(left)
        with _named_if_full(path):
            yield partial
            _sync(partial)
            _move_to(partial, path)
    finally:
        _remove(partial)
        _in_progress.discard(partial)


_numbers = itertools.count()
_in_progress: set[Path] = set()
"""Files that threads of this process write; an earlier process may have had its number."""


def _has_ended(process: int) -> bool:
    return process == os.getpid() or not psutil.pid_exists(process)


def _move_to(partial: Path, path: Path) -> None:
    try:
        partial.replace(path)
    except OSError as error:
        if error.errno != errno.EBUSY or not path.is_file():
            raise
        shutil.copyfile(partial, path)  # a file that is a mount point cannot be replaced


def _hidden(path: Path) -> str:
    """Return the start of the names of hidden files that belong to a path."""
    name = os.path.basename(os.path.realpath(path))  # noqa: PTH119  # "." has no name
    encoded = os.fsencode(name)
    return f".{name if len(encoded) < 200 else hashlib.sha256(encoded).hexdigest()}."


@contextmanager
def temporary_directory(prefix: str, parent: Path | None = None) -> Iterator[Path]:
    """Yield a temporary directory; those of killed processes are removed first.

    Args:
        prefix: start of its name, by which those of killed processes are found.
        parent: folder that it is made in; None for the system's folder for temporary files.
    """
    parent = parent or Path(tempfile.gettempdir())
    for lock in parent.glob(f"{glob.escape(prefix)}*/{LOCK_FILE}"):
        with suppress(OSError):  # in use (Timeout is one), or already removed
            if lock.stat().st_uid == os.getuid():
                held = file_lock(lock).acquire(blocking=False)
                with held:
                    _remove(lock.parent)
    # It gets the name that is searched for when it is locked.
    folder = Path(tempfile.mkdtemp(prefix=f".{prefix}", dir=parent))
    try:
        with file_lock(folder / LOCK_FILE).acquire(blocking=False):
            folder = folder.rename(parent / folder.name.removeprefix("."))
            yield folder
    finally:
        _remove(folder)


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
            the marker file; or its name is not UTF-8.
        OSError: nothing can be written there.
    """
    path = Path(os.path.realpath(path))  # the target of a link, which need not exist
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise ArtifactError(
            f"{str(path)!r} is not UTF-8, which libraries that open graphs and tokenizers need; "
            "choose another name"
        ) from error
    if path.exists() or path.is_symlink():
        is_empty = path.is_dir() and not any(_entries(path))
        if not is_empty and not (path / marker).is_file() and not _is_unfinished(path):
            raise ArtifactError(
                f"{path} exists and has no {marker}: it is not replaced; choose another name"
            )
        if not is_empty and not overwrite and not _is_unfinished(path):
            raise ArtifactError(
                f"{path} exists; pass --overwrite to replace it, or choose another name"
            )
    check_writable(path)


def check_writable(path: Path, *, is_file: bool = False) -> None:
    """Check early whether a directory, which need not exist, or a file in it can be written.

    Raises:
        OSError: it cannot; the error names the file or directory that is in the way.
    """
    path = Path(os.path.realpath(path))
    if is_file and path.exists() and not path.is_file() and not path.is_dir():
        return  # a device or pipe
    if is_file and not path.is_dir():
        path = path.parent
    elif is_file:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    found = next(place for place in (path, *path.parents) if place.exists())
    number = errno.EACCES
    if not found.is_dir():
        number = errno.ENOTDIR
    elif os.access(found, os.W_OK | os.X_OK):
        return
    elif os.statvfs(found).f_flag & os.ST_RDONLY:
        number = errno.EROFS
    raise OSError(number, os.strerror(number), str(found))


def _is_unfinished(path: Path) -> bool:
    """Whether a killed process was replacing the content of a directory."""
    pattern = f"{glob.escape(_hidden(path))}partial-*/{OLD}"
    real = Path(os.path.realpath(path))
    return any(any(place.glob(pattern)) for place in (real, real.parent))


def make_directory(path: Path) -> None:
    """Create a directory and its parents, or that which a link points to, if they are missing."""
    Path(os.path.realpath(path)).mkdir(parents=True, exist_ok=True)


def _entries(path: Path) -> Iterator[Path]:
    """List a directory without what its file system or an unfinished write keeps there."""
    for entry in path.iterdir():
        if entry.name != "lost+found" and not entry.name.startswith(_hidden(path)):
            yield entry


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def record_files(root: Path, parts: Collection[str] | None = None) -> tuple[FileRecord, ...]:
    """Hash the files below a directory in parallel; sorted by path.

    Links are followed, to directories too. Hidden files and directories do not count: a model hub
    keeps its own notes in them.

    Args:
        root: the directory.
        parts: names of its files and directories to hash; None hashes all.
    """

    def counts(path: Path) -> bool:
        names = path.relative_to(root).parts
        is_hidden = any(name.startswith(".") for name in names)
        return path.is_file() and not is_hidden and (parts is None or names[0] in parts)

    walked = os.walk(root, followlinks=True)
    found = (Path(folder, name) for folder, _, names in walked for name in names)
    paths = sorted(filter(counts, found))

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
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically; bytes of paths that are not UTF-8 as escapes, as in JSON."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


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
