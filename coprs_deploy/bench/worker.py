"""The worker process of a case: reads requests as lines of JSON and responds with one line each.

    {"do": "call", "target": "module:function", "settings": {...}}    call any function
    {"do": "open", "target": "module:function", "settings": {...}}    open a workload
    {"do": "run", "max_runs": 20, "seconds": 1.5}                     run it for a while
    {"do": "finish", "folder": "..."}                                 write its outputs

A target may also be ``path.py:function``. Whatever libraries print goes to stderr.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from coprs_deploy.bench.case import TOTAL, Workload
from coprs_deploy.machine import peak_memory_bytes

PR_SET_PDEATHSIG = 1
"""From ``linux/prctl.h``."""


def main() -> None:
    """Serve until stdin ends."""
    _die_with_parent()
    handler = _RequestHandler()
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as responses:
        os.dup2(2, 1)
        for line in sys.stdin:
            try:
                response = handler.handle(json.loads(line))
            except Exception as error:  # whatever it is, it becomes the error of the case
                response = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(response), file=responses, flush=True)
        if handler.workload is not None:
            handler.workload.close()


def _die_with_parent() -> None:
    """Let the kernel end this process with its parent, even while it is stopped (Linux)."""
    parent = os.getppid()
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it was gone before the kernel knew
            os.kill(os.getpid(), signal.SIGKILL)


class _RequestHandler:
    def __init__(self) -> None:
        self.workload: Workload | None = None

    def handle(self, request: Mapping[str, Any]) -> dict[str, Any]:
        action = request["do"]
        if action == "call":
            return {"result": load_target(request["target"])(**request["settings"])}
        if action == "open":
            if str(request["settings"].get("device", "")).startswith("cuda"):
                import torch  # noqa: F401  # so that memory can be read before anything is opened
            before, start = device_bytes(), time.perf_counter()
            self.workload = load_target(request["target"])(**request["settings"])
            return {"open_ms": 1e3 * (time.perf_counter() - start), "device_before": before}
        assert self.workload is not None, "open comes first"
        if action == "run":
            runs = run_for(self.workload, request["max_runs"], request["seconds"])
            return {"runs": runs, "peak_bytes": peak_memory_bytes(), "device_bytes": device_bytes()}
        assert action == "finish", action
        folder = Path(request["folder"])
        folder.mkdir(parents=True, exist_ok=True)
        return dict(self.workload.finish(folder))


def run_for(workload: Workload, max_runs: int, seconds: float) -> list[dict[str, float]]:
    """Run until the time or the number of runs is reached; at least once."""
    runs: list[dict[str, float]] = []
    end = time.perf_counter() + seconds
    while not runs or (len(runs) < max_runs and time.perf_counter() < end):
        start = time.perf_counter()
        stages = workload.run()
        elapsed_ms = 1e3 * (time.perf_counter() - start)
        runs.append({TOTAL: elapsed_ms, **stages})
    return runs


def load_target(target: str) -> Any:
    """Return the function of ``module:function`` or ``path.py:function``."""
    place, _, name = target.rpartition(":")
    module = load_script(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    return getattr(module, name)


def load_script(path: Path) -> ModuleType:
    """Import a script by its path, once."""
    name = f"_script_{path.stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


def device_bytes() -> int | None:
    """Return the GPU memory in use by any process; None without a GPU or before torch is loaded."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    return int(total - free)


if __name__ == "__main__":
    main()
