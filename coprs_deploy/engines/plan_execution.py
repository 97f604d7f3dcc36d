"""Engine plans behind the common call signature, for both flavors of TensorRT.

Before a plan is deserialized, its flavor, version, GPU and hash are checked against what is known
about it; an engine that does not fit here is refused with the command that mends it, and nothing
else runs in its place. Each runner has a stream of its own, and what it returns stays on the GPU.
"""

from __future__ import annotations

import hashlib
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coprs_deploy.bundle import EngineRecord
from coprs_deploy.engines.build_cache import BuildCache
from coprs_deploy.engines.cuda_device import CudaDevice
from coprs_deploy.engines.flavors import FLAVORS, Flavor, known_capabilities
from coprs_deploy.engines.plan_builder import check_signature, make_logger, tensor_spec
from coprs_deploy.engines.runner import Array, Availability, DeviceTensor, Runner, RunnerOptions
from coprs_deploy.errors import (
    BundleError,
    BundleIntegrityError,
    EngineMismatchError,
    MissingDependencyError,
    RuntimeUnavailableError,
)
from coprs_deploy.specs import IMAGE_ENCODER, GraphSpec

RUNTIME_CACHE_FOLDER = "runtime"


class UnverifiedEngineWarning(UserWarning):
    """An engine is loaded that was never compared with PyTorch on this kind of GPU."""


@dataclass
class _Shape:
    """The context and the buffers of one number of targets."""

    context: Any
    buffers: dict[str, Any]
    replay: Callable[[], None] | None = None
    is_warm: bool = False


class PlanRunner(Runner):
    """One engine plan on one GPU.

    Attributes:
        gpu_name: the GPU.
        layers: what the engine runs, one line a layer.
        device_memory_bytes: scratch memory of one context.

    Calls from several threads wait for each other: a context runs one call at a time.
    """

    def __init__(
        self,
        path: Path,
        spec: GraphSpec,
        options: RunnerOptions,
        *,
        engine: EngineRecord,
        device: CudaDevice,
        cache: BuildCache | None = None,
    ) -> None:
        flavor = FLAVORS[engine.flavor]
        library = flavor.load()
        check_loadable(path.name, engine, library.__version__, device.gpu, options)
        plan = read_plan(path, engine)
        logger = make_logger(library)
        with device.current():
            runtime = library.Runtime(logger)
            if engine.version_compatible:
                runtime.engine_host_code_allowed = True
            loaded = runtime.deserialize_cuda_engine(plan)
        del plan
        if loaded is None:
            raise BundleError(
                f"{flavor.title} {library.__version__} refuses {path}: "
                f"{'; '.join(logger.errors) or 'no reason given'}. {_remedy(engine)}"
            )
        problem = check_signature(spec, engine_tensors(loaded))
        if problem is not None:
            raise BundleIntegrityError(f"{path}: {problem}. {_remedy(engine)}")
        verified = f"verified on {engine.verified_on}" if engine.verified_on else "never verified"
        super().__init__(
            spec, f"{engine.flavor} {library.__version__} on {device.gpu.name}, {verified}"
        )
        self._library, self._runtime, self._logger = library, runtime, logger
        self._engine: Any = loaded
        self._device = device
        self.gpu_name: str = device.gpu.name
        self._captures = options.cuda_graphs
        self._lock = threading.Lock()
        self._shapes: dict[int, _Shape] = {}
        self._cache = cache or BuildCache()
        self._cache_name = f"{engine.sha256}-{device.gpu.compute_capability}"
        self._config, self._compiled = self._runtime_cache(flavor)
        self.layers = engine_layers(library, loaded)
        self.device_memory_bytes: int = getattr(
            loaded, "device_memory_size_v2", getattr(loaded, "device_memory_size", 0)
        )

    def _runtime_cache(self, flavor: Flavor) -> tuple[Any, Any]:
        """Give TensorRT for RTX the kernels that it compiled on this GPU before."""
        if flavor.name != "tensorrt-rtx":
            return None, None
        config = self._engine.create_runtime_config()
        compiled = config.create_runtime_cache()
        known = self._cache.load_blob(RUNTIME_CACHE_FOLDER, self._cache_name)
        if known is not None and not compiled.deserialize(known):
            warnings.warn(
                f"{self.description}: its kernel cache cannot be read and is made anew",
                stacklevel=4,
            )
        config.set_runtime_cache(compiled)
        return config, compiled

    def _run(self, inputs: Mapping[str, Array | DeviceTensor]) -> dict[str, DeviceTensor]:
        assert self._engine is not None, "the runner was closed"
        with self._lock, self._device.current():
            shape = self._shape(inputs)
            for tensor in self.spec.inputs:
                self._device.fill(tensor.name, shape.buffers[tensor.name], inputs[tensor.name])
            if shape.replay is not None:
                shape.replay()
            else:
                self._execute(shape)
                if self._captures and not shape.is_warm:
                    # The first run compiles and sets up; only what follows can be captured.
                    shape.replay = self._device.capture(lambda: self._execute(shape))
                shape.is_warm = True
            return {t.name: self._device.copy_out(shape.buffers[t.name]) for t in self.spec.outputs}

    def _shape(self, inputs: Mapping[str, Array | DeviceTensor]) -> _Shape:
        """Give the context of this number of targets; captured work must keep its context."""
        count: int | None = None  # a static graph has one shape
        for tensor in self.spec.inputs:
            for size, found in zip(tensor.shape, inputs[tensor.name].shape, strict=True):
                if isinstance(size, str):
                    count = found
        profile = self.spec.targets
        if count is not None and not profile.minimum <= count <= profile.maximum:
            raise ValueError(
                f"{self.spec.name} was given {count} targets; its engine was built for "
                f"{profile.minimum} to {profile.maximum}: ask in parts, or export with --targets"
            )
        count = count or profile.preferred
        if count not in self._shapes:
            self._shapes[count] = self._make_shape(count)
        return self._shapes[count]

    def _make_shape(self, count: int) -> _Shape:
        config = self._config
        context = (
            self._engine.create_execution_context()
            if config is None
            else self._engine.create_execution_context(config)
        )
        if context is None:
            raise RuntimeUnavailableError(
                f"{self.description} has no room for {self.spec.name}: "
                f"{'; '.join(self._logger.errors) or 'no reason given'}; free GPU memory"
            )
        buffers: dict[str, Any] = {}
        for tensor in (*self.spec.inputs, *self.spec.outputs):
            shape = tuple(count if isinstance(size, str) else size for size in tensor.shape)
            buffers[tensor.name] = self._device.empty(shape, tensor.dtype)
            is_input = tensor in self.spec.inputs
            if is_input and not context.set_input_shape(tensor.name, shape):
                raise BundleError(f"the engine refuses {tensor.name} of shape {shape}")
            if not context.set_tensor_address(tensor.name, buffers[tensor.name].data_ptr()):
                raise BundleError(f"the engine knows no tensor {tensor.name}")
        return _Shape(context, buffers)

    def _execute(self, shape: _Shape) -> None:
        if not shape.context.execute_async_v3(self._device.stream_handle):
            raise RuntimeUnavailableError(
                f"{self.description} could not run {self.spec.name}: "
                f"{'; '.join(self._logger.errors[-3:]) or 'no reason given'}"
            )

    @property
    def stream(self) -> Any:
        """The CUDA stream on which the engine runs, as PyTorch's object."""
        return self._device.stream

    def close(self) -> None:
        """Wait for the GPU, keep what was compiled, and free the engine."""
        with self._lock, self._device.current():
            if self._engine is None:
                return
            self._device.synchronize()
            self._shapes.clear()
            compiled = None if self._compiled is None else bytes(self._compiled.serialize())
            self._config = self._compiled = None
            self._engine = self._runtime = None
        if compiled is None:
            return
        try:
            self._cache.keep_blob(RUNTIME_CACHE_FOLDER, self._cache_name, compiled)
        except OSError as error:
            warnings.warn(
                f"the kernels that {self.spec.name} compiled on this GPU could not be kept, and "
                f"will be compiled again: {error}; name a folder with COPRS_DEPLOY_CACHE",
                stacklevel=2,
            )


