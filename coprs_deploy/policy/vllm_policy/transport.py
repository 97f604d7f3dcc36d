"""Vectors on their way out of an engine's process: one file a request, in shared memory.

Who asks opens an empty file and names it in the request; the engine appends to it while the request
is decoded; who asked reads and removes it when the last token is there. Nothing is asked of the
engine for it, so nobody waits for an engine that is in the middle of a step. A request that was
abandoned has no file any more, and what the engine still finds for it goes nowhere. The folder of a
process that was killed is removed by the next one.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from coprs_deploy.artifacts import file_lock
from coprs_deploy.closing import Closeable
from coprs_deploy.errors import PolicyError

logger = logging.getLogger(__name__)

SHARED_MEMORY = Path("/dev/shm")

FOLDER_PREFIX = "coprs-deploy-"
LOCK_FILE = ".lock"

YOUNG_SECONDS = 60
"""A folder that was changed since is left alone: its process may not have locked it yet."""


class HiddenStateTransport(Closeable):
    """The files of all requests that one policy has under way.

    Args:
        width: length D of a vector.
        parent: where their folder is made; None takes shared memory, or the folder for temporary
            files where there is none.
    """

    def __init__(self, width: int, parent: Path | None = None) -> None:
        if parent is None and os.access(SHARED_MEMORY, os.W_OK | os.X_OK):
            parent = SHARED_MEMORY
        parent = parent or Path(tempfile.gettempdir())
        _remove_abandoned(parent)
        self._record = _record(width)
        self.folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir=parent))
        self._lock = file_lock(self.folder / LOCK_FILE)
        self._lock.acquire(blocking=False)

    def open(self) -> Path:
        """Make the empty file of one request; no other request ever has it.

        Raises:
            PolicyError: the folder is gone.
        """
        path = self.folder / uuid.uuid4().hex
        try:
            path.touch(mode=0o600, exist_ok=False)
        except FileNotFoundError as error:
            raise PolicyError("the policy was closed") from error
        return path

    @contextmanager
    def for_request(self) -> Iterator[Path]:
        """Make the file of one request, and remove it behind the block if nobody took it."""
        path = self.open()
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def take(self, path: Path) -> NDArray[np.float32]:
        """Read and remove a file; a second time there is nothing.

        Returns:
            (N, D) float32, in the order of their positions. Of several vectors for one position the
            last one counts: a request that was preempted reads its response again.

        Raises:
            ValueError: the file does not hold whole vectors of this width.
        """
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            content = b""
        path.unlink(missing_ok=True)
        if len(content) % self._record.itemsize:
            raise ValueError(
                f"{path.name} holds {len(content)} bytes, which are no whole vectors of "
                f"{self._record['vector'].shape[0]} float32"
            )
        records = np.frombuffer(content, dtype=self._record)
        last = {int(record["position"]): number for number, record in enumerate(records)}
        chosen = [last[position] for position in sorted(last)]
        vectors: NDArray[np.float32] = records["vector"][chosen]
        return vectors

    def __len__(self) -> int:
        """How many requests have a file."""
        return len(list(self.folder.glob("[!.]*")))

    def close(self) -> None:
        """Remove all files."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.release()


def _remove_abandoned(parent: Path) -> None:
    """Remove the folders of processes that were killed; a living one holds the lock in its own."""
    for folder in parent.glob(f"{FOLDER_PREFIX}*"):
        try:
            if time.time() - folder.stat().st_mtime < YOUNG_SECONDS:
                continue
            held = file_lock(folder / LOCK_FILE).acquire(blocking=False)
        except OSError:  # Timeout is one
            continue  # it is in use, belongs to another user, or is gone
        with held:
            shutil.rmtree(folder, ignore_errors=True)


def append_vector(path: str, position: int, vector: NDArray[np.float32]) -> None:
    """Add a vector to a request's file, in one write.

    Nothing happens where the file is gone: the request was abandoned. Where there is no room the
    vector is lost, and a line of the log says so; the engine goes on with its other requests.

    Args:
        path: what :meth:`HiddenStateTransport.open` gave.
        position: index of its token in the response.
        vector: (D,) float32.
    """
    record = np.array((position, vector), dtype=_record(len(vector))).tobytes()
    try:
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
    except FileNotFoundError:
        return
    try:
        written = os.write(file, record)
        if written < len(record):
            os.ftruncate(file, os.fstat(file).st_size - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        logger.error("a vector was lost on its way to %s: %s", path, error)
    finally:
        os.close(file)


def _record(width: int) -> np.dtype[np.void]:
    return np.dtype([("position", np.int64), ("vector", np.float32, (width,))])
