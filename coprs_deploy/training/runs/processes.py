"""Processes of a run: several that train together, and the stop by a signal."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accelerate import Accelerator

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that stop a run."""

LAUNCHER_VARIABLE = "COPRS_DEPLOY_LAUNCHER"
"""Environment variable with the id of the process that started this one."""

GRACE_SECONDS = 15.0
"""Time between the end of the first process that fails and the kill of the others."""

PR_SET_PDEATHSIG = 1
"""``prctl`` option: the signal that a process gets when its parent ends."""


class StopRequest:
    """Stop of the training by a signal.

    While steps run, the first signal lets the current step end, so that a state can be saved. At
    any other time, and from the second signal on, this process ends at once.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._runs_steps = self._has_exited = False

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Handle the signals of this process, if this is its main thread.

        A library in which a signal arrives may raise an error of its own instead of the exception
        of :meth:`exit`.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.signal(number, self._receive) for number in SIGNALS}
        try:
            yield
        except Exception:
            if self._has_exited:
                self.exit()
            raise
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    @contextmanager
    def while_steps_run(self) -> Iterator[None]:
        """Delay the first signal to the end of a step."""
        self._runs_steps = True
        try:
            yield
        finally:
            self._runs_steps = False

    def is_agreed(self, accelerator: Accelerator) -> bool:
        """Return whether any process got a signal (collective call)."""
        if accelerator.num_processes == 1:
            return self.number is not None
        import torch

        requested = torch.tensor(float(self.number is not None), device=accelerator.device)
        return bool(accelerator.reduce(requested, "sum") > 0)

    def exit(self) -> None:
        """End this process with the exit code of the signal."""
        self._has_exited = True
        if self.number == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + (self.number or signal.SIGTERM))

    def _receive(self, number: int, frame: object) -> None:
        is_first, self.number = self.number is None, number
        if not (self._runs_steps and is_first):
            self.exit()
        if os.environ.get("RANK", "0") == "0":
            text = f"{signal.Signals(number).name}: stopping after this step; repeat to stop now\n"
            with suppress(OSError):  # a handler may interrupt a print, so it must not print
                os.write(2, text.encode())


def run_processes(command: Sequence[str], count: int, num_threads: int) -> int:
    """Run a command in several processes that train together; return their exit code.

    A signal is passed on once to each process. They get SIGTERM if this process is killed, and
    SIGKILL if one of them fails and the others do not end.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(count),  # codespell:ignore world
        "LOCAL_WORLD_SIZE": str(count),  # codespell:ignore world
        "OMP_NUM_THREADS": str(num_threads),
        LAUNCHER_VARIABLE: str(os.getpid()),
    }
    processes: list[subprocess.Popen[Any]] = []
    received: list[int] = []

    def pass_on(number: int, frame: object) -> None:
        received.append(number)
        for process in processes:
            process.send_signal(signal.SIGKILL if len(received) > 2 else signal.SIGTERM)

    previous = {number: signal.signal(number, pass_on) for number in SIGNALS}
    try:
        for rank in map(str, range(count)):
            ranks = {"RANK": rank, "LOCAL_RANK": rank}
            # In a session of its own, a process gets Ctrl-C from here only.
            process = subprocess.Popen(
                command, env=environment | ranks, stdin=subprocess.DEVNULL, start_new_session=True
            )
            processes.append(process)
        code = _wait(processes)
    finally:
        for process in processes:
            process.kill()
        for number, handler in previous.items():
            signal.signal(number, handler)
    if received and received[0] == signal.SIGINT:
        raise KeyboardInterrupt
    return 128 + received[0] if received else code


def _wait(processes: Sequence[subprocess.Popen[Any]]) -> int:
    """Wait for the end of all processes; return the first exit code that is not 0."""
    failed: tuple[int, float] | None = None
    while None in (codes := [process.poll() for process in processes]):
        if any(codes) and failed is None:
            failed = next(code for code in codes if code), time.monotonic()
            for process in processes:
                process.terminate()
        if failed and time.monotonic() - failed[1] > GRACE_SECONDS:
            for process in processes:
                process.kill()
        time.sleep(0.05)
    code = failed[0] if failed else next((p.returncode for p in processes if p.returncode), 0)
    return 128 - code if code < 0 else code


def end_with_launcher() -> None:
    """Get SIGTERM when the process that started this one ends; Linux only."""
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    launcher = os.environ.get(LAUNCHER_VARIABLE)
    if launcher is not None and os.getppid() != int(launcher):
        sys.exit(128 + signal.SIGTERM)