def check_loadable(
    name: str, engine: EngineRecord, version: str, gpu: Any, options: RunnerOptions
) -> None:
    """Refuse an engine that was not built for this library and this GPU.

    Raises:
        EngineMismatchError: says what was found, what is needed and what mends it.
    """
    title = FLAVORS[engine.flavor].title
    if engine.version_compatible and not options.allow_plan_code:
        raise EngineMismatchError(
            f"{name} is a version-compatible plan, which carries code that would run here; if you "
            "trust where the bundle comes from, allow it with --allow-plan-code (in Python: "
            "RuntimeOptions(allow_plan_code=True))"
        )
    if not _fits_version(engine, version):
        raise EngineMismatchError(
            f"{name} was built by {title} {engine.version}, and {version} is installed. Install "
            f"that version, or build again: {_command(engine)}"
        )
    here = gpu.compute_capability
    reaches = engine.hardware_compatible and int(here[3:]) >= 80
    if here not in engine.compute_capabilities and not reaches:
        raise EngineMismatchError(
            f"{name} was built for {', '.join(engine.compute_capabilities)}, and this GPU "
            f"({gpu.name}) is {here}. Build it for this GPU: {_command(engine, here)}"
        )


def _fits_version(engine: EngineRecord, version: str) -> bool:
    if version == engine.version:
        return True
    built, here = (_numbers(text) for text in (engine.version, version))
    return engine.version_compatible and built[:1] == here[:1] and here >= built


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def _command(engine: EngineRecord, gpu: str | None = None) -> str:
    """Name the command that builds an engine again, for another GPU too if one is given.

    A plan does not know its precision and its range of targets; the manifest does.
    """
    flavor, runtime = FLAVORS[engine.flavor], engine.flavor
    words = []
    if flavor.builds_without_gpu:
        if gpu is not None and gpu not in known_capabilities(flavor.load()):
            runtime = "tensorrt"  # the other flavor, on the GPU itself
        else:
            gpus = [*engine.compute_capabilities, *([gpu] if gpu else [])]
            words.append(f"--gpu {','.join(gpus)}")
    if engine.workspace_bytes is not None:
        words.append(f"--workspace {engine.workspace_bytes / 2**30:g}")
    if engine.version_compatible:
        words.append("--version-compatible")
    if engine.hardware_compatible:
        words.append("--hardware-compatible")
    named = " ".join([f"--runtime {runtime}", "--precision PRECISION", *words, "--overwrite"])
    return (
        f"`coprs-deploy export CHECKPOINT --out BUNDLE {named}`, with the precision and --targets "
        "that `coprs-deploy inspect BUNDLE` shows"
    )


