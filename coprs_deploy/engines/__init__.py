"""Runners: one for each runtime, all with one call signature.

:data:`RUNTIMES` lists the runtimes by the names that users type; adding a runtime is adding a
module with ``open_graph`` and ``availability`` (see :class:`RuntimeModule`) and a row here.
Modules are imported when a runtime is used.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, cast

from coprs_deploy.bundle import Bundle, EngineRecord, GraphRecord
from coprs_deploy.engines.graphs import SegmentationGraphs
from coprs_deploy.engines.runner import Availability, DeviceTensor, Runner, RunnerOptions
from coprs_deploy.specs import GraphSpec

__all__ = [
    "ONNX_RUNTIMES",
    "Availability",
    "DeviceTensor",
    "Runner",
    "RunnerOptions",
    "SegmentationGraphs",
    "check_runtime",
    "open_bundle_graph",
    "open_graph",
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
"""Module of each runtime in this package, and the flavor of TensorRT."""


class RuntimeModule(Protocol):
    """What a module of a runtime in :data:`RUNTIMES` defines."""

    def open_graph(
        self,
        path: Path,
        spec: GraphSpec,
        options: RunnerOptions,
        engine: EngineRecord | None = None,
    ) -> Runner:
        """Open an exported graph; ``engine`` is what its manifest says of a plan."""

    def availability(self) -> list[Availability]:
        """Say which devices this runtime can use here, and what the others lack."""


@dataclass(frozen=True)
class _TensorRt:
    """The contract of :class:`RuntimeModule` for one flavor of TensorRT."""

    open_graph: Callable[..., Runner]
    availability: Callable[[], list[Availability]]


def runtime_names() -> list[str]:
    """Name the runtimes of this package, whether or not they can run here."""
    return list(RUNTIMES)


def runtime_module(name: str) -> RuntimeModule:
    """Import the module of a runtime.

    Raises:
        ValueError: there is no such runtime.
    """
    if name not in RUNTIMES:
        raise ValueError(f"runtime is {name!r}; accepted: {', '.join(RUNTIMES)}")
    module_name, variant = RUNTIMES[name]
    module = importlib.import_module(f"{__name__}.{module_name}")
    if variant is None:
        return cast(RuntimeModule, module)
    variant = module.TRT_VARIANTS[variant]
    return _TensorRt(
        partial(module.open_engine, variant), partial(module.trt_availability, variant)
    )


def open_graph(
    name: str,
    path: Path,
    spec: GraphSpec,
    options: RunnerOptions,
    engine: EngineRecord | None = None,
) -> Runner:
    """Open an exported graph with the runtime of that name.

    Raises:
        ValueError: there is no such runtime, or it cannot compute in the asked precision.
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
    """Open a graph of a bundle.

    Args:
        bundle: the bundle.
        name: of the graph.
        options: how to run it.
        runtime: which runtime runs it; None takes the one that the manifest names.

    Raises:
        ValueError: that runtime cannot run the graph.
    """
    graph = bundle.manifest.graphs[name]
    if runtime is not None:
        check_runtime(graph, runtime)
    return open_graph(
        runtime or graph.runtime, bundle.graph_path(name), graph.spec, options, graph.engine
    )


def check_runtime(graph: GraphRecord, runtime: str) -> None:
    """Refuse a runtime that cannot run a graph: an engine has one, an ONNX file has two.

    Raises:
        ValueError: says which runtimes can.
    """
    accepted = ONNX_RUNTIMES if graph.runtime in ONNX_RUNTIMES else (graph.runtime,)
    if runtime not in accepted:
        raise ValueError(
            f"runtime is {runtime!r}, and {graph.file} was exported for {graph.runtime} in "
            f"{graph.precision}; accepted: "
            f"{', '.join(accepted)}"
        )
