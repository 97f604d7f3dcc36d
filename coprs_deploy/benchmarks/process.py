"""A worker's process from outside: requests with a time limit, pauses, a reason when it dies."""

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

MOST_REASON = 400
"""Characters of a reason that a report keeps."""


class WorkerError(CoPRSError):
    """A worker could not do what was asked; the message is the reason, for a row."""


class Worker(Closeable):
    """One process that runs :mod:`coprs_deploy.benchmarks.worker`.

    Args:
        environment: variables beside those of this process.
    """

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the worker
        self._process = subprocess.Popen(
            [sys.executable, "-m", "coprs_deploy.benchmarks.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )

    def ask(self, request: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """Send a request and wait for its answer.

        Raises:
            WorkerError: it failed, died, or took too long; after the latter two it is gone.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        try:
            stdin.write(json.dumps(dict(request)).encode() + b"\n")
            stdin.flush()
        except BrokenPipeError:
            raise WorkerError(self._death()) from None
        line = self._read_line(stdout, seconds)
        if line is None:
            self._kill()
            raise WorkerError(f"stopped: it took longer than the limit of {seconds:.0f} s")
        if not line:
            raise WorkerError(self._death())
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(shorten(answer["error"]))
        return answer

    def call(self, target: str, seconds: float, **settings: Any) -> Any:
        """Run a function there and return its result."""
        request = {"do": "call", "target": target, "settings": settings}
        return self.ask(request, seconds)["result"]

    def pause(self) -> None:
        """Take every thread of it off the processor."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        """End it."""
        if self._process.poll() is None:
            assert self._process.stdin is not None
            try:
                self.resume()
                self._process.stdin.close()
                self._process.wait(timeout=20)
            except (OSError, subprocess.TimeoutExpired):
                self._kill()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        self._log.close()

    def _read_line(self, stdout: IO[bytes], seconds: float) -> bytes | None:
        """Read to the end of a line; empty at the end of the stream, None when time is up."""
        end = time.monotonic() + seconds
        received = bytearray()
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
        """Kill it with the processes that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _death(self) -> str:
        code = self._process.wait()
        self._log.seek(0)
        last = self._log.read().decode(errors="replace").strip().splitlines()[-1:]
        how = f"exit code {code}"
        if code < 0:
            how = f"signal {signal.Signals(-code).name}"
            if -code == signal.SIGKILL:
                how += " (out of memory?)"
        return shorten(f"the process ended with {how}" + (f": {last[0]}" if last else ""))


def call_once(target: str, seconds: float, **settings: Any) -> Any:
    """Run a function in a process of its own and return its result.

    Raises:
        WorkerError: it failed.
    """
    with Worker() as worker:
        return worker.call(target, seconds, **settings)


def shorten(reason: str) -> str:
    """Bring a reason to one line that a table can hold."""
    line = " ".join(reason.split())
    return line if len(line) <= MOST_REASON else line[: MOST_REASON - 3] + "..."
