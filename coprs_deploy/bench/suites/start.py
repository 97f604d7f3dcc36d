"""From the start of a process to the first mask: import, load, first request."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from coprs_deploy.bench.accuracy import SceneReference
from coprs_deploy.bench.availability import runtimes_here
from coprs_deploy.bench.case import TOTAL, Case, Group, Planned
from coprs_deploy.bench.fixtures import Fixtures
from coprs_deploy.bench.reference import scenes
from coprs_deploy.bundle import read_manifest
from coprs_deploy.evaluation.metrics import union
from coprs_deploy.specs import IMAGE_ENCODER

RUNS, QUICK_RUNS = 6, 3

STEPS = ("interpreter", "import", "load", "first request")
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


def plan(fixtures: Fixtures) -> Planned:
    """Plan the start without a model, and the first mask on each device."""
    model, options, target = (
        fixtures.model,
        fixtures.options,
        "coprs_deploy.bench.worker:open_function",
    )
    bundle = model.bundle
    assert bundle is not None
    graph, labels = read_manifest(bundle).graphs[IMAGE_ENCODER], model.labels(device="cpu")
    run = {"function": "coprs_deploy.bench.suites.start:run_code"}
    cases = [
        Case("import coprs_deploy", target, {**run, "code": IMPORT}, labels),
        Case("coprs-deploy, arguments parsed", target, {**run, "code": PARSE}, labels),
    ]
    present, skipped = runtimes_here(options.devices, graph.runtime)
    yield from skipped

    def prepare() -> dict[str, Any]:
        return {"reference": fixtures.scene_reference(1)}

    for _, device in present:
        on_device = "" if device == "cpu" else f" {device}"
        name = f"first mask, {graph.runtime}{on_device} {graph.precision}"
        function = "coprs_deploy.bench.suites.start:segment_first"
        settings = {"function": function, "bundle": bundle, "device": device}
        labels = model.labels(graph.runtime, graph.precision, device)
        cases.append(Case(name, target, settings, labels, prepare))
    runs = QUICK_RUNS if options.is_quick else RUNS
    yield Group(f"{model.name}: start", tuple(cases), unit="one process, to its end", runs=runs)


def run_code(code: str, *arguments: str) -> dict[str, Any]:
    """Run a piece of Python in a process; return ``stdout``."""
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise RuntimeError(last[0])
    return {"stdout": done.stdout}


def segment_first(bundle: Path, device: str, reference: SceneReference) -> dict[str, Any]:
    """Load a bundle and answer one request, about a held-out scene, in a new process."""
    (scene,) = scenes(1)
    with tempfile.TemporaryDirectory(prefix="coprs-deploy-") as folder:
        image, mask = (str(Path(folder) / name) for name in ("scene.png", "mask.npy"))
        Image.fromarray(scene.image).save(image)
        began = time.time()
        done = run_code(FIRST_MASK, str(bundle), device, image, scene.instruction, mask)
        found = {"0.mask": np.load(mask), "0.ground_truth": union(scene.masks)}
    *times, peak = json.loads(done["stdout"].strip().splitlines()[-1])
    steps = zip(STEPS, [began, *times], times, strict=False)
    stages = {TOTAL: 1e3 * (times[-1] - began)} | {n: 1e3 * (end - at) for n, at, end in steps}
    accuracy = reference.accuracy(found)
    return {"stages": stages, "metrics": {"peak_bytes": float(peak)}, "accuracy": accuracy}
