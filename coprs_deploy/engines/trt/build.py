"""Compile one typed ONNX graph into an engine, with TensorRT or TensorRT for RTX.

Networks are strongly typed: the types of the graph are the types of the engine. The build runs in
a worker thread, so that Ctrl-C reaches the main thread and stops the build at its next step.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

from coprs_deploy.engines.trt.checks import (
    describe_engine,
    signature_mismatch,
    tensor_spec,
    with_wildcards,
)
from coprs_deploy.engines.trt.variants import (
    TENSORRT,
    TRT_VARIANTS,
    check_capabilities,
    make_logger,
)
from coprs_deploy.errors import EngineBuildError
from coprs_deploy.specs import GraphSpec, Record

BUILDER_REVISION = 1
"""Increase when this module builds another engine from the same graph; cached engines go stale."""

_ERRORS_SHOWN = 3


@dataclass(frozen=True)
class BuildCallbacks:
    """Called with lines to print and, from another thread, with the library's current step."""

    on_note: Callable[[str], None] = lambda line: None
    on_progress: Callable[[str], None] = lambda text: None


class BuildSettings(Record, frozen=True):
    """Settings of an engine build; see :class:`~coprs_deploy.bundle.EngineRecord`.

    ``compute_capabilities`` lists GPUs to build for without a GPU; empty selects this machine's.
    """

    variant: str
    compute_capabilities: tuple[str, ...] = ()
    workspace_bytes: int | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False

    def __post_init__(self) -> None:
        if self.variant not in TRT_VARIANTS:
            raise ValueError(f"variant is {self.variant!r}; accepted: {', '.join(TRT_VARIANTS)}")
        if self.workspace_bytes is not None and self.workspace_bytes < 1 << 20:
            raise ValueError(
                f"workspace is {self.workspace_bytes} bytes; accepted: 1 MiB (0.001 GiB) or more"
            )
        for option in ("version_compatible", "hardware_compatible"):
            if getattr(self, option) and self.variant != TENSORRT.name:
                raise ValueError(
                    f"--{option.replace('_', '-')} is for TensorRT only; engines of TensorRT for "
                    "RTX run on the GPUs in --compute-capabilities and on one version: build one "
                    "engine per version"
                )


@dataclass(frozen=True)
class BuiltEngine:
    """Serialized engine in a buffer of the library, and the timing cache if the variant has one."""

    data: Any
    seconds: float
    network_layers: int
    timing_cache: bytes | None


def build_engine_bytes(
    graph: Path,
    spec: GraphSpec,
    settings: BuildSettings,
    timing_cache: bytes | None = None,
    on_progress: Callable[[str], None] = lambda text: None,
) -> BuiltEngine:
    """Parse an ONNX file, compile it and return the serialized engine.

    ``timing_cache`` holds kernel timings of an earlier build, which are ignored if they do not
    match. ``on_progress`` is called from another thread with the library's current step.

    Raises:
        MissingDependencyError: the library is not installed.
        ValueError: the library does not build for one of the compute capabilities.
        EngineBuildError: the graph cannot be parsed or compiled.
        KeyboardInterrupt: Ctrl-C; the build has ended.
    """
    build = _Build(graph, spec, settings)
    cancelled = Event()
    with ThreadPoolExecutor(1, thread_name_prefix="engine-build") as pool:
        future = pool.submit(build.run, timing_cache, on_progress, cancelled)
        try:
            while not future.done():
                # On some platforms a signal does not interrupt a wait without a timeout.
                wait([future], timeout=0.5)
            return future.result()
        except BaseException:
            cancelled.set()
            raise


