"""Whole requests by stage, the policy alone, the start of a process, and scaling sweeps."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from coprs_deploy import policy
from coprs_deploy.bench.accuracy import SceneReference, scenes
from coprs_deploy.bench.case import TOTAL, Case, Group, Planned
from coprs_deploy.bench.fixtures import Fixtures, Model, runtimes_here, version_of
from coprs_deploy.bench.graph_suites import precisions, runtime_name
from coprs_deploy.bench.report import LIMIT, Skipped
from coprs_deploy.bundle import read_manifest
from coprs_deploy.evaluation.metrics import union
from coprs_deploy.export import ExportOptions
from coprs_deploy.export.precision import BF16, FP32
from coprs_deploy.specs import IMAGE_ENCODER, MASK_DECODER, PRIOR, OptimizationProfile

WORKLOADS = "coprs_deploy.bench.answer_workloads"
FUNCTION = "coprs_deploy.bench.worker:FunctionWorkload"

COUNT, QUICK_COUNT = 16, 8
"""Number of scenes, used in turn."""

RUNS, QUICK_RUNS = 6, 3

REASONING_BUDGETS = (5, 10, 15, 20, 30, 40)
"""Largest numbers of reasoning tokens; the demo model's median response has 27 tokens."""

FRONTIER_COUNT = 100
"""Number of scenes, and of requests, of which one may be slower than the 99th percentile."""

STEPS = ("interpreter", "import", "load", "first request")
PARSE = "from coprs_deploy.cli.main import build_parser; build_parser()"
FIRST_MASK = """
import json, sys, time
start = time.time()
from coprs_deploy import CoPRS
from coprs_deploy.machine import peak_memory_bytes
imported = time.time()
bundle, device, policy, image, instruction, mask = sys.argv[1:]
from coprs_deploy.runtime import RuntimeOptions
coprs = CoPRS.load(bundle, RuntimeOptions(device=device, policy=policy))
loaded = time.time()
result = coprs.segment(image, instruction)
done = time.time()
print(json.dumps([start, imported, loaded, done, peak_memory_bytes()]))
import numpy as np
np.save(mask, result.mask)
"""


def answer_suite(fixtures: Fixtures) -> Planned:
    """List whole requests: each runtime and precision that a bundle exists for or is made for."""
    model, is_quick = fixtures.model, fixtures.options.is_quick
    present, skipped = runtimes_here(fixtures.options.devices)
    yield from skipped
    count, memory = QUICK_COUNT if is_quick else COUNT, model.request_bytes
    shared = {"count": count, "reference": partial(fixtures.scene_reference, count)}
    shared["preset"] = model.preset
    # What a lower precision of the graphs costs and gains shows in the graphs alone.
    kinds = [(*kind, d) for r, d in present for kind in precisions(model, [r])]
    kinds = [kind for kind in kinds if model.checkpoint is None or kind[1] == FP32]
    policies = [(kind, library) for kind in kinds for library in _policies(model, *kind[1:])]
    cases = []
    for cached in (False,) if is_quick else (False, True):
        for (runtime, precision, device), library in policies:
            name = f"{runtime_name(runtime, device, precision)}{_suffix(library)}, "
            settings = {**shared, "runtime": runtime, "device": device, "warms_cache": cached}
            settings["bundle"] = partial(fixtures.bundle, model, runtime, precision)
            settings |= {"cached": count if cached else 0, "policy": library}
            target = f"{WORKLOADS}:open_requests"
            described = model.labels(runtime, precision, device, policy=library)
            name += "cached image" if cached else "new image"
            cases.append(Case(name, target, settings, described, memory))
    baseline = f"coprs-deploy modules, PyTorch {version_of('torch')} eager cpu fp32"
    if model.checkpoint is not None:
        target, labels = f"{WORKLOADS}:open_torch_requests", ("torch eager", FP32, "cpu")
        settings = {**shared, "checkpoint": model.checkpoint}
        cases.append(Case(baseline, target, settings, model.labels(*labels), memory))
    yield Group(f"{model.name}: whole requests", cases, baseline, "one request")


def _policies(model: Model, precision: str, device: str) -> list[str]:
    """List the libraries that can run the policy of a model's bundle in a precision.

    Bundles that the benchmark exports have weights; graphs are in the model's own bundle only.
    """
    assert model.bundle is not None
    manifest = read_manifest(model.bundle)
    is_own = manifest.graphs[IMAGE_ENCODER].precision == precision and device == "cpu"
    libraries = ["transformers"] * (manifest.policy.path is not None or not is_own)
    if is_own and manifest.policy_graphs is not None and version_of("openvino"):
        libraries.append("openvino")
    return libraries


