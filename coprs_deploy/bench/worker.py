"""Worker processes: calls of functions by name, and the one workload that a worker holds.

A request is a pair ``(target, settings)``, a response a pair ``(result, error)``. A target is
``module:function`` or ``path.py:function``. Whatever libraries print goes to the worker's log.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Mapping
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from coprs_deploy.bench.case import TOTAL, Workload
from coprs_deploy.closing import Closeable
from coprs_deploy.errors import CoPRSError
from coprs_deploy.machine import peak_memory_bytes

SERVE = "from coprs_deploy.bench.worker import main; main()"


class WorkerError(CoPRSError):
    """A worker could not answer a request; the message, one line, is the error of the case."""

    def __init__(self, message: str) -> None:
        super().__init__(textwrap.shorten(message, 400))


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
            raise WorkerError(error)
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
        return ": ".join([f"the process ended with {reason}", *last])


def call_once(target: str, timeout_s: float, /, **settings: Any) -> Any:
    """Call a function in a process of its own and return its result.

    Raises:
        WorkerError: the function failed, or the process died or timed out.
    """
    with Worker() as worker:
        return worker.call(target, timeout_s, **settings)


_workloads: list[Workload] = []


def main() -> None:
    """Serve the connection of the file descriptor in the first argument until it is closed."""
    _die_with_parent()
    connection = Connection(int(sys.argv[1]))
    with contextlib.suppress(EOFError):
        while True:
            target, settings = connection.recv()
            try:
                response = (load_target(target)(**settings), "")
            except Exception as error:  # whatever it is, it becomes the error of the case
                response = (None, f"{type(error).__name__}: {error}")
            connection.send(response)
    for workload in _workloads:
        workload.close()


def _die_with_parent() -> None:
    """Let the kernel end this process with its parent, even while it is stopped (Linux)."""
    parent = os.getppid()
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG of linux/prctl.h
        if os.getppid() != parent:  # it was gone before the kernel knew
            os.kill(os.getpid(), signal.SIGKILL)


def open_workload(target: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Open the workload of a case."""
    if str(settings.get("device", "")).startswith("cuda"):
        import torch  # noqa: F401  # so that memory can be read before anything is opened
    before, start = device_bytes(), time.perf_counter()
    _workloads.append(load_target(target)(**settings))
    return {"open_ms": 1e3 * (time.perf_counter() - start), "device_before": before}


def run_workload(max_runs: int, seconds: float) -> dict[str, Any]:
    """Run until the time or the number of runs is reached; at least once."""
    runs: list[dict[str, float]] = []
    end = time.perf_counter() + seconds
    while not runs or (len(runs) < max_runs and time.perf_counter() < end):
        start = time.perf_counter()
        stages = _workloads[-1].run()
        elapsed_ms = 1e3 * (time.perf_counter() - start)
        runs.append({TOTAL: elapsed_ms, **stages})
    return {"runs": runs, "peak_bytes": peak_memory_bytes(), "device_bytes": device_bytes()}


def finish_workload() -> dict[str, Any]:
    """Return metrics and accuracy of the workload."""
    return dict(_workloads[-1].finish())


class FunctionWorkload(Workload):
    """A function as a workload: a run is a call.

    It returns, if any: ``stages`` in milliseconds, ``metrics`` and ``accuracy``.
    """

    def __init__(self, function: str, **settings: Any) -> None:
        self._call, self._made = partial(load_target(function), **settings), dict[str, Any]()

    def run(self) -> Mapping[str, float]:
        """Call the function."""
        self._made = self._call()
        stages: Mapping[str, float] = self._made.pop("stages", {})
        return stages

    def finish(self) -> Mapping[str, Any]:
        """Return what the last call did."""
        return self._made


def load_target(target: str) -> Any:
    """Return the function of ``module:function`` or ``path.py:function``."""
    place, _, name = target.rpartition(":")
    if place.endswith(".py"):
        return runpy.run_path(place)[name]
    return getattr(importlib.import_module(place), name)


def device_bytes() -> int | None:
    """Return the GPU memory in use by any process; None without a GPU or before torch is loaded."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    return int(total - free)
