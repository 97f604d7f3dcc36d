"""Worker processes seen from the parent: calls with a timeout, pause, resume, exit errors."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from typing import Any

from coprs_deploy.closing import Closeable
from coprs_deploy.errors import CoPRSError

MAX_ERROR_LENGTH = 400
"""Number of characters of an error that a report keeps."""

SERVE = "from coprs_deploy.bench.worker import main; main()"


class WorkerError(CoPRSError):
    """A worker could not answer a request; the message is the error of the case."""


class Worker(Closeable):
    """One process that runs :mod:`coprs_deploy.bench.worker`."""

    def __init__(self) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the worker
        self._connection, theirs = multiprocessing.Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", SERVE, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                start_new_session=True,
                pass_fds=[theirs.fileno()],
            )

    def call(self, target: str, timeout_s: float, /, **settings: Any) -> Any:
        """Call a function in the process and return its result.

        Raises:
            WorkerError: the function failed, or the process died or timed out and is gone.
        """
        try:
            self._connection.send((target, settings))
            if not self._connection.poll(timeout_s):
                self._kill()
                raise WorkerError(f"stopped: it took longer than the timeout of {timeout_s:.0f} s")
            result, error = self._connection.recv()
        except (EOFError, OSError):
            raise WorkerError(self._exit_error()) from None
        if error:
            raise WorkerError(shorten(error))
        return result

    def pause(self) -> None:
        """Stop all of its threads."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Continue them."""
        self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self.resume()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._kill()
        self._log.close()

    def _kill(self) -> None:
        """Kill the process and the processes that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _exit_error(self) -> str:
        code = self._process.wait()
        self._log.seek(0)
        last = self._log.read().decode(errors="replace").strip().splitlines()[-1:]
        reason = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        reason += " (out of memory?)" if -code == signal.SIGKILL else ""
        return shorten(": ".join([f"the process ended with {reason}", *last]))


def call_once(target: str, timeout_s: float, /, **settings: Any) -> Any:
    """Call a function in a process of its own and return its result.

    Raises:
        WorkerError: the function failed, or the process died or timed out.
    """
    with Worker() as worker:
        return worker.call(target, timeout_s, **settings)


def shorten(error: str) -> str:
    """Shorten an error to one line of a table."""
    line = " ".join(error.split())
    return line if len(line) <= MAX_ERROR_LENGTH else line[: MAX_ERROR_LENGTH - 3] + "..."
