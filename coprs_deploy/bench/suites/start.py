"""From the start of a process to the first mask: import, load, first request."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from coprs_deploy.bench.availability import runtimes_here
from coprs_deploy.bench.case import (
    OUTPUT_FILE,
    TOTAL,
    Case,
    Group,
    SuitePlan,
    Workload,
    write_arrays,
)
from coprs_deploy.bench.fixtures import Fixtures
from coprs_deploy.bench.suites import labels_of
from coprs_deploy.bundle import read_manifest
from coprs_deploy.specs import IMAGE_ENCODER

NAME = "start"
SUMMARY = "import, load, first mask, each in a new process"

RUNS, QUICK_RUNS = 6, 3

IMPORT = "import coprs_deploy"
PARSE = "from coprs_deploy.cli.main import build_parser; build_parser()"
FIRST_MASK = """
import json, sys, time
start = time.time()
from coprs_deploy import CoPRS
from coprs_deploy.machine import peak_memory_bytes
imported = time.time()
bundle, device, image, instruction, mask = sys.argv[1:]
from coprs_deploy.runtime import RuntimeOptions
coprs = CoPRS.load(bundle, RuntimeOptions(device=device))
loaded = time.time()
result = coprs.segment(image, instruction)
done = time.time()
print(json.dumps([start, imported, loaded, done, peak_memory_bytes()]))
import numpy as np
np.save(mask, result.mask)
"""


def suite_plan(fixtures: Fixtures) -> SuitePlan:
    """List the start without a model, and the first mask on each device."""
    model, options = fixtures.model, fixtures.options
    bundle = str(model.bundle)
    graph = read_manifest(bundle).graphs[IMAGE_ENCODER]
    command = "coprs_deploy.bench.suites.start:open_command"
    labels = labels_of(model, device="cpu")
    cases = [
        Case("import coprs_deploy", command, {"code": IMPORT}, labels),
        Case("coprs-deploy, arguments parsed", command, {"code": PARSE}, labels),
    ]
    present, skipped = runtimes_here(NAME, options.devices, graph.runtime)
    for _, device in present:
        on_device = "" if device == "cpu" else f" {device}"
        name = f"first mask, {graph.runtime}{on_device} {graph.precision}"
        target = "coprs_deploy.bench.suites.start:open_first_mask"
        labels = labels_of(model, graph.runtime, graph.precision, device)
        cases.append(Case(name, target, {"bundle": bundle, "device": device}, labels))
    compared = {"has_gt": model.has_gt, "checkpoint": model.checkpoint, "count": 1}
    evaluate = fixtures.evaluate("evaluate_masks", **compared)
    name, unit = f"{model.name}: start", "one process, to its end"
    runs = QUICK_RUNS if options.is_quick else RUNS
    group = Group(NAME, name, tuple(cases), evaluate=evaluate, unit=unit, runs=runs)
    return SuitePlan((group,), tuple(skipped))


def open_command(code: str) -> Workload:
    """Open a process that runs a piece of Python."""
    return _Process(code)


def open_first_mask(bundle: str, device: str) -> Workload:
    """Open a process that loads a bundle and answers one request; the run ends with its mask."""
    return _FirstMask(bundle, device)


class _Process(Workload):
    def __init__(self, code: str, *arguments: str) -> None:
        self._command = [sys.executable, "-c", code, *arguments]

    def run(self) -> Mapping[str, float]:
        began = time.time()
        self._wait()
        return {TOTAL: 1e3 * (time.time() - began)}

    def _wait(self) -> str:
        """Run the process to its end and return its stdout."""
        done = subprocess.run(self._command, capture_output=True, text=True, check=False)
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
            raise RuntimeError(last[0])
        return done.stdout


class _FirstMask(_Process):
    """Asks about a held-out scene, so that the mask can be evaluated."""

    def __init__(self, bundle: str, device: str) -> None:
        from coprs_deploy.bench.reference import scenes

        (self._scene,) = scenes(1)
        self._folder = tempfile.TemporaryDirectory(prefix="coprs-deploy-")
        image, self._mask = (Path(self._folder.name) / n for n in ("scene.png", "mask.npy"))
        Image.fromarray(self._scene.image).save(image)
        arguments = (bundle, device, str(image), self._scene.instruction, str(self._mask))
        super().__init__(FIRST_MASK, *arguments)
        self._peak = 0.0

    def run(self) -> Mapping[str, float]:
        began = time.time()
        *times, peak = json.loads(self._wait().strip().splitlines()[-1])
        self._peak = max(self._peak, float(peak))
        steps = zip(STEPS, [began, *times], times, strict=False)
        return {TOTAL: 1e3 * (times[-1] - began)} | {n: 1e3 * (end - at) for n, at, end in steps}

    def finish(self, folder: Path) -> Mapping[str, Any]:
        found = {"0.mask": np.load(self._mask), "0.ground_truth": np.any(self._scene.masks, axis=0)}
        write_arrays(folder / OUTPUT_FILE, found)
        return {"metrics": {"peak_bytes": self._peak}}

    def close(self) -> None:
        self._folder.cleanup()


STEPS = ("interpreter", "import", "load", "first request")
