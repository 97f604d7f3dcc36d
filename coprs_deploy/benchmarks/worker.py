"""The process of one case: it reads requests as lines of JSON and answers each with one line.

    {"do": "call", "target": "module:function", "settings": {...}}    any function; its result
    {"do": "open", "target": "module:function", "settings": {...}}    opens a subject
    {"do": "run", "most": 20, "seconds": 1.5}                         runs it for a while
    {"do": "finish", "folder": "..."}                                 lets it leave its outputs

Whatever libraries print goes to stderr: only the answers go to the stdout that the process had.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from coprs_deploy.benchmarks.case import DEVICE, TOTAL, Subject

PR_SET_PDEATHSIG = 1
"""From ``linux/prctl.h``."""


def main() -> None:
    """Serve until stdin ends."""
    _die_with_parent()
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        _serve(sys.stdin, answers)


def _die_with_parent() -> None:
    """Let the kernel end this process with its parent, even while it is stopped (Linux)."""
    parent = os.getppid()
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it was gone before the kernel knew
            os.kill(os.getpid(), signal.SIGKILL)


def _serve(requests: TextIO, answers: TextIO) -> None:
    desk = _Desk()
    for line in requests:
        try:
            answer = desk.handle(json.loads(line))
        except Exception as error:  # the reason of a row, whatever it was
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    desk.close()


class _Desk:
    def __init__(self) -> None:
        self._subject: Subject | None = None

    def handle(self, request: Mapping[str, Any]) -> dict[str, Any]:
        action = request["do"]
        if action == "call":
            return {"result": load_target(request["target"])(**request["settings"])}
        if action == "open":
            if str(request["settings"].get("device", "")).startswith("cuda"):
                import torch  # noqa: F401  # lets the memory be read before anything is opened
            before, start = device_bytes(), time.perf_counter()
            self._subject = load_target(request["target"])(**request["settings"])
            return {"open_ms": 1e3 * (time.perf_counter() - start), "device_before": before}
        assert self._subject is not None, "open comes first"
        if action == "run":
            runs = run_for(self._subject, request["most"], request["seconds"])
            return {"runs": runs, "peak_bytes": peak_bytes(), "device_bytes": device_bytes()}
        assert action == "finish", action
        folder = Path(request["folder"])
        folder.mkdir(parents=True, exist_ok=True)
        return dict(self._subject.finish(folder))

    def close(self) -> None:
        if self._subject is not None:
            self._subject.close()


def run_for(subject: Subject, most: int, seconds: float) -> list[dict[str, float]]:
    """Run until the time is used up or there were enough runs; at least once."""
    runs: list[dict[str, float]] = []
    end = time.perf_counter() + seconds
    while not runs or (len(runs) < most and time.perf_counter() < end):
        start = time.perf_counter()
        parts = subject.run()
        elapsed_ms = 1e3 * (time.perf_counter() - start)
        runs.append({TOTAL: elapsed_ms, **parts})
    return runs


def load_target(target: str) -> Any:
    """Import ``module:function``."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def peak_bytes() -> int | None:
    """Largest resident memory of this process alone; ``ru_maxrss`` would count its parent's."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return None
    lines = [line for line in status.splitlines() if line.startswith("VmHWM")]
    return 1024 * int(lines[0].split()[1]) if lines else None


def device_bytes() -> int | None:
    """GPU memory that is taken, by whoever; None without a GPU or before PyTorch is loaded."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    return int(total - free)


__all__ = ["DEVICE", "TOTAL", "load_target", "main", "peak_bytes", "run_for"]

if __name__ == "__main__":
    main()
