"""Folders that a run writes to: on this machine, or at a URL through fsspec.

A file is there as a whole or not at all. On this machine and on remote file systems it is written
under a hidden name and renamed; an object store shows an object when all of it was received, so
that it gets its name at once.
"""

from __future__ import annotations

import io
import json
import os
import socket
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import psutil

from coprs_deploy.artifacts import atomic_write, check_writable, exclusive, make_directory
from coprs_deploy.batch.files import filesystem_of, is_url
from coprs_deploy.errors import ArtifactError

LOCK_FILE = ".lock"

OBJECT_STORES = frozenset(
    {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "oci", "memory"}
)
"""Protocols of which an object appears when it is complete."""

LEASE_S = 60.0
"""Age of a lock at a URL from which its process counts as ended."""

PENDING = ".pending-"


def open_folder(location: str | Path) -> Folder:
    """Return the folder at a path or URL, which need not exist."""
    text = str(location)
    return RemoteFolder(text) if is_url(text) else LocalFolder(Path(location))


class Folder(ABC):
    """A folder that files are written to and read from by name.

    Attributes:
        location: path or URL.
    """

    location: str

    @abstractmethod
    def check_writable(self) -> None:
        """Check early whether it can be written; OSError if not."""

    @abstractmethod
    def create(self) -> None:
        """Create the folder and its parents where they are missing."""

    @abstractmethod
    def names(self) -> list[str]:
        """List files and folders in it, without hidden ones; empty if it does not exist."""

    @abstractmethod
    def open(self, name: str) -> IO[bytes]:
        """Open a file for reading; FileNotFoundError if it does not exist."""

    @abstractmethod
    def write(self, name: str, content: bytes) -> None:
        """Write a file, which replaces an earlier one when it is complete."""

    @abstractmethod
    def exclusive(self) -> AbstractContextManager[None]:
        """Hold the folder during a block; ArtifactError if another process does."""

    @abstractmethod
    def below(self, name: str) -> str:
        """Return the location of a folder in it."""


class LocalFolder(Folder):
    """A folder of this machine's file systems."""

    def __init__(self, path: Path) -> None:
        self._path, self.location = path, str(path)

    def check_writable(self) -> None:
        """See :class:`Folder`."""
        check_writable(self._path)

    def create(self) -> None:
        """See :class:`Folder`."""
        make_directory(self._path)

    def names(self) -> list[str]:
        """See :class:`Folder`."""
        if not self._path.is_dir():
            return []
        return sorted(p.name for p in self._path.iterdir() if not p.name.startswith("."))

    def open(self, name: str) -> IO[bytes]:
        """See :class:`Folder`."""
        return (self._path / name).open("rb")

    def write(self, name: str, content: bytes) -> None:
        """See :class:`Folder`."""
        with atomic_write(self._path / name) as partial:
            partial.write_bytes(content)

    def exclusive(self) -> AbstractContextManager[None]:
        """See :class:`Folder`."""
        return exclusive(self._path / LOCK_FILE, _taken(self.location))

    def below(self, name: str) -> str:
        """See :class:`Folder`."""
        return str(self._path / name)


class RemoteFolder(Folder):
    """A folder of a file system of fsspec.

    Raises:
        MissingDependencyError: fsspec, or the package of the protocol, is not installed.
    """

    def __init__(self, url: str) -> None:
        self.location = url.rstrip("/")
        self._files, self._path = filesystem_of(self.location)
        protocol = self._files.protocol
        protocols = {protocol} if isinstance(protocol, str) else set(protocol)
        self._is_object_store = bool(protocols & OBJECT_STORES)

    def check_writable(self) -> None:
        """See :class:`Folder`; a lock is written before the first row, which shows it."""

    def create(self) -> None:
        """See :class:`Folder`."""
        if not self._is_object_store:
            self._files.makedirs(self._path, exist_ok=True)

    def names(self) -> list[str]:
        """See :class:`Folder`."""
        return [name for name in self._all_names() if not name.startswith(".")]

    def open(self, name: str) -> IO[bytes]:
        """See :class:`Folder`."""
        file: IO[bytes] = self._files.open(f"{self._path}/{name}", "rb")
        return file

    def write(self, name: str, content: bytes) -> None:
        """See :class:`Folder`."""
        path = f"{self._path}/{name}"
        if self._is_object_store:
            self._files.pipe_file(path, content)
            return
        pending = f"{self._path}/{PENDING}{uuid.uuid4().hex}-{name}"
        try:
            self._files.pipe_file(pending, content)
            if self._files.exists(path):
                self._files.rm_file(path)  # not every file system replaces what is there
            self._files.mv(pending, path)
        finally:
            with suppress(FileNotFoundError):
                self._files.rm_file(pending)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """See :class:`Folder`; files that killed processes left pending are removed.

        The lock is an object with the time of its last renewal: no protocol has one that ends with
        its process. Two processes that took it in the same moment would do the work twice, and
        still leave each part once.
        """
        lock = _Lease(self._files, f"{self._path}/{LOCK_FILE}", self.location)
        with lock:
            for name in self._all_names():
                if name.startswith(PENDING):
                    with suppress(FileNotFoundError):
                        self._files.rm_file(f"{self._path}/{name}")
            yield

    def below(self, name: str) -> str:
        """See :class:`Folder`."""
        return f"{self.location}/{name}"

    def _all_names(self) -> list[str]:
        self._files.invalidate_cache()  # another process may have written
        try:
            listed = self._files.ls(self._path, detail=False)
        except FileNotFoundError:
            return []
        names = {path.rstrip("/").rpartition("/")[2] for path in listed}
        return sorted(names)


class _Lease:
    """A lock object that a thread renews, and that is free again some time after its process."""

    def __init__(self, files: Any, path: str, location: str) -> None:
        self._files, self._path, self._location = files, path, location
        self._owner = uuid.uuid4().hex
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def __enter__(self) -> None:
        if (found := self._read()) is not None and self._is_held(found):
            raise ArtifactError(
                f"{_taken(self._location)}, process {found.get('process')} on "
                f"{found.get('host')}; the lock of a killed process ends after {LEASE_S:.0f} s"
            )
        self._write()
        self._thread.start()

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()
        if (self._read() or {}).get("owner") == self._owner:
            with suppress(FileNotFoundError):
                self._files.rm_file(self._path)

    def _renew(self) -> None:
        while not self._ended.wait(LEASE_S / 4):
            with suppress(OSError):  # the next renewal may succeed
                self._write()

    def _write(self) -> None:
        state = {
            "owner": self._owner,
            "host": socket.gethostname(),
            "process": os.getpid(),
            "renewed": time.time(),
        }
        self._files.pipe_file(self._path, json.dumps(state).encode())

    def _read(self) -> dict[str, Any] | None:
        try:
            found = json.loads(self._files.cat_file(self._path))
        except (FileNotFoundError, ValueError):  # ValueError: it is being written
            return None
        return found if isinstance(found, dict) else None

    @staticmethod
    def _is_held(found: dict[str, Any]) -> bool:
        if found.get("host") == socket.gethostname() and not psutil.pid_exists(
            int(found.get("process", 0))
        ):
            return False
        return time.time() - float(found.get("renewed", 0)) < LEASE_S


def _taken(location: str) -> str:
    return f"{location} is being written by another process; wait for it to end"


def in_memory(file: IO[bytes]) -> IO[bytes]:
    """Read a file to its end, which is fewer requests than reading a remote file in pieces."""
    with file:
        return io.BytesIO(file.read())
