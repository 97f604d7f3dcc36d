"""Choose the fastest runtime of each graph by timing, and cache the choice.

Runtimes are opened, timed and closed one after the other, so that peak memory is that of one graph.
A choice is cached under everything that could change it.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from functools import partial
from typing import Any

import msgspec
import numpy as np

from coprs_deploy.bundle import Bundle
from coprs_deploy.engines import ONNX_RUNTIMES, open_bundle_graph
from coprs_deploy.engines.cache import Cache
from coprs_deploy.engines.runner import Array, Runner, RunnerOptions
from coprs_deploy.errors import CoPRSError
from coprs_deploy.machine import describe_processor, installed_versions
from coprs_deploy.specs import GraphSpec, Record

AUTOTUNE_FOLDER = "autotune"
REVISION = 1
"""Increase when the measurement changes; cached choices go stale."""

TIMING_SECONDS = 0.4
"""Time after which no further run of a runtime starts; a single run may take longer."""

MAX_RUNS = 30
PACKAGES = ("numpy", "onnxruntime", "onnxruntime-gpu", "openvino")
"""Packages whose versions are part of the cache key."""

NOISE = 0.05
"""Relative margin by which another runtime must be faster than the preferred one."""

SLOW = 3.0
"""A run that takes this many times the best latency may be stopped."""


class Timing(Record, frozen=True):
    """Median latency of one runtime, without the first run; None if it failed.

    Without runs, it was stopped after this time.
    """

    runtime: str
    median_ms: float | None
    num_runs: int = 0
    error: str = ""

    def __str__(self) -> str:
        if self.median_ms is None:
            return f"{self.runtime} failed ({self.error})"
        return f"{self.runtime} {'' if self.num_runs else 'over '}{self.median_ms:.2f} ms"


class RuntimeChoice(Record, frozen=True):
    """The runtime chosen for one graph, or the library chosen for the policy.

    Attributes:
        graph: name of the graph; ``policy`` for the policy.
        reason: reason of the choice, in plain words.
        timings: measurements; empty if only one runtime can run it.
        date: ISO date of the measurement.
    """

    graph: str
    runtime: str
    reason: str
    timings: tuple[Timing, ...] = ()
    date: str = ""
    is_cached: bool = False

    def __str__(self) -> str:
        timings = ", ".join(map(str, self.timings))
        source = f" (cached on {self.date})" if self.is_cached else ""
        colon = ": " if timings else ""
        return f"{self.graph}: {self.runtime}, {self.reason}{colon}{timings}{source}"


def autotune(
    bundle: Bundle,
    options: RunnerOptions,
    retune: bool = False,
    progress: Callable[[str], None] = lambda step: None,
) -> dict[str, RuntimeChoice]:
    """Choose the fastest runtime of each graph, by name, on this machine.

    ``options`` says how the graphs will be run; its ``cache_dir`` holds the choices. ``retune``
    measures again. ``progress`` is called with the name of each measurement as it starts.

    Raises:
        CoPRSError: no runtime can run a graph; the error of its own runtime.
    """
    cache = Cache(options.cache_dir)
    choices = {}
    for name, graph in bundle.manifest.graphs.items():
        if graph.runtime not in ONNX_RUNTIMES:
            choices[name] = RuntimeChoice(name, graph.runtime, "the only runtime of an engine")
            continue
        # Its own first.
        runtimes = sorted(ONNX_RUNTIMES, key=lambda runtime: runtime != graph.runtime)
        candidates = {
            runtime: partial(_time_graph, bundle, name, options, runtime) for runtime in runtimes
        }
        key = choice_key(bundle, name, options)
        choices[name] = choose_fastest(
            name, candidates, cache=cache, key=key, retune=retune, progress=progress
        )
    return choices


def choice_key(bundle: Bundle, name: str, options: RunnerOptions) -> str:
    """Hash everything that a choice depends on: graph, versions, processor, options."""
    graph = bundle.manifest.graphs[name]
    files = (file for file in bundle.manifest.files if file.path.startswith(graph.file))
    return hash_parts(
        PACKAGES,
        graph=graph.to_json(),
        files=sorted(file.sha256 for file in files),
        device=options.device,
        num_threads=options.num_threads,
        inference_precision=options.inference_precision,
    )


def hash_parts(packages: Sequence[str], **parts: Any) -> str:
    """Hash what a choice depends on, besides versions of packages and the processor."""
    parts |= {
        "revision": REVISION,
        "versions": installed_versions(packages),
        "processor": describe_processor().to_json(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _load_choice(cache: Cache, key: str) -> RuntimeChoice | None:
    """Read a cached choice; None if there is none that can be read."""
    try:
        stored = json.loads(cache.load_blob(AUTOTUNE_FOLDER, key) or b"")
        return msgspec.structs.replace(RuntimeChoice.from_json(stored), is_cached=True)
    except ValueError:
        return None


def choose_fastest(
    name: str,
    candidates: Mapping[str, Callable[[float], Timing]],
    *,
    cache: Cache,
    key: str,
    retune: bool = False,
    progress: Callable[[str], None] = lambda step: None,
) -> RuntimeChoice:
    """Return the cached choice, or measure all candidates and cache the fastest.

    Args:
        name: what is measured, for messages.
        candidates: measurement of each runtime, the preferred one first. The argument is the time
            in milliseconds after which a run is slow enough to be stopped.
        cache: cache that holds the choices.
        key: name of the choice in the cache.
        retune: measure again.
        progress: called with the name of each measurement as it starts.

    Raises:
        CoPRSError: all failed; the error of the first.
    """
    choice = None if retune else _load_choice(cache, key)
    if choice is None:
        choice = _measure(name, candidates, progress)
        cache.save_blob(AUTOTUNE_FOLDER, key, json.dumps(choice.to_json(), indent=2).encode())
    return choice


def _measure(
    name: str,
    candidates: Mapping[str, Callable[[float], Timing]],
    progress: Callable[[str], None],
) -> RuntimeChoice:
    timings: list[Timing] = []
    errors, medians = [], dict[str, float]()
    for runtime, measure in candidates.items():
        progress(f"time {name} on {runtime}")
        try:
            timings.append(measure(SLOW * min(medians.values(), default=math.inf)))
        # ValueError: unsupported precision. RuntimeError: the library failed during a run.
        except (CoPRSError, ValueError, RuntimeError) as error:
            errors.append(error)
            timings.append(Timing(runtime, None, error=str(error)))
        if (latency := timings[-1].median_ms) is not None:
            medians[runtime] = latency
    if not medians:
        raise errors[0]
    preferred = next(iter(candidates))
    fastest = min(medians, key=lambda runtime: medians[runtime])
    reason = "measured as the fastest"
    if len(medians) == 1:
        reason = "the only one that runs here"
    elif fastest != preferred and (
        medians.get(preferred, math.inf) * (1 - NOISE) <= medians[fastest]
    ):
        fastest, reason = preferred, f"preferred, and none is more than {NOISE:.0%} faster"
    return RuntimeChoice(name, fastest, reason, tuple(timings), date.today().isoformat())


def _time_graph(
    bundle: Bundle, name: str, options: RunnerOptions, runtime: str, limit_ms: float
) -> Timing:
    with open_bundle_graph(bundle, name, options, runtime) as runner:
        return _time(runtime, runner)


def _time(runtime: str, runner: Runner) -> Timing:
    """Measure the median latency, outputs copied to the host; the first run does not count."""
    inputs = random_inputs(runner.spec)
    runner(**inputs)
    times_ms: list[float] = []
    end = time.perf_counter() + TIMING_SECONDS
    while not times_ms or (time.perf_counter() < end and len(times_ms) < MAX_RUNS):
        start = time.perf_counter()
        for output in runner(**inputs).values():
            output.numpy()
        times_ms.append(1e3 * (time.perf_counter() - start))
    return Timing(runtime, statistics.median(times_ms), len(times_ms))


def random_inputs(spec: GraphSpec) -> dict[str, Array]:
    """Draw normal inputs of one image and ``opt`` targets, with the largest possible sizes."""
    generator = np.random.default_rng(0)
    inputs: dict[str, Array] = {}
    for tensor in spec.inputs:
        shape = tensor.shape_for(spec.targets.opt)  # images: 1, most requests come alone
        if tensor.dtype == "float32":
            inputs[tensor.name] = generator.standard_normal(shape, dtype=np.float32)
        else:
            inputs[tensor.name] = np.full(shape, np.iinfo(np.int32).max, dtype=tensor.dtype)
    return inputs
