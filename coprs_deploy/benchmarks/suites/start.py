"""From the start of a process to the first mask: import, load, first answer."""

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

from coprs_deploy.benchmarks.arrays import OUTPUT_FILE, write_arrays
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
bundle, device, picture, instruction, mask = sys.argv[1:]
from coprs_deploy.runtime import RuntimeOptions
coprs = CoPRS.load(bundle, RuntimeOptions(device=device))
loaded = time.time()
answer = coprs.segment(picture, instruction)
done = time.time()
print(json.dumps([start, imported, loaded, done, peak_bytes()]))
import numpy as np
np.save(mask, answer.mask)
"""


def plan(workshop: Workshop) -> Plan:
    """Plan the two beginnings without a model, and the first mask on each device."""
    bundle = workshop.model.bundle or workshop.bundle(workshop.model, "onnxruntime", "fp32").path
    graph = read_manifest(bundle).graphs[IMAGE_ENCODER]
    name = f"{workshop.model.name}: start"
    labels = {"model": workshop.model.name, "device": "cpu"}
    cases = [
        Case("import coprs_deploy", f"{__name__}:open_command", {"code": IMPORT}, labels),
        Case(
            "coprs-deploy, arguments parsed", f"{__name__}:open_command", {"code": VERSION}, labels
        ),
    ]
    devices, left_out = workshop.devices_of(graph.runtime, NAME)
    for device in devices:
        on_device = "" if device == "cpu" else f" {device}"
        cases.append(
            Case(
                f"first mask, {graph.runtime}{on_device} {graph.precision}",
                f"{__name__}:open_first_mask",
                {"bundle": str(bundle), "device": device},
                {
                    "model": workshop.model.name,
                    "device": device,
                    "runtime": graph.runtime,
                    "precision": graph.precision,
                },
            )
        )
    kept = tuple(case for case in cases if workshop.wants(name, case.name))
    if not kept:
        return Plan((), tuple(left_out))
    runs = QUICK_RUNS if workshop.is_quick else RUNS
    judge = workshop.answers_judge(workshop.model, count=1)
    group = Group(NAME, name, kept, judge=judge, unit="one process, to its end", runs=runs)
    return Plan((group,), tuple(left_out))


def open_command(code: str) -> Subject:
    """Open a process that runs a piece of Python."""
    return _Process(code, [])


def open_first_mask(bundle: str, device: str) -> Subject:
    """Open a process that loads a bundle and answers once; the mask ends the run."""
    return _FirstMask(bundle, device)


class _Process(Subject):
    def __init__(self, code: str, arguments: list[str]) -> None:
        self._command = [sys.executable, "-c", code, *arguments]

    def run(self) -> Mapping[str, float]:
        """Start it and wait for its end."""
        began = time.time()
        self._wait()
        return {TOTAL: 1e3 * (time.time() - began)}

    def _wait(self) -> str:
        """Run it to its end and return what it wrote."""
        done = subprocess.run(self._command, capture_output=True, text=True, check=False)
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
            raise RuntimeError(last[0])
        return done.stdout


class _FirstMask(_Process):
    """Asks about a held-out scene, so that the mask can be judged."""

    def __init__(self, bundle: str, device: str) -> None:
        from coprs_deploy.benchmarks.inputs import scenes

        (self._scene,) = scenes(1)
        self._folder = tempfile.TemporaryDirectory(prefix="coprs-deploy-")
        picture, self._mask = (Path(self._folder.name) / n for n in ("scene.png", "mask.npy"))
        Image.fromarray(self._scene.image).save(picture)
        asked = [bundle, device, str(picture), self._scene.instruction, str(self._mask)]
        super().__init__(FIRST_MASK, asked)
        self._peak = 0.0

    def run(self) -> Mapping[str, float]:
        """Start it, wait for its end, and count up to its mask."""
        began = time.time()
        start, imported, loaded, masked, peak = json.loads(self._wait().strip().splitlines()[-1])
        self._peak = max(self._peak, float(peak or 0))
        return {
            TOTAL: 1e3 * (masked - began),
            "interpreter": 1e3 * (start - began),
            "import": 1e3 * (imported - start),
            "load": 1e3 * (loaded - imported),
            "first answer": 1e3 * (masked - loaded),
        }

    def finish(self, folder: Path) -> Mapping[str, Any]:
        """Leave the mask, and say how much memory it took."""
        truth = np.any(self._scene.masks, axis=0)
        write_arrays(folder / OUTPUT_FILE, {"0.mask": np.load(self._mask), "0.truth": truth})
        return {"figures": {"peak_bytes": self._peak}} if self._peak else {}

    def close(self) -> None:
        self._folder.cleanup()
