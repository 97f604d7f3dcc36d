"""One typed ONNX graph to one engine plan, with either TensorRT.

Networks are strongly typed: the types of the graph are the types of the engine. The build runs in a
thread of its own, so that Ctrl-C reaches the main thread and stops it at its next step.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

from coprs_deploy.engines.trt.checks import read_plan_text
from coprs_deploy.engines.trt.variants import TRT_VARIANTS, TrtVariant, check_capabilities
from coprs_deploy.errors import EngineBuildError
from coprs_deploy.specs import GraphSpec, OptimizationProfile, TensorSpec

BUILDER_REVISION = 1
"""Raised when this module builds another engine from the same graph; older plans are stale."""

_DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT64": "int64"}
_DTYPES |= {"INT32": "int32", "BOOL": "bool"}
_ERRORS_SHOWN = 3


@dataclass(frozen=True)
class BuildSettings:
    """How engines are built.

    Attributes:
        variant: ``tensorrt`` or ``tensorrt-rtx``.
        gpus: compute capabilities to build for without a GPU; empty takes the GPU of this machine.
        workspace_bytes: limit of scratch memory; None leaves it to the library.
        version_compatible: whether later versions shall load the plan, which then carries code.
        hardware_compatible: whether the plan shall run on every GPU from sm_80 on.
    """

    variant: str
    gpus: tuple[str, ...] = ()
    workspace_bytes: int | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False

    def __post_init__(self) -> None:
        if self.variant not in TRT_VARIANTS:
            raise ValueError(f"flavor is {self.variant!r}; accepted: {', '.join(TRT_VARIANTS)}")
        if self.workspace_bytes is not None and self.workspace_bytes < 1 << 20:
            raise ValueError(
                f"workspace is {self.workspace_bytes} bytes; accepted: 1 MiB (0.001 GiB) or more"
            )
        for option in ("version_compatible", "hardware_compatible"):
            if getattr(self, option) and self.variant != "tensorrt":
                raise ValueError(
                    f"--{option.replace('_', '-')} is of TensorRT only; engines of TensorRT for "
                    "RTX run on the GPUs that --gpu lists and on one version: build one a version"
                )


@dataclass(frozen=True)
class BuiltEngine:
    """What a build gave.

    Attributes:
        plan: the plan; a buffer of the library.
        seconds: wall time, parsing included.
        network_layers: layers of the parsed network.
        timing_cache: the timing cache after the build; None where the flavor has none.
    """

    plan: Any
    seconds: float
    network_layers: int
    timing_cache: bytes | None


def build_engine_bytes(
    graph: Path,
    spec: GraphSpec,
    settings: BuildSettings,
    timing_cache: bytes | None = None,
    on_phase: Callable[[str], None] = lambda text: None,
) -> BuiltEngine:
    """Parse a graph, compile it, and give the plan.

    Args:
        graph: an ONNX file; its external weights stand beside it.
        spec: the inputs and outputs that the network must have.
        settings: how to build.
        timing_cache: measurements of an earlier build; one that does not fit is not used.
        on_phase: called, from another thread, with what the library does.

    Raises:
        MissingDependencyError: the library is not installed.
        ValueError: ``settings`` asks for GPUs that the library does not build for.
        EngineBuildError: the graph cannot be parsed or compiled.
        KeyboardInterrupt: Ctrl-C; the build has ended.
    """
    variant = TRT_VARIANTS[settings.variant]
    library = variant.load()
    check_capabilities(library, variant, settings.gpus)
    cancelled = Event()
    with ThreadPoolExecutor(1, thread_name_prefix="engine-build") as pool:
        build = _Build(library, variant, graph, spec, settings)
        future = pool.submit(build.run, timing_cache, on_phase, cancelled)
        try:
            return _wait(future)
        except BaseException:
            cancelled.set()
            raise


def _wait(future: Future[BuiltEngine]) -> BuiltEngine:
    while True:  # a wait without a limit would not be left by a signal on every platform
        try:
            return future.result(timeout=0.5)
        except TimeoutError:
            if future.done():
                raise


class _Build:
    """One build; everything that the library made is let go of when it ends."""

    def __init__(
        self,
        library: Any,
        variant: TrtVariant,
        graph: Path,
        spec: GraphSpec,
        settings: BuildSettings,
    ) -> None:
        self._library = library
        self._flavor = variant
        self._graph = graph
        self._spec = spec
        self._settings = settings
        self._name = f"{variant.title} {library.__version__}"

    def run(
        self, timing_cache: bytes | None, on_phase: Callable[[str], None], cancelled: Event
    ) -> BuiltEngine:
        start = time.perf_counter()
        logger = make_logger(self._library)
        try:
            builder = self._library.Builder(logger)
        except TypeError as error:  # what its bindings raise where there is no GPU
            raise EngineBuildError(
                f"{self._name} cannot start. {self._hint(logger.errors or [str(error)])}"
            ) from error
        network = self._parse(builder, logger)
        self._check_signature(network)
        config, timing = self._configure(builder, timing_cache)
        monitor = make_monitor(self._library, on_phase, cancelled)
        config.progress_monitor = monitor
        num_layers = network.num_layers
        plan = builder.build_serialized_network(network, config)
        if monitor.failure is not None:
            raise monitor.failure
        if cancelled.is_set():
            raise KeyboardInterrupt
        if plan is None:
            raise EngineBuildError(
                f"{self._name} cannot build {self._graph.name}. {self._hint(logger.errors)}"
            )
        self._check_text(plan)
        kept = None if timing is None else bytes(timing.serialize())
        return BuiltEngine(plan, time.perf_counter() - start, num_layers, kept)

    def _parse(self, builder: Any, logger: Any) -> Any:
        library = self._library
        flags = 0
        typed = getattr(library.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        if typed is not None:  # TensorRT 11 knows no other networks
            flags = 1 << int(typed)
        network = builder.create_network(flags)
        parser = library.OnnxParser(network, logger)
        if not parser.parse_from_file(str(self._graph)):
            errors = [parser.get_error(i) for i in range(parser.num_errors)]
            said = "; ".join(_parser_error(error) for error in errors[:_ERRORS_SHOWN])
            raise EngineBuildError(
                f"{self._name} cannot parse {self._graph.name}: {said or 'no reason given'}. "
                "Try a newer release of it, or export for another runtime"
            )
        return network

    def _check_signature(self, network: Any) -> None:
        inputs = [network.get_input(i) for i in range(network.num_inputs)]
        outputs = [network.get_output(i) for i in range(network.num_outputs)]
        for kind, tensors, wanted in (
            ("inputs", inputs, self._spec.inputs),
            ("outputs", outputs, self._spec.outputs),
        ):
            found = [tensor_spec(t.name, t.dtype, tuple(t.shape)) for t in tensors]
            if found != [_with_wildcards(tensor) for tensor in wanted]:
                raise EngineBuildError(
                    f"{self._graph.name} gives a network with the {kind} "
                    f"{'; '.join(map(str, found))}, not {'; '.join(map(str, wanted))}: the graph "
                    "is not the one that its specification describes; export it again"
                )

    def _check_text(self, plan: Any) -> None:
        text = read_plan_text(plan)
        if text is None:
            return
        problem = check_signature(self._spec, list(text.tensors))
        if problem is None and self._settings.gpus and text.capabilities != self._settings.gpus:
            problem = (
                f"the engine is for {', '.join(text.capabilities)}, and "
                f"{', '.join(self._settings.gpus)} was asked for"
            )
        if problem is not None:
            raise EngineBuildError(
                f"{self._name} built {self._graph.name} into something else: {problem}. "
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
        if settings.gpus:
            config.num_compute_capabilities = len(settings.gpus)
            for index, gpu in enumerate(settings.gpus):
                capability = getattr(library.ComputeCapability, gpu.replace("sm_", "SM"))
                config.set_compute_capability(capability, index)
        if not self._spec.profile.is_static:
            config.add_optimization_profile(self._profile(builder))
        timing = None
        if self._flavor.name == "tensorrt":
            timing = config.create_timing_cache(timing_cache or b"")
            if not config.set_timing_cache(timing, ignore_mismatch=False):
                timing = config.create_timing_cache(b"")
                config.set_timing_cache(timing, ignore_mismatch=False)
        return config, timing

    def _profile(self, builder: Any) -> Any:
        profile = builder.create_optimization_profile()
        for tensor in self._spec.inputs:
            if any(isinstance(size, str) for size in tensor.shape):
                profile.set_shape(tensor.name, *profile_shapes(tensor, self._spec.profile))
        return profile

    def _hint(self, errors: list[str]) -> str:
        said = "; ".join(errors[:_ERRORS_SHOWN]) or "it gave no reason"
        lower = said.lower()
        if "memory" in lower or "workspace" in lower:
            advice = "free memory, or give less to --workspace"
        elif "turing" in lower or "sm75" in lower:
            advice = "leave sm_75 out of --gpu"
        elif "cuda" in lower and ("driver" in lower or "device" in lower):
            advice = "check the driver with nvidia-smi, or build for RTX without a GPU with --gpu"
        else:
            advice = "try --precision fp32, a newer release of it, or another runtime"
        return f"It said: {said}. What to try: {advice}"


def profile_shapes(tensor: TensorSpec, counts: OptimizationProfile) -> tuple[tuple[int, ...], ...]:
    """Give the smallest, the preferred and the largest shape of an input."""
    return tuple(tensor.shape_for(count) for count in (counts.min, counts.opt, counts.max))


def tensor_spec(name: str, dtype: Any, shape: tuple[int, ...]) -> TensorSpec:
    """Describe a tensor of the library; an unknown size is -1."""
    kind = _DTYPES.get(dtype.name, dtype.name.lower())
    return TensorSpec(name, kind, shape)


def _with_wildcards(tensor: TensorSpec) -> TensorSpec:
    shape = tuple(-1 if isinstance(size, str) else size for size in tensor.shape)
    return TensorSpec(tensor.name, tensor.dtype, shape)


def check_signature(spec: GraphSpec, found: list[TensorSpec]) -> str | None:
    """Say how the tensors of an engine differ from a specification; None when they do not."""
    wanted = [_with_wildcards(tensor) for tensor in (*spec.inputs, *spec.outputs)]
    if sorted(found, key=str) == sorted(wanted, key=str):
        return None
    return (
        f"the engine has {'; '.join(map(str, found))}, "
        f"the manifest says {'; '.join(map(str, (*spec.inputs, *spec.outputs)))}"
    )


def _parser_error(error: Any) -> str:
    where = f"node {error.node_name()!r} ({error.node_operator()})" if error.node() >= 0 else "file"
    return f"{where}: {error.desc()}"


def make_logger(library: Any) -> Any:
    """Make a logger that keeps errors in ``errors`` and says nothing."""

    class Logger(library.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            library.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (library.ILogger.ERROR, library.ILogger.INTERNAL_ERROR):
                self.errors.append(" ".join(message.split()))

    return Logger()


def make_monitor(library: Any, on_phase: Callable[[str], None], cancelled: Event) -> Any:
    """Make a progress monitor that reports the top phases and stops the build when asked to."""

    class Monitor(library.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            library.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}
            self.failure: Exception | None = None

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._steps[phase_name] = num_steps
            self._say(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            total = self._steps.get(phase_name, 0)
            if total > 1:
                self._say(f"{phase_name} {step + 1}/{total}")
            return self.failure is None and not cancelled.is_set()

        def phase_finish(self, phase_name: str) -> None:
            self._steps.pop(phase_name, None)

        def _say(self, text: str) -> None:
            try:
                on_phase(text)
            except Exception as error:  # it must not cross the library's own code
                self.failure = error

    return Monitor()