class _Build:
    """One build; the library's objects are freed when it ends."""

    def __init__(self, graph: Path, spec: GraphSpec, settings: BuildSettings) -> None:
        variant = TRT_VARIANTS[settings.variant]
        self._library = variant.load()
        self._graph, self._spec, self._settings = graph, spec, settings
        self._name = f"{variant.title} {self._library.__version__}"
        check_capabilities(self._library, variant, settings.compute_capabilities)

    def run(
        self, timing_cache: bytes | None, on_progress: Callable[[str], None], cancelled: Event
    ) -> BuiltEngine:
        """Build the engine; see :func:`build_engine_bytes`."""
        try:
            return self._build(timing_cache, on_progress, cancelled)
        except BaseException as error:
            # They hold the builder, and TensorRT for RTX waits for ever to create a second one.
            traceback.clear_frames(error.__traceback__)
            raise

    def _build(
        self, timing_cache: bytes | None, on_progress: Callable[[str], None], cancelled: Event
    ) -> BuiltEngine:
        start = time.perf_counter()
        logger = make_logger(self._library)
        try:
            builder = self._library.Builder(logger)
        except TypeError as error:  # what its bindings raise where there is no GPU
            raise EngineBuildError(
                f"{self._name} cannot start. {_advice(logger.errors or [str(error)])}"
            ) from error
        network = self._parse(builder, logger)
        self._check_network(network)
        config, timing = self._configure(builder, timing_cache)
        monitor = _make_monitor(self._library, on_progress, cancelled)
        config.progress_monitor = monitor
        num_layers = network.num_layers
        data = builder.build_serialized_network(network, config)
        if monitor.failure is not None:
            raise monitor.failure
        if cancelled.is_set():
            raise KeyboardInterrupt
        if data is None:
            raise EngineBuildError(
                f"{self._name} cannot build {self._graph.name}. {_advice(logger.errors)}"
            )
        self._check_engine(data)
        timings = None if timing is None else bytes(timing.serialize())
        return BuiltEngine(data, time.perf_counter() - start, num_layers, timings)

    def _parse(self, builder: Any, logger: Any) -> Any:
        library = self._library
        typed = getattr(library.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        # TensorRT 11 has no flag: all its networks are strongly typed.
        network = builder.create_network(0 if typed is None else 1 << int(typed))
        parser = library.OnnxParser(network, logger)
        if not parser.parse_from_file(str(self._graph)):
            errors = [parser.get_error(i) for i in range(parser.num_errors)]
            reasons = "; ".join(_parser_error(error) for error in errors[:_ERRORS_SHOWN])
            raise EngineBuildError(
                f"{self._name} cannot parse {self._graph.name}: {reasons or 'no reason given'}. "
                "Try a newer release of it, or export for another runtime"
            )
        return network

    def _check_network(self, network: Any) -> None:
        inputs = [network.get_input(i) for i in range(network.num_inputs)]
        outputs = [network.get_output(i) for i in range(network.num_outputs)]
        for kind, tensors, expected in (
            ("inputs", inputs, self._spec.inputs),
            ("outputs", outputs, self._spec.outputs),
        ):
            found = [tensor_spec(t.name, t.dtype, t.shape) for t in tensors]
            if found != [with_wildcards(tensor) for tensor in expected]:
                raise EngineBuildError(
                    f"{self._graph.name} gives a network with the {kind} "
                    f"{'; '.join(map(str, found))}, not {'; '.join(map(str, expected))}: the graph "
                    "does not match its specification; export it again"
                )

    def _check_engine(self, data: Any) -> None:
        description = describe_engine(data)
        if description is None:
            return
        requested = self._settings.compute_capabilities
        problem = signature_mismatch(self._spec, description.tensors)
        if problem is None and requested and description.compute_capabilities != requested:
            problem = (
                f"the engine is for {', '.join(description.compute_capabilities)}, not for the "
                f"requested {', '.join(requested)}"
            )
        if problem is not None:
            raise EngineBuildError(
                f"{self._name} built a wrong engine from {self._graph.name}: {problem}. "
                "Try another release of it"
            )

    def _configure(self, builder: Any, timing_cache: bytes | None) -> tuple[Any, Any]:
        library, settings = self._library, self._settings
        config = builder.create_builder_config()
        # float32 means float32: TF32 rounds every factor of a product to 11 bits.
        config.clear_flag(library.BuilderFlag.TF32)
        config.profiling_verbosity = library.ProfilingVerbosity.DETAILED
        if settings.workspace_bytes is not None:
            config.set_memory_pool_limit(library.MemoryPoolType.WORKSPACE, settings.workspace_bytes)
        if settings.version_compatible:
            config.set_flag(library.BuilderFlag.VERSION_COMPATIBLE)
        if settings.hardware_compatible:
            config.hardware_compatibility_level = library.HardwareCompatibilityLevel.AMPERE_PLUS
        if settings.compute_capabilities:
            config.num_compute_capabilities = len(settings.compute_capabilities)
            for index, name in enumerate(settings.compute_capabilities):
                capability = getattr(library.ComputeCapability, name.replace("sm_", "SM"))
                config.set_compute_capability(capability, index)
        if not self._spec.profile.is_static:
            config.add_optimization_profile(self._profile(builder))
        timing = None
        if settings.variant == TENSORRT.name:
            timing = config.create_timing_cache(timing_cache or b"")
            if not config.set_timing_cache(timing, ignore_mismatch=False):
                timing = config.create_timing_cache(b"")
                config.set_timing_cache(timing, ignore_mismatch=False)
        return config, timing

    def _profile(self, builder: Any) -> Any:
        profile = builder.create_optimization_profile()
        for tensor in self._spec.inputs:
            if any(isinstance(size, str) for size in tensor.shape):
                counts = (self._spec.profile.min, self._spec.profile.opt, self._spec.profile.max)
                profile.set_shape(tensor.name, *map(tensor.shape_for, counts))
        return profile


def _advice(errors: list[str]) -> str:
    """Quote the library's errors, with what to try."""
    reasons = "; ".join(errors[:_ERRORS_SHOWN]) or "no reason given"
    lower = reasons.lower()
    if "memory" in lower or "workspace" in lower:
        advice = "free memory, or reduce --workspace"
    elif "turing" in lower or "sm75" in lower:
        advice = "remove sm_75 from --compute-capabilities"
    elif "cuda" in lower and ("driver" in lower or "device" in lower):
        advice = (
            "check the driver with nvidia-smi, or build for RTX cards without a GPU with "
            "--runtime tensorrt-rtx --compute-capabilities"
        )
    else:
        advice = "try --precision fp32, a newer release of it, or another runtime"
    return f"Its errors: {reasons}. What to try: {advice}"


def _parser_error(error: Any) -> str:
    where = f"node {error.node_name()!r} ({error.node_operator()})" if error.node() >= 0 else "file"
    return f"{where}: {error.desc()}"


def _make_monitor(library: Any, on_progress: Callable[[str], None], cancelled: Event) -> Any:
    """Create a progress monitor that reports each step and stops a cancelled build."""

    class Monitor(library.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            library.IProgressMonitor.__init__(self)
            self._num_steps: dict[str, int] = {}
            self.failure: Exception | None = None

        def phase_start(  # codespell:ignore phase
            self, name: str, parent: str | None, num_steps: int
        ) -> None:
            self._num_steps[name] = num_steps
            self._report(name)

        def step_complete(self, name: str, step: int) -> bool:
            total = self._num_steps.get(name, 0)
            if total > 1:
                self._report(f"{name} {step + 1}/{total}")
            return self.failure is None and not cancelled.is_set()

        def phase_finish(self, name: str) -> None:  # codespell:ignore phase
            self._num_steps.pop(name, None)

        def _report(self, text: str) -> None:
            try:
                on_progress(text)
            except Exception as error:  # it must not unwind through the library's C++ frames
                self.failure = error

    return Monitor()
