"""ONNX graphs through OpenVINO on the CPU.

It reads the same files as ONNX Runtime; inputs and outputs are host arrays without a copy. What is
not int8 in the graph is computed in float32, or in bfloat16 on request; int8 and bfloat16 need
instruction sets of the processor.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from coprs_deploy.bundle import EngineRecord
from coprs_deploy.engines.cache import Cache, graph_bytes
from coprs_deploy.engines.runner import (
    Array,
    Availability,
    DeviceTensor,
    HostTensor,
    Runner,
    RunnerOptions,
    host_array,
)
from coprs_deploy.errors import (
    BundleError,
    MissingDependencyError,
    RuntimeUnavailableError,
    import_failure,
    install_hint,
)
from coprs_deploy.machine import describe_processor
from coprs_deploy.specs import GraphSpec

DEVICE = "CPU"
OPENVINO_FOLDER = "openvino"
INSTALL = install_hint("edge")

LATENCY = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1, "ENABLE_CPU_PINNING": False}
"""Settings of graphs that requests wait for. By default OpenVINO binds the threads of each graph to
cores, the first graph's to the same cores as the next one's: beside other busy processes a thread
waits for its core's time slices while another core is free."""

CACHED_GRAPH_BYTES = 128_000_000
"""Size limit of cached graphs. A compiled graph contains a second copy of the weights, and ViT-B
(370 MB) opens in 0.5 s from the cache and in 0.7 s without it."""

_HINTS = {"fp32": "f32", "bf16": "bf16"}

_core_lock = threading.Lock()


class OpenVinoRunner(Runner):
    """One ONNX graph compiled by OpenVINO, once for each number of targets or images.

    OpenVINO 2026.4 compiles the mask decoder with a symbolic number of targets, but fails at run
    time for more than one target, so every number gets its own static graph.
    """

    def __init__(self, path: Path, spec: GraphSpec, options: RunnerOptions) -> None:
        openvino = _import_openvino()
        if options.device_type != "cpu":
            raise RuntimeUnavailableError(
                f"device is {options.device!r}; accepted for openvino: 'cpu'. Use device cpu, or "
                "the runtime onnxruntime"
            )
        precision, supported = options.inference_precision, inference_precisions()
        if precision not in supported:
            raise RuntimeUnavailableError(
                f"inference_precision is {precision!r}, which this processor does not support "
                f"(bfloat16 needs AMX or AVX-512 BF16); accepted here: {', '.join(supported)}"
            )
        settings = LATENCY | {"INFERENCE_PRECISION_HINT": _HINTS[precision]}
        if options.num_threads is not None:
            settings["INFERENCE_NUM_THREADS"] = options.num_threads
        if path.exists():
            settings |= cache_settings(graph_bytes(path), options.cache_dir)
        suffix = "" if precision == "fp32" else f", {precision}"
        super().__init__(spec, f"openvino {_version(openvino)} on {options.device}{suffix}")
        self._openvino = openvino
        self._core = openvino_core()
        self._settings = settings
        self._compiled: dict[int, _CompiledGraph] = {}
        self._lock = threading.Lock()
        try:
            self._model: Any = self._core.read_model(path)
            # OpenVINO reads the Q/DQ pairs of int8 products as FakeQuantize.
            if any(node.get_type_name() == "FakeQuantize" for node in self._model.get_ops()):
                require_int8_units()
            self._compiled_for(spec.targets.opt)
        except (RuntimeError, OSError) as error:
            raise BundleError(f"OpenVINO cannot open {path}: {error}") from error
        if spec.profile.is_static:
            self._model = None  # the compiled graph has its own copy of the weights

    def _run(self, inputs: Mapping[str, Array | DeviceTensor]) -> dict[str, DeviceTensor]:
        arrays = {name: host_array(value) for name, value in inputs.items()}
        shapes = {name: array.shape for name, array in arrays.items()}
        count = self.spec.count_of(shapes) or self.spec.targets.opt
        # Fresh arrays: a request overwrites its own outputs in the next call.
        outputs = {
            tensor.name: np.empty(tensor.shape_for(count), dtype=tensor.dtype)
            for tensor in self.spec.outputs
        }
        with self._compiled_for(count).request() as request:
            for name, array in (arrays | outputs).items():
                request.set_tensor(name, self._openvino.Tensor(array, shared_memory=True))
            request.infer()
        return {name: HostTensor(array) for name, array in outputs.items()}

    def _compiled_for(self, count: int) -> _CompiledGraph:
        """Return the graph for a number of targets or images; the first call compiles it."""
        with self._lock:
            if count not in self._compiled:
                assert self._model is not None, "the runner was closed"
                model = self._model
                if not self.spec.profile.is_static:
                    model = model.clone()
                    model.reshape({t.name: t.shape_for(count) for t in self.spec.inputs})
                compiled = self._core.compile_model(model, DEVICE, self._settings)
                self._compiled[count] = _CompiledGraph(compiled)
            return self._compiled[count]

    def close(self) -> None:
        """Free the graph and its inference requests."""
        self._model = None
        self._compiled = {}


