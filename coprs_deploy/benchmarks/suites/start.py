"""From the start of a process to the first mask: import, load, first answer."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coprs_deploy.benchmarks.case import TOTAL, Case, Group, Plan, Subject
from coprs_deploy.benchmarks.workshop import Workshop
from coprs_deploy.bundle import read_manifest
from coprs_deploy.specs import IMAGE_ENCODER

NAME = "start"
SUMMARY = "import, load, first mask, each in a fresh process"

RUNS, QUICK_RUNS = 6, 3

IMPORT = "import coprs_deploy"
VERSION = "from coprs_deploy.cli.main import build_parser; build_parser()"
FIRST_MASK = """
import json, sys, time
start = time.time()
from coprs_deploy import CoPRS
from coprs_deploy.benchmarks.worker import peak_bytes
imported = time.time()
coprs = CoPRS.load(sys.argv[1])
loaded = time.time()
import numpy as np
answer = coprs.segment(np.full((96, 160, 3), 90, np.uint8), "the largest red circle")
done = time.time()
print(json.dumps([start, imported, loaded, done, peak_bytes()]))
"""


def plan(workshop: Workshop) -> Plan:
    """Plan the three beginnings."""
    bundle = workshop.model.bundle or workshop.bundle(workshop.model, "onnxruntime", "fp32").path
    graph = read_manifest(bundle).graphs[IMAGE_ENCODER]
    labels = {"model": workshop.model.name, "device": "cpu"}
    cases = [
        Case("import coprs_deploy", f"{__name__}:open_command", {"code": IMPORT}, labels),
        Case(
            "coprs-deploy, arguments parsed", f"{__name__}:open_command", {"code": VERSION}, labels
        ),
        Case(
            f"first mask, {graph.runtime} {graph.precision}",
            f"{__name__}:open_first_mask",
            {"bundle": str(bundle)},
            {**labels, "runtime": graph.runtime, "precision": graph.precision},
        ),
    ]
    kept = tuple(
        case for case in cases if workshop.wants(f"{workshop.model.name}: start", case.name)
    )
    if not kept:
        return Plan(())
    name = f"{workshop.model.name}: start"
    runs = QUICK_RUNS if workshop.is_quick else RUNS
    return Plan((Group(NAME, name, kept, unit="one process, to its end", runs=runs),))


def open_command(code: str) -> Subject:
    """Open a process that runs a piece of Python."""
    return _Process(code, [])


def open_first_mask(bundle: str) -> Subject:
    """Open a process that loads a bundle and answers once; the mask ends the run."""
    return _Process(FIRST_MASK, [bundle])


class _Process(Subject):
    def __init__(self, code: str, arguments: list[str]) -> None:
        self._command = [sys.executable, "-c", code, *arguments]
        self._peak = 0.0

    def run(self) -> Mapping[str, float]:
        """Start it and wait for its end."""
        began = time.time()
        done = subprocess.run(self._command, capture_output=True, text=True, check=False)
        ended = time.time()
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
            raise RuntimeError(last[0])
        if not done.stdout.strip():
            return {TOTAL: 1e3 * (ended - began)}
        start, imported, loaded, masked, peak = json.loads(done.stdout.strip().splitlines()[-1])
        self._peak = max(self._peak, float(peak or 0))
        return {
            TOTAL: 1e3 * (masked - began),
            "interpreter": 1e3 * (start - began),
            "import": 1e3 * (imported - start),
            "load": 1e3 * (loaded - imported),
            "first answer": 1e3 * (masked - loaded),
        }

    def finish(self, folder: Path) -> Mapping[str, Any]:
        """Say how much memory it took."""
        return {"figures": {"peak_bytes": self._peak}} if self._peak else {}
