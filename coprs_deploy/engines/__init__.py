"""Runners: one for each runtime, all with one call signature.

A new runtime is a module with ``open_graph`` and ``availability`` (see :class:`RuntimeModule`) and
a row in :data:`RUNTIMES`. A module is imported when its runtime is used.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Protocol, cast

from coprs_deploy.bundle import Bundle, EngineRecord, GraphRecord
from coprs_deploy.engines.graphs import SegmentationGraphs
from coprs_deploy.engines.runner import Availability, DeviceTensor, Runner, RunnerOptions
from coprs_deploy.errors import RuntimeUnavailableError
from coprs_deploy.specs import GraphSpec

__all__ = [
    "ONNX_RUNTIMES",
    "Availability",
    "DeviceTensor",
    "Runner",
    "RunnerOptions",
    "SegmentationGraphs",
    "check_runtime",
    "default_runtime",
    "open_bundle_graph",
    "open_graph",
    "require_runtime",
    "runtime_module",
    "runtime_names",
]

ONNX_RUNTIMES = ("onnxruntime", "openvino")
"""Runtimes that read ONNX files; each runs what was exported for the other."""

RUNTIMES: Mapping[str, tuple[str, str | None]] = {
    "onnxruntime": ("onnxruntime_runner", None),
    "openvino": ("openvino_runner", None),
    "tensorrt-rtx": ("trt.runner", "tensorrt-rtx"),
    "tensorrt": ("trt.runner", "tensorrt"),
    "torch": ("torch_runner", None),
}
"""Module of each runtime in this package, and its TensorRT variant."""


class RuntimeModule(Protocol):
    """What the module of a runtime in :data:`RUNTIMES` defines."""

    def open_graph(
        self,
        path: Path,
        spec: GraphSpec,
        options: RunnerOptions,
        engine: EngineRecord | None = None,
    ) -> Runner:
        """Open an exported graph; ``engine`` is its record in the manifest if it is an engine."""

    def availability(self) -> list[Availability]:
        """Report which devices this runtime can use on this machine."""


def runtime_names() -> list[str]:
    """List all runtimes, whether or not they can run on this machine."""
    return list(RUNTIMES)


def runtime_module(name: str) -> RuntimeModule:
    """Import the module of a runtime.

    Raises:
        ValueError: there is no such runtime.
    """
    if name not in RUNTIMES:
        raise ValueError(f"runtime is {name!r}; accepted: {', '.join(RUNTIMES)}")
    module_name, variant_name = RUNTIMES[name]
    module = importlib.import_module(f"{__name__}.{module_name}")
    if variant_name is None:
        return cast(RuntimeModule, module)
    variant = module.TRT_VARIANTS[variant_name]
    bound = SimpleNamespace(
        open_graph=partial(module.open_engine, variant),
        availability=partial(module.trt_availability, variant),
    )
    return cast(RuntimeModule, bound)


def require_runtime(name: str) -> None:
    """Check early whether a runtime of ONNX files is installed.

    Raises:
        RuntimeUnavailableError: it is not; the message has the pip line that brings it.
    """
    on_cpu, *_ = runtime_module(name).availability()
    if not on_cpu.is_available:
        raise RuntimeUnavailableError(on_cpu.detail)


def open_graph(
    name: str,
    path: Path,
    spec: GraphSpec,
    options: RunnerOptions,
    engine: EngineRecord | None = None,
) -> Runner:
    """Open an exported graph, an ONNX file or an engine with its record, with a runtime.

    Raises:
        ValueError: there is no such runtime, or it does not support the inference precision.
        MissingDependencyError: the library is not installed.
        RuntimeUnavailableError: the library cannot use the device or the precision here.
        BundleError: the library cannot read the file, or an engine does not fit.
    """
    if options.inference_precision != "fp32" and name != "openvino":
        raise ValueError(
            f"inference_precision is {options.inference_precision!r}, and {name} computes in the "
            "precision of the graph; accepted: fp32, or the runtime openvino"
        )
    return runtime_module(name).open_graph(path, spec, options, engine)


def open_bundle_graph(
    bundle: Bundle, name: str, options: RunnerOptions, runtime: str | None = None
) -> Runner:
    """Open a graph of a bundle by name, by default with :func:`default_runtime`.

    Raises:
        ValueError: the runtime cannot run the graph; see also :func:`open_graph`.
    """
    graph = bundle.manifest.graphs[name]
    if runtime is None:
        runtime = default_runtime(graph, options)
    else:
        check_runtime(graph, runtime)
    return open_graph(runtime, bundle.graph_path(name), graph.spec, options, graph.engine)


def default_runtime(graph: GraphRecord, options: RunnerOptions) -> str:
    """Return the runtime that a graph was exported for.

    If it is not installed, ONNX files run on a CPU with the other one that reads them. The
    runner's description, which every result names, tells which one runs.
    """
    if graph.runtime not in ONNX_RUNTIMES or options.device_type != "cpu":
        return graph.runtime
    installed = [name for name in ONNX_RUNTIMES if importlib.util.find_spec(name) is not None]
    return graph.runtime if graph.runtime in installed else next(iter(installed), graph.runtime)


def check_runtime(graph: GraphRecord, runtime: str) -> None:
    """Refuse a runtime that cannot run a graph: engines have one runtime, ONNX files two.

    Raises:
        ValueError: lists the accepted runtimes.
    """
    accepted = ONNX_RUNTIMES if graph.runtime in ONNX_RUNTIMES else (graph.runtime,)
    if runtime not in accepted:
        raise ValueError(
            f"runtime is {runtime!r}, and {graph.file} was exported for {graph.runtime} in "
            f"{graph.precision}; accepted: {', '.join(accepted)}"
        )