@dataclass(frozen=True)
class _CompiledGraph:
    """A static graph and its idle inference requests; a request serves one call at a time."""

    compiled: Any
    idle: deque[Any] = field(default_factory=deque)  # its append and pop are atomic

    @contextmanager
    def request(self) -> Iterator[Any]:
        """Lend an idle inference request; a new one is created if all are in use."""
        try:
            request = self.idle.pop()
        except IndexError:
            request = self.compiled.create_infer_request()
        try:
            yield request
        finally:
            self.idle.append(request)


def open_graph(
    path: Path, spec: GraphSpec, options: RunnerOptions, engine: EngineRecord | None = None
) -> Runner:
    """Open an ONNX file with OpenVINO; see :func:`coprs_deploy.engines.open_graph`."""
    return OpenVinoRunner(path, spec, options)


def openvino_core() -> Any:
    """Return the only ``openvino.Core`` of the process, which is never destroyed.

    A second core can make the next signal crash the process. The CPU plugin of a core (2026.4)
    installs a signal stack for the thread that loads it and removes it with the core. If the first
    of two cores is destroyed first, the second restores the first one's stack, which is unmapped,
    and Python handles its signals there.

    Raises:
        MissingDependencyError: OpenVINO is not installed.
    """
    with _core_lock:
        return _cached_core()


@cache
def _cached_core() -> Any:
    return _import_openvino().Core()


def cache_settings(num_bytes: int, cache_dir: Path | None) -> dict[str, Any]:
    """Return the setting that keeps compiled graphs; empty for graphs that are too large.

    The key of a model that was read before it is compiled is its content, weights included. That of
    a path is only its name and time stamp.
    """
    cache = Cache(cache_dir)
    if num_bytes > CACHED_GRAPH_BYTES or not cache.is_writable(OPENVINO_FOLDER):
        return {}
    return {"CACHE_DIR": str(cache.root / OPENVINO_FOLDER)}


def compile_file(
    path: Path, settings: Mapping[str, Any], change: Callable[[Any], None] | None = None
) -> Any:
    """Compile a graph file; through the cache if :func:`cache_settings` chose it.

    Args:
        path: graph file.
        settings: properties of OpenVINO.
        change: changes the graph before it is compiled; None leaves it as it is.

    Raises:
        RuntimeError: OpenVINO cannot read or compile it.
    """
    core = openvino_core()
    model = core.read_model(path) if change or "CACHE_DIR" in settings else path
    if change is not None:
        change(model)
    return core.compile_model(model, DEVICE, dict(settings))


def inference_precisions() -> tuple[str, ...]:
    """List the precisions in which OpenVINO can compute float32 products on this processor.

    Raises:
        MissingDependencyError: OpenVINO is not installed.
    """
    capabilities = openvino_core().get_property(DEVICE, "OPTIMIZATION_CAPABILITIES")
    return ("fp32", "bf16") if "BF16" in capabilities else ("fp32",)


def require_int8_units() -> None:
    """Refuse int8 on processors where OpenVINO's products are not exact.

    Without int8 dot-product instructions, OpenVINO 2026.4 adds pairs of products in 16 bits: the
    relative error of the demo model's embedding was 7.4e-2 instead of 2.0e-2 with exact sums.

    Raises:
        RuntimeUnavailableError: the processor has no such instructions.
    """
    if not describe_processor().has_int8_units:
        raise RuntimeUnavailableError(
            "OpenVINO's int8 products are not exact on this processor, which has none of AVX-512 "
            "VNNI, AVX-VNNI, AMX; use the runtime onnxruntime, which runs the same graph exactly"
        )


def availability() -> list[Availability]:
    """Report whether OpenVINO is installed, and the precisions that this processor supports."""
    try:
        openvino = _import_openvino()
    except MissingDependencyError as error:
        return [Availability("openvino cpu", False, str(error), INSTALL)]
    int8 = ["int8"] if describe_processor().has_int8_units else []
    precisions = ", ".join([*inference_precisions(), *int8])
    return [Availability("openvino cpu", True, f"{_version(openvino)}, {precisions}")]


def _import_openvino() -> Any:
    try:
        Path.home()
    except RuntimeError:  # importing OpenVINO fails without a home directory
        os.environ["HOME"] = tempfile.gettempdir()
    try:
        import openvino
    except ImportError as error:
        raise import_failure(error, "openvino", INSTALL, title="OpenVINO") from error
    return openvino


def _version(openvino: Any) -> str:
    """Return the version without its build number."""
    return str(openvino.__version__).partition("-")[0]
