"""The user's cache folder: blobs by name, locks between processes, a size limit.

    engines/<key>/            compiled engines with their records, see ``engines/trt/cache.py``
    timing/<name>             kernel timings of TensorRT
    runtime/<name>            kernels that TensorRT for RTX compiled on a GPU
    openvino/                 graphs that OpenVINO compiled
    autotune/<key>            runtimes that were measured as the fastest
    calibration/<name>        int8 calibration ranges
    locks/<name>              one lock file a writer

Readers see whole files only. A process that is killed releases its locks.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import platformdirs
from filelock import FileLock, Timeout

from coprs_deploy.artifacts import atomic_write, file_lock

CACHE_VARIABLE = "COPRS_DEPLOY_CACHE"
"""Environment variable that overrides the cache folder."""

ENGINE_FOLDER = "engines"
LOCK_FOLDER = "locks"
RECORD_FILE = "record.json"
"""Marks a complete engine folder; its modification time is the last use."""


def default_cache_dir() -> Path:
    """Return ``$COPRS_DEPLOY_CACHE``, or ``coprs-deploy`` in the user's cache folder.

    A user without a home directory, as in a container, gets a folder in the temporary directory.
    """
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen)
    try:
        return platformdirs.user_cache_path("coprs-deploy", appauthor=False)
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"coprs-deploy-{os.getuid()}"


class Cache:
    """A cache folder that processes share.

    Args:
        root: the folder; None selects :func:`default_cache_dir`.
    """

    def __init__(self, root: Path | None = None) -> None:
        self.root = (root or default_cache_dir()).absolute()

    def load_blob(self, folder: str, name: str) -> bytes | None:
        """Read a blob; None if it is not in the cache or cannot be read."""
        try:
            return (self.root / folder / name).read_bytes()
        except OSError:
            return None

    def save_blob(self, folder: str, name: str, data: bytes) -> None:
        """Write or replace a blob; concurrent readers see the old or the new one.

        Nothing that can be computed again depends on the cache: one that cannot be written is
        reported as a warning.
        """
        path = self.root / folder / name
        try:
            with self.lock(f"{folder}-{name}"):
                path.parent.mkdir(parents=True, exist_ok=True)
                with atomic_write(path) as partial:
                    partial.write_bytes(data)
        except OSError as error:
            self.warn_unwritable(error)

    def warn_unwritable(self, error: OSError | None = None) -> None:
        """Warn that files cannot be added, and name the variable that selects another folder."""
        reason = f" ({error.strerror or error})" if error else ""
        warnings.warn(
            f"the cache {self.root} cannot be written{reason}; set {CACHE_VARIABLE} to another "
            "folder",
            stacklevel=3,
        )

    def is_writable(self, folder: str = ".") -> bool:
        """Whether files can be added to a folder, which is created if it is missing."""
        try:
            for path in (self.root / folder, self.root / LOCK_FOLDER):
                path.mkdir(parents=True, exist_ok=True)
                if not os.access(path, os.W_OK | os.X_OK):
                    return False
        except OSError:
            return False
        return True

    def blobs(self, folder: str) -> list[Path]:
        """List the files in a folder of the cache."""
        return sorted((self.root / folder).glob("[!.]*"))

    def size_bytes(self) -> int:
        """Return the total size of all files in the cache."""
        total = 0
        for path in self.root.rglob("*"):
            with suppress(OSError):  # another process may remove it meanwhile
                total += path.stat().st_size if path.is_file() else 0
        return total

    def prune(self, max_bytes: int) -> int:
        """Remove the least recently used engines until the cache, blobs included, fits in a limit.

        Leftovers of killed builds are removed as well; engines that another process is building or
        copying are not.

        Returns:
            Number of removed engines.
        """
        folder = self.root / ENGINE_FOLDER
        if not self.is_writable(ENGINE_FOLDER):
            self.warn_unwritable()
            return 0
        for partial in folder.glob(".*.partial-*"):
            with self._try_lock(partial.name[1:].partition(".")[0]) as is_free:
                if is_free:
                    shutil.rmtree(partial, ignore_errors=True)
        num_removed, total = 0, self.size_bytes()
        for entry in sorted(folder.glob("[!.]*"), key=_last_use):
            if total <= max_bytes:
                break
            with self._try_lock(entry.name) as is_free:
                if is_free:
                    total -= sum(path.stat().st_size for path in entry.iterdir())
                    shutil.rmtree(entry, ignore_errors=True)
                    num_removed += 1
        return num_removed

    @contextmanager
    def lock(self, name: str, on_wait: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Hold a lock between processes; ``on_wait`` is called once if another one holds it."""
        lock = self._lock_of(name)
        try:
            held = lock.acquire(blocking=False)
        except Timeout:
            on_wait()
            held = lock.acquire()
        with held:
            yield

    @contextmanager
    def _try_lock(self, name: str) -> Iterator[bool]:
        """Hold a lock without waiting; yields False if another process holds it."""
        try:
            held = self._lock_of(name).acquire(blocking=False)
        except Timeout:
            yield False
            return
        with held:
            yield True

    def _lock_of(self, name: str) -> FileLock:
        path = self.root / LOCK_FOLDER / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return file_lock(path)


def graph_files(path: Path) -> list[Path]:
    """List the files of an ONNX graph: itself, and its external weights if it has any."""
    weights = path.with_name(f"{path.name}.data")
    return [path, weights] if weights.exists() else [path]


def graph_bytes(path: Path) -> int:
    """Return the size of an ONNX graph, external weights included."""
    return sum(file.stat().st_size for file in graph_files(path))


def _last_use(entry: Path) -> float:
    try:
        return (entry / RECORD_FILE).stat().st_mtime
    except OSError:  # no record: nothing can use the folder, so it goes first
        return 0.0
