"""Which runtime answers fastest here: measured on the bundle's own graphs, and remembered.

Each graph is opened with every runtime that can run it, run a few times, and closed again, one
runtime after the other, so that the peak of memory is one graph's. What was found is kept in the
user's cache folder under everything that could change it.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Callable
from datetime import date

import msgspec
import numpy as np

from coprs_deploy.bundle import Bundle
from coprs_deploy.engines import ONNX_RUNTIMES, open_bundle_graph
from coprs_deploy.engines.cache import BuildCache
from coprs_deploy.engines.runner import Array, Runner, RunnerOptions
from coprs_deploy.errors import CoPRSError
from coprs_deploy.machine import describe_processor, installed_versions
from coprs_deploy.specs import GraphSpec, Record

FOLDER = "choices"
"""Where choices are kept, below the cache folder."""

REVISION = 2
"""Of the way to measure; a choice of another one is forgotten."""

TRIAL_SECONDS = 0.4
"""A runtime is run again until this long has passed; a single run may take longer."""

MAX_RUNS = 30
PACKAGES = ("numpy", "onnxruntime", "onnxruntime-gpu", "openvino")
"""Whose versions a choice depends on."""

NOISE = 0.05
"""Share by which another runtime must be faster than the bundle's own."""


class Timing(Record, frozen=True):
    """One runtime on one graph.

    Attributes:
        runtime: as in ``--runtime``.
        median_ms: of its runs after the first; None where it did not run.
        runs: how many were timed.
        problem: why it did not run.
    """

    runtime: str
    median_ms: float | None
    runs: int = 0
    problem: str = ""

    def __str__(self) -> str:
        if self.median_ms is None:
            return f"{self.runtime} did not run ({self.problem})"
        return f"{self.runtime} {self.median_ms:.2f} ms"


class RuntimeChoice(Record, frozen=True):
    """The runtime of one graph, and what it was chosen by.

    Attributes:
        graph: name of the graph.
        runtime: the one that runs it.
        reason: why, in words.
        trials: what was measured; empty where there was nothing to choose from.
        measured: the day, as ISO date.
        is_remembered: whether this was measured earlier.
    """

    graph: str
    runtime: str
    reason: str
    trials: tuple[Timing, ...] = ()
    measured: str = ""
    is_remembered: bool = False

    def __str__(self) -> str:
        trials = ", ".join(map(str, self.trials))
        when = f" (remembered from {self.measured})" if self.is_remembered else ""
        return f"{self.graph}: {self.runtime}, {self.reason}{': ' if trials else ''}{trials}{when}"


def autotune(
    bundle: Bundle,
    options: RunnerOptions,
    retune: bool = False,
    cache: BuildCache | None = None,
    report: Callable[[str], None] = lambda step: None,
) -> dict[str, RuntimeChoice]:
    """Choose the runtime of each graph of a bundle by what this machine measures.

    Args:
        bundle: the bundle.
        options: how its graphs will be run.
        retune: whether to measure again what is remembered.
        cache: where choices are kept; None takes the user's folder.
        report: called with the name of each trial as it starts.

    Returns:
        A choice for each graph, by its name.

    Raises:
        CoPRSError: no runtime can run a graph; the first one's error.
    """
    cache = cache or BuildCache()
    choices = {}
    for name, graph in bundle.manifest.graphs.items():
        if graph.runtime not in ONNX_RUNTIMES:
            reason = "the only runtime of an engine"
            choices[name] = RuntimeChoice(name, graph.runtime, reason)
            continue
        key = choice_key(bundle, name, options)
        known = None if retune else _recall(cache, key)
        if known is None:
            known = _measure(bundle, name, options, report)
            cache.keep_blob(FOLDER, key, json.dumps(known.to_json(), indent=2).encode())
        choices[name] = known
    return choices


def choice_key(bundle: Bundle, name: str, options: RunnerOptions) -> str:
    """Name everything that a choice depends on: graph, versions, processor, settings."""
    graph = bundle.manifest.graphs[name]
    parts = {
        "revision": REVISION,
        "graph": graph.to_json(),
        "files": sorted(
            file.sha256 for file in bundle.manifest.files if file.path.startswith(graph.file)
        ),
        "versions": {k: v for k, v in installed_versions().items() if k in PACKAGES},
        "processor": describe_processor().to_json(),
        "device": options.device,
        "num_threads": options.num_threads,
        "inference_precision": options.inference_precision,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _recall(cache: BuildCache, key: str) -> RuntimeChoice | None:
    """Read what was measured earlier; what cannot be read is measured anew."""
    data = cache.load_blob(FOLDER, key)
    if data is None:
        return None
    try:
        known = RuntimeChoice.from_json(json.loads(data))
    except ValueError:
        return None
    return msgspec.structs.replace(known, is_remembered=True)


def _measure(
    bundle: Bundle, name: str, options: RunnerOptions, report: Callable[[str], None]
) -> RuntimeChoice:
    own = bundle.manifest.graphs[name].runtime
    trials, errors = [], []
    for runtime in sorted(ONNX_RUNTIMES, key=lambda runtime: runtime != own):  # its own first
        report(f"time {name} on {runtime}")
        try:
            with open_bundle_graph(bundle, name, options, runtime) as runner:
                trials.append(_time(runtime, runner))
        # A ValueError: it lacks the precision. A RuntimeError: the library failed while it ran.
        except (CoPRSError, ValueError, RuntimeError) as error:
            errors.append(error)
            trials.append(Timing(runtime, None, problem=str(error)))
    times = {trial.runtime: trial.median_ms for trial in trials if trial.median_ms is not None}
    if not times:
        raise errors[0]
    fastest = min(times, key=lambda runtime: times[runtime])
    reason = "measured as the fastest"
    if len(times) == 1:
        reason = "the only one that runs here"
    elif fastest != own and own in times and times[own] * (1 - NOISE) <= times[fastest]:
        fastest, reason = own, f"the bundle's own, and none is more than {NOISE:.0%} faster"
    return RuntimeChoice(name, fastest, reason, tuple(trials), date.today().isoformat())


def _time(runtime: str, runner: Runner) -> Timing:
    """Run a graph until :data:`TRIAL_SECONDS` have passed; the first run is not counted."""
    inputs = trial_inputs(runner.spec)
    runner(**inputs)
    times_ms: list[float] = []
    end = time.perf_counter() + TRIAL_SECONDS
    while not times_ms or (time.perf_counter() < end and len(times_ms) < MAX_RUNS):
        start = time.perf_counter()
        for output in runner(**inputs).values():
            output.numpy()
        times_ms.append(1e3 * (time.perf_counter() - start))
    return Timing(runtime, statistics.median(times_ms), len(times_ms))


def trial_inputs(spec: GraphSpec) -> dict[str, Array]:
    """Draw inputs of a graph: standard normal, and sizes as large as they may be."""
    generator = np.random.default_rng(0)
    inputs: dict[str, Array] = {}
    for tensor in spec.inputs:
        shape = tensor.shape_for(spec.targets.opt)  # one image: most pictures come alone
        if tensor.dtype == "float32":
            inputs[tensor.name] = generator.standard_normal(shape, dtype=np.float32)
        else:
            inputs[tensor.name] = np.full(shape, np.iinfo(np.int32).max, dtype=tensor.dtype)
    return inputs
