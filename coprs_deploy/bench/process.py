"""Worker processes seen from the parent: requests with a timeout, pause, resume, exit errors."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import IO, Any

from coprs_deploy.closing import Closeable
from coprs_deploy.errors import CoPRSError

MAX_ERROR_LENGTH = 400
"""Number of characters of an error that a report keeps."""


class WorkerError(CoPRSError):
    """A worker could not answer a request; the message is the error of the case."""


class Worker(Closeable):
    """One process that runs :mod:`coprs_deploy.bench.worker`."""

    def __init__(self) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the worker
        self._process = subprocess.Popen(
            [sys.executable, "-m", "coprs_deploy.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,
        )

    def request(self, message: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """Send a request and wait for the response.

        Raises:
            WorkerError: the request failed, or the process died or timed out and is gone.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        try:
            stdin.write(json.dumps(dict(message)).encode() + b"\n")
            stdin.flush()
        except BrokenPipeError:
            raise WorkerError(self._exit_error()) from None
        line = self._read_line(stdout, seconds)
        if line is None:
            self._kill()
            raise WorkerError(f"stopped: it took longer than the timeout of {seconds:.0f} s")
        if not line:
            raise WorkerError(self._exit_error())
        response: dict[str, Any] = json.loads(line)
        if "error" in response:
            raise WorkerError(shorten(response["error"]))
        return response

    def call(self, target: str, seconds: float, **settings: Any) -> Any:
        """Call a function in the process and return its result."""
        message = {"do": "call", "target": target, "settings": settings}
        return self.request(message, seconds)["result"]

    def pause(self) -> None:
        """Stop all of its threads."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Continue them."""
        self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        """End the process."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        if self._process.poll() is None:
            try:
                self.resume()
                stdin.close()
                self._process.wait(timeout=20)
            except (OSError, subprocess.TimeoutExpired):
                self._kill()
        for stream in (stdin, stdout, self._log):
            with contextlib.suppress(OSError):
                stream.close()

    @staticmethod
    def _read_line(stdout: IO[bytes], seconds: float) -> bytes | None:
        """Read a line; empty at the end of the stream, None after the timeout."""
        end, received = time.monotonic() + seconds, bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            while not received.endswith(b"\n"):
                left = end - time.monotonic()
                if left <= 0 or not selector.select(left):
                    return None
                part = os.read(stdout.fileno(), 1 << 20)
                if not part:
                    return b""
                received += part
        return bytes(received)

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


def call_once(target: str, seconds: float, **settings: Any) -> Any:
    """Call a function in a process of its own and return its result.

    Raises:
        WorkerError: the function failed, or the process died or timed out.
    """
    with Worker() as worker:
        return worker.call(target, seconds, **settings)


def shorten(error: str) -> str:
    """Shorten an error to one line of a table."""
    line = " ".join(error.split())
    return line if len(line) <= MAX_ERROR_LENGTH else line[: MAX_ERROR_LENGTH - 3] + "..."