def _remedy(engine: EngineRecord) -> str:
    return f"Build it again: {_command(engine)}"


def read_plan(path: Path, engine: EngineRecord) -> bytes:
    """Read a plan and check the bytes that will be deserialized against the hash.

    Raises:
        BundleIntegrityError: they are not those that were built.
    """
    try:
        plan = path.read_bytes()
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error}. {_remedy(engine)}") from error
    if len(plan) != engine.size_bytes:
        raise BundleIntegrityError(
            f"{path} has {len(plan)} bytes, not {engine.size_bytes}: it was cut short or changed. "
            f"{_remedy(engine)}"
        )
    if hashlib.sha256(plan).hexdigest() != engine.sha256:
        raise BundleIntegrityError(f"{path} was changed (SHA-256 differs). {_remedy(engine)}")
    return plan


def engine_tensors(engine: Any) -> list[Any]:
    """Describe the inputs and outputs of a deserialized engine."""
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    return [
        tensor_spec(n, engine.get_tensor_dtype(n), tuple(engine.get_tensor_shape(n))) for n in names
    ]


def engine_layers(library: Any, engine: Any) -> tuple[str, ...]:
    """List what an engine runs, one line a layer."""
    inspector = engine.create_engine_inspector()
    form = library.LayerInformationFormat.ONELINE
    return tuple(inspector.get_layer_information(i, form).strip() for i in range(engine.num_layers))


def open_plan(
    flavor: Flavor,
    path: Path,
    spec: GraphSpec,
    options: RunnerOptions,
    engine: EngineRecord | None,
) -> PlanRunner:
    """Open a plan of a flavor.

    Raises:
        MissingDependencyError: the library is not installed.
        RuntimeUnavailableError: there is no such GPU.
        EngineMismatchError: the engine is for another flavor, version or GPU.
        BundleError: nothing is known about the plan, or it is not the one that was built.
    """
    if engine is None:
        raise BundleError(
            f"nothing is known about the plan {path}: a plan is loaded only with its record in a "
            f"manifest; `coprs-deploy export CHECKPOINT --out BUNDLE --runtime {flavor.name}`"
        )
    if engine.flavor != flavor.name:
        raise EngineMismatchError(
            f"{path.name} was built by {FLAVORS[engine.flavor].title}, and {flavor.title} cannot "
            f"load it. Run it with --runtime {engine.flavor}, or build it with {flavor.title}: "
            f"`coprs-deploy export CHECKPOINT --out BUNDLE --runtime {flavor.name} --overwrite`"
        )
    if options.device_type != "cuda":
        raise RuntimeUnavailableError(
            f"{flavor.title} runs on CUDA, and the device is {options.device!r}: pass "
            "--device cuda, or export for onnxruntime"
        )
    flavor.load()
    device = CudaDevice(options.device_index, high_priority=spec.name != IMAGE_ENCODER)
    runner = PlanRunner(path, spec, options, engine=engine, device=device)
    if engine.verified_on != device.gpu.name:
        seen = "on a GPU"
        if engine.verified_on is not None:
            seen = f"on this {device.gpu.name}, only on {engine.verified_on}"
        warnings.warn(
            f"the engine {path.name} was never compared with PyTorch {seen}: run "
            "`coprs-deploy verify BUNDLE --against CHECKPOINT --device cuda` once",
            UnverifiedEngineWarning,
            stacklevel=2,
        )
    return runner


def plan_availability(flavor: Flavor) -> list[Availability]:
    """Say whether a flavor is installed, and whether a GPU can run its engines."""
    from coprs_deploy.engines.cuda_device import current_gpu

    try:
        library = flavor.load()
    except MissingDependencyError:
        return [Availability(flavor.name, False, "not installed", flavor.install)]
    gpu = current_gpu()
    if gpu is None:
        detail = f"{library.__version__}, no GPU here to run engines"
        if flavor.builds_without_gpu:
            detail += f"; builds them for {', '.join(known_capabilities(library))}"
        return [Availability(flavor.name, False, detail, "run the engines on a machine with one")]
    known = known_capabilities(library)
    if flavor.builds_without_gpu and gpu.compute_capability not in known:
        detail = f"{library.__version__} is not for {gpu.name} ({gpu.compute_capability})"
        return [Availability(flavor.name, False, detail, "export with --runtime tensorrt")]
    return [Availability(flavor.name, True, f"{library.__version__} on {gpu.name}")]
