"""ONNX graphs through OpenVINO on the CPU.

It reads the same files as ONNX Runtime and takes and gives host arrays without a copy. What is not
int8 in the graph is computed in float32 unless bfloat16 was asked for; for both the processor must
have the units.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from coprs_deploy.bundle import EngineRecord
from coprs_deploy.engines.cache import default_cache
from coprs_deploy.engines.runner import (
    Array,
    Availability,
    DeviceTensor,
    HostTensor,
    Runner,
    RunnerOptions,
    host_array,
)
from coprs_deploy.errors import BundleError, MissingDependencyError, RuntimeUnavailableError
from coprs_deploy.machine import describe_processor
from coprs_deploy.specs import GraphSpec

DEVICE = "CPU"
INSTALL = 'pip install "coprs-deploy[openvino]"'

CACHED_GRAPH_BYTES = 128_000_000
"""Larger graphs are compiled anew each time: a compiled graph holds the weights once more, and
ViT-B's (370 MB) opens in 0.5 s from the cache and in 0.7 s without it."""

_HINTS = {"fp32": "f32", "bf16": "bf16"}

_core_lock = threading.Lock()


class OpenVinoRunner(Runner):
    """One ONNX graph compiled by OpenVINO, once for each number of targets or images of a call.

    OpenVINO 2026.4 compiles the mask decoder of a symbolic number of targets without an error and
    fails when it runs with more than one, so every number gets its own static graph.
    """

    def __init__(self, path: Path, spec: GraphSpec, options: RunnerOptions) -> None:
        openvino = _import_openvino()
        if options.device_type != "cpu":
            raise RuntimeUnavailableError(
                f"device is {options.device!r}, and OpenVINO runs graphs on the CPU here; use "
                "device cpu, or the runtime onnxruntime"
            )
        core = openvino_core()
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_PRECISION_HINT": _HINTS[_supported_precision(core, options)],
        }
        if options.num_threads is not None:
            settings["INFERENCE_NUM_THREADS"] = options.num_threads
        if path.exists() and _graph_bytes(path) <= CACHED_GRAPH_BYTES:
            # A compiled graph is found by the content of the model, weights included.
            settings["CACHE_DIR"] = str(options.cache or default_cache() / "openvino")
        precision = "" if options.inference_precision == "fp32" else ", bf16"
        super().__init__(spec, f"openvino {_version(openvino)} on {options.device}{precision}")
        self._openvino = openvino
        self._core = core
        self._settings = settings
        self._compiled: dict[int, _CompiledGraph] = {}
        self._lock = threading.Lock()
        try:
            self._model: Any = core.read_model(path)
            if _holds_int8(self._model):
                require_int8_units()
            self._compiled_for(spec.targets.opt)
        except (RuntimeError, OSError) as error:
            raise BundleError(f"OpenVINO cannot open {path}: {error}") from error
        if spec.profile.is_static:
            self._model = None  # the compiled graph has its own weights

    def _run(self, inputs: Mapping[str, Array | DeviceTensor]) -> dict[str, DeviceTensor]:
        arrays = {name: host_array(value) for name, value in inputs.items()}
        shapes = {name: array.shape for name, array in arrays.items()}
        count = self.spec.count_of(shapes) or self.spec.targets.opt
        # Written anew each time: a request reuses its own output, and this one outlives the call.
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
        """Find the graph for a number of targets or images; the first such call compiles it."""
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
        """Free the graph and its requests."""
        self._model = None
        self._compiled = {}


class _CompiledGraph:
    """A static graph and its requests; one call at a time may use a request."""

    def __init__(self, compiled: Any) -> None:
        self.compiled = compiled
        self._idle: list[Any] = []
        self._lock = threading.Lock()

    @contextmanager
    def request(self) -> Iterator[Any]:
        """Lend a request; there are as many as there were calls at once."""
        with self._lock:
            request = self._idle.pop() if self._idle else self.compiled.create_infer_request()
        try:
            yield request
        finally:
            with self._lock:
                self._idle.append(request)


def open_graph(
    path: Path, spec: GraphSpec, options: RunnerOptions, engine: EngineRecord | None = None
) -> Runner:
    """Open an ONNX file.

    Raises:
        MissingDependencyError: OpenVINO is not installed.
        RuntimeUnavailableError: it cannot use the device, or the processor has no units for the
            precision.
        BundleError: it cannot read the file.
    """
    return OpenVinoRunner(path, spec, options)


def openvino_core() -> Any:
    """Give the process's one ``openvino.Core``, which lives as long as the process.

    With a second one the next signal could end the process. The CPU plugin of a core (2026.4) gives
    the thread that loads it a stack for signals, and takes it away with the core: where the first
    of two goes first, the second puts the first one's back, which is unmapped, and Python handles
    its signals there.

    Raises:
        MissingDependencyError: OpenVINO is not installed.
    """
    with _core_lock:
        return _core()


@cache
def _core() -> Any:
    return _import_openvino().Core()


def inference_precisions() -> tuple[str, ...]:
    """List the precisions that OpenVINO can compute float32 products in on this processor.

    Raises:
        MissingDependencyError: OpenVINO is not installed.
    """
    return tuple(_precisions(openvino_core()))


def require_int8_units() -> None:
    """Refuse int8 products where they would not be exact.

    Without such units OpenVINO 2026.4 adds pairs of products in 16 bits: the shipped model's
    embedding was off by 7.4e-2 of its largest value, where exact sums give 2.0e-2.

    Raises:
        RuntimeUnavailableError: this processor has none.
    """
    if not describe_processor().has_int8_units:
        raise RuntimeUnavailableError(
            "OpenVINO's int8 products are not exact on this processor, which has none of AVX-512 "
            "VNNI, AVX-VNNI, AMX; use the runtime onnxruntime, whose are (it takes the same graph)"
        )


def availability() -> list[Availability]:
    """Say whether OpenVINO is installed, and which precisions this processor has units for."""
    try:
        openvino = _import_openvino()
    except MissingDependencyError as error:
        return [Availability("openvino cpu", False, str(error), INSTALL)]
    int8 = ["int8"] if describe_processor().has_int8_units else []
    precisions = ", ".join([*_precisions(openvino_core()), *int8])
    return [Availability("openvino cpu", True, f"{_version(openvino)}, {precisions}")]


def _import_openvino() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise MissingDependencyError(f"OpenVINO is not installed; {INSTALL}") from error
    return openvino


def _version(openvino: Any) -> str:
    """Name the version without its build number."""
    version: str = openvino.__version__
    return version.partition("-")[0]


def _precisions(core: Any) -> list[str]:
    """List the precisions that products can be computed in on this processor."""
    capabilities = core.get_property(DEVICE, "OPTIMIZATION_CAPABILITIES")
    return ["fp32", *(["bf16"] if "BF16" in capabilities else [])]


def _supported_precision(core: Any, options: RunnerOptions) -> str:
    asked, known = options.inference_precision, _precisions(core)
    if asked not in known:
        raise RuntimeUnavailableError(
            f"inference_precision is {asked!r}, and this processor has no units for it (bfloat16 "
            f"needs AMX or AVX-512 BF16); accepted here: {', '.join(known)}"
        )
    return asked


def _holds_int8(model: Any) -> bool:
    """Whether a graph has products between QuantizeLinear and DequantizeLinear."""
    return any(node.get_type_name() == "FakeQuantize" for node in model.get_ops())


def _graph_bytes(path: Path) -> int:
    """Add up the sizes of a graph and of the weights beside it."""
    return sum(
        file.stat().st_size for file in (path, path.with_name(f"{path.name}.data")) if file.exists()
    )