def _suffix(library: str) -> str:
    """Name the policy's library in a case, unless it is transformers."""
    return "" if library == "transformers" else f", {library} policy"


def latency_suite(fixtures: Fixtures) -> Planned:
    """List whole requests by the limit of their reasoning: accuracy against time."""
    model, options = fixtures.model, fixtures.options
    runtimes, skipped = runtimes_here(options.devices, RUNTIME)
    yield from skipped
    limits: dict[str, dict[str, Any]] = {"no reasoning": {"reasoning": "none"}}
    limits |= {f"{n} tokens": {"max_reasoning_tokens": n} for n in REASONING_BUDGETS}
    limits |= {f"deadline {ms:g} ms": {"deadline_ms": ms} for ms in options.deadlines_ms}
    limits["whole reasoning"] = {}
    shared = {"count": FRONTIER_COUNT, "cached": 0, "runtime": RUNTIME, "preset": model.preset}
    shared["reference"] = partial(fixtures.scene_reference, FRONTIER_COUNT)
    shared["bundle"] = partial(fixtures.bundle, model, RUNTIME, FP32)
    for _, device in runtimes:
        library = _policies(model, FP32, device)[-1]
        described = model.labels(RUNTIME, FP32, device, policy=library)
        cases = [
            Case(
                name,
                f"{WORKLOADS}:open_requests",
                {**shared, "device": device, "policy": library, "limits": each},
                {**described, LIMIT: name},
                model.request_bytes,
            )
            for name, each in limits.items()
        ]
        title = f"{model.name}: by limit of the reasoning, {library} policy" + (
            f", on {device}" if device != "cpu" else ""
        )
        yield Group(title, cases, cases[-1].name, "one request", runs=FRONTIER_COUNT)


def policy_suite(fixtures: Fixtures) -> Planned:
    """List the policy alone: each library that is here, on each device in each dtype."""
    model, entries = fixtures.model, policy.availability()
    yield from (Skipped(e.name, e.detail, e.remedy) for e in entries if not e.is_available)
    # The graphs that openvino runs belong to a bundle, not to a checkpoint.
    libraries = [e.name for e in entries if e.is_available and e.name != "openvino"]
    cases = []
    dtypes = {"float32": FP32, "bfloat16": BF16}
    for library, device, dtype in itertools.product(libraries, fixtures.options.devices, dtypes):
        name = f"{library} {version_of(library, f'{library}-{device}')} {device} {dtype}"
        settings: dict[str, Any] = {"checkpoint": model.checkpoint, "count": QUICK_COUNT}
        settings |= {"library": library, "dtype": dtype, "device": device, "preset": model.preset}
        settings["reference"] = partial(fixtures.scene_reference, QUICK_COUNT)
        labels, target = (library, dtypes[dtype], device), f"{WORKLOADS}:PolicyWorkload"
        cases.append(Case(name, target, settings, model.labels(*labels), model.request_bytes))
    baseline = cases[0].name if cases else None
    yield Group(f"{model.name}: policy", cases, baseline, "one response")


def start_suite(fixtures: Fixtures) -> Planned:
    """List the start without a model, and the first mask on each device."""
    model, options = fixtures.model, fixtures.options
    assert model.bundle is not None
    graph = read_manifest(model.bundle).graphs[IMAGE_ENCODER]
    present, skipped = runtimes_here(options.devices, graph.runtime)
    yield from skipped
    cases = []
    for name, code in (("import coprs_deploy",) * 2, ("coprs-deploy, arguments parsed", PARSE)):
        settings = {"function": f"{__name__}:run_code", "code": code}
        cases.append(Case(name, FUNCTION, settings, model.labels(device="cpu")))
    for device, library in (
        (d, library) for _, d in present for library in _policies(model, graph.precision, d)
    ):
        on_device = "" if device == "cpu" else f" {device}"
        name = f"first mask, {graph.runtime}{on_device} {graph.precision}{_suffix(library)}"
        labels = model.labels(graph.runtime, graph.precision, device, policy=library)
        settings = {"function": f"{__name__}:segment_first", "bundle": str(model.bundle)}
        first = {"device": device, "reference": partial(fixtures.scene_reference, 1)}
        first["preset"] = model.preset
        cases.append(Case(name, FUNCTION, settings | first | {"policy": library}, labels))
    runs = QUICK_RUNS if options.is_quick else RUNS
    yield Group(f"{model.name}: start", cases, unit="one process, to its end", runs=runs)


