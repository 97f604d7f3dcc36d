"""Transport of hidden states out of the engine's process: one file per request, in shared memory.

The policy creates an empty file and names it in the request, the engine appends to it during
decoding, and the policy reads and removes it after the last token. No call into the engine is
needed, so no request waits for a running engine step. The file of an abandoned request is removed,
and the engine then drops its hidden states. The folder of a killed process is removed by the next
process.
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

MIN_ABANDONED_AGE_S = 60
"""Younger folders are never removed: their process may not hold the lock yet."""


class HiddenStateTransport(Closeable):
    """Folder with one file per request, through which hidden states leave the engine's process.

    Args:
        hidden_size: hidden size D of the policy.
        parent: parent of the folder; None takes shared memory, or the folder for temporary files
            if there is no shared memory.
    """

    def __init__(self, hidden_size: int, parent: Path | None = None) -> None:
        if parent is None and os.access(SHARED_MEMORY, os.W_OK | os.X_OK):
            parent = SHARED_MEMORY
        parent = parent or Path(tempfile.gettempdir())
        _remove_abandoned(parent)
        self._record = _record(hidden_size)
        self.folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir=parent))
        self._lock = file_lock(self.folder / LOCK_FILE)
        self._lock.acquire(blocking=False)

    def create(self) -> Path:
        """Create an empty file with a unique name for one request.

        Raises:
            PolicyError: the transport was closed.
        """
        path = self.folder / uuid.uuid4().hex
        try:
            path.touch(mode=0o600, exist_ok=False)
        except FileNotFoundError as error:
            raise PolicyError("the policy was closed") from error
        return path

    @contextmanager
    def for_request(self) -> Iterator[Path]:
        """Create the file of one request; remove it at the end of the block if it still exists."""
        path = self.create()
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def take(self, path: Path) -> NDArray[np.float32]:
        """Read and remove the file of a request.

        Returns:
            (N, D) float32 hidden states, ordered by position; N is 0 if the file does not exist. Of
            several states for one position the last one counts: a preempted request recomputes its
            response.

        Raises:
            ValueError: the size of the file is not a multiple of one record of D values.
        """
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            content = b""
        path.unlink(missing_ok=True)
        if len(content) % self._record.itemsize:
            raise ValueError(
                f"{path.name} has {len(content)} bytes, not a whole number of hidden states of "
                f"{self._record['hidden_state'].shape[0]} float32"
            )
        records = np.frombuffer(content, dtype=self._record)
        last = {int(record["position"]): number for number, record in enumerate(records)}
        chosen = [last[position] for position in sorted(last)]
        hidden_states: NDArray[np.float32] = records["hidden_state"][chosen]
        return hidden_states

    def __len__(self) -> int:
        """Return the number of requests that have a file."""
        return len(list(self.folder.glob("[!.]*")))

    def close(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.release()


def _remove_abandoned(parent: Path) -> None:
    """Remove the folders of killed processes; a running process holds the lock of its folder."""
    for folder in parent.glob(f"{FOLDER_PREFIX}*"):
        try:
            if time.time() - folder.stat().st_mtime < MIN_ABANDONED_AGE_S:
                continue
            held = file_lock(folder / LOCK_FILE).acquire(blocking=False)
        except OSError:  # Timeout is one
            continue  # in use, of another user, or already removed
        with held:
            shutil.rmtree(folder, ignore_errors=True)


def append_hidden_state(path: str, position: int, hidden_state: NDArray[np.float32]) -> None:
    """Append a hidden state to the file of a request, in one write.

    If the file does not exist, the request was abandoned and nothing is written. If there is no
    space left, the error is logged and the state is lost; other requests are not affected.

    Args:
        path: file from :meth:`HiddenStateTransport.create`.
        position: index of the token in the response.
        hidden_state: (D,) float32.
    """
    record = np.array((position, hidden_state), dtype=_record(len(hidden_state))).tobytes()
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
        logger.error("hidden state lost: cannot write %s: %s", path, error)
    finally:
        os.close(file)


def _record(hidden_size: int) -> np.dtype[np.void]:
    return np.dtype([("position", np.int64), ("hidden_state", np.float32, (hidden_size,))])