def run_code(code: str, *arguments: str) -> dict[str, Any]:
    """Run a piece of Python in a process; return ``stdout``."""
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise RuntimeError(last[0])
    return {"stdout": done.stdout}


def segment_first(
    bundle: str, device: str, policy: str, reference: SceneReference, preset: str
) -> dict[str, Any]:
    """Load a bundle and answer one request, about a held-out scene, in a new process."""
    (scene,) = scenes(1, preset=preset)
    with tempfile.TemporaryDirectory(prefix="coprs-deploy-") as folder:
        image, mask = (str(Path(folder) / name) for name in ("scene.png", "mask.npy"))
        Image.fromarray(scene.image).save(image)
        began = time.time()
        done = run_code(FIRST_MASK, bundle, device, policy, image, scene.instruction, mask)
        found = {"0.mask": np.load(mask), "0.ground_truth": union(scene.masks)}
    *times, peak = json.loads(done["stdout"].strip().splitlines()[-1])
    steps = zip(STEPS, [began, *times], times, strict=False)
    stages = {TOTAL: 1e3 * (times[-1] - began)} | {n: 1e3 * (end - at) for n, at, end in steps}
    accuracy = reference.accuracy(found)
    return {"stages": stages, "metrics": {"peak_bytes": float(peak)}, "accuracy": accuracy}


RUNTIME = "onnxruntime"

COUNTS, SIDES = (1, 2, 4, 8), (128, 512, 1024, 2048, 4096)

TARGETS = ExportOptions(targets=OptimizationProfile(1, 4, 16))
IMAGES = ExportOptions(images=OptimizationProfile(1, 2, 8))
GRAPH_SWEEPS = (
    ("prior and mask decoder, targets on one image", "targets", TARGETS, (*COUNTS, 16)),
    ("image encoder, images in one call", "images", IMAGES, COUNTS),
)
"""Title, parameter, variant of the export, and values."""

REQUEST_SWEEPS = (
    ("questions on one image, time of one", "questions", COUNTS, 8),
    ("images at once, time of one", "images", COUNTS, 8),
    ("side of the image in pixels", "side", SIDES, 4),
)
"""Title, parameter, its values, and number of scenes."""


def scaling_suite(fixtures: Fixtures) -> Planned:
    """List a group for each sweep on each device."""
    present, skipped = runtimes_here(fixtures.options.devices, RUNTIME)
    yield from skipped
    bundle = partial(fixtures.bundle, runtime=RUNTIME, precision=FP32)
    for _, device in present:
        for model, sweep in itertools.product(fixtures.models(), GRAPH_SWEEPS):
            title, parameter, variant, values = sweep
            graph = IMAGE_ENCODER if parameter == "images" else f"{PRIOR}+{MASK_DECODER}"
            shared = {"graph": graph, "runtime": RUNTIME, "inputs": partial(fixtures.inputs, model)}
            shared["bundle"] = partial(bundle, model, variant=variant)
            each = {n: {**shared, "repeat": n} for n in values}
            yield _sweep(model, device, (title, parameter), each)
        for title, parameter, values, count in REQUEST_SWEEPS:
            shared = {"bundle": partial(bundle, fixtures.model), "count": count}
            shared["policy"] = _policies(fixtures.model, FP32, device)[0]
            shared["preset"] = fixtures.model.preset
            sides = {n: n if parameter == "side" else None for n in values}
            references = {n: partial(fixtures.scene_reference, count, sides[n]) for n in values}
            each = {n: {**shared, parameter: n, "reference": references[n]} for n in values}
            yield _sweep(fixtures.model, device, (title, parameter), each)


def _sweep(
    model: Model, device: str, described: tuple[str, str], each: Mapping[int, dict[str, Any]]
) -> Group:
    """Describe the cases of a sweep by their settings, given title and parameter."""
    (title, parameter), cases = described, []
    for value, settings in each.items():
        target, memory = f"{WORKLOADS}:open_requests", 0
        if "graph" in settings:
            target = "coprs_deploy.bench.graph_workloads:open_bundle_graphs"
            memory = value * model.estimated_bytes if parameter == "images" else 700_000_000
        name = f"{value} x {value} pixels" if parameter == "side" else f"{value} {parameter}"
        labels, given = (
            model.labels(RUNTIME, FP32, device, **{parameter: value}),
            {"device": device},
        )
        cases.append(Case(name, target, settings | given, labels, memory or model.request_bytes))
    name = f"{model.name}: {title}" + (f", on {device}" if device != "cpu" else "")
    return Group(name, cases, cases[0].name, "as the name says", parameter)
