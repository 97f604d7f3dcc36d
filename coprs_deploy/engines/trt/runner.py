"""TensorRT engines behind the common call signature, for both variants.

Variant, version, GPU and hash are checked against the engine's record before it is deserialized; a
mismatch is an error with the export command that fixes it, never a fallback. Each runner has its
own CUDA stream, and its outputs stay on the GPU. Prior and mask decoder can be fused: one stream,
one CUDA graph.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from coprs_deploy.bundle import EngineRecord
from coprs_deploy.engines.cuda import CudaDevice, current_gpu
from coprs_deploy.engines.runner import Array, Availability, DeviceTensor, Runner, RunnerOptions
from coprs_deploy.engines.trt.engine import TrtEngine
from coprs_deploy.engines.trt.variants import TRT_VARIANTS, TrtVariant, supported_capabilities
from coprs_deploy.errors import (
    BundleError,
    CoPRSError,
    EngineMismatchError,
    MissingDependencyError,
    RuntimeUnavailableError,
    install_hint,
)
from coprs_deploy.specs import IMAGE_ENCODER, GraphSpec


class UnverifiedEngineWarning(UserWarning):
    """An engine that was never compared with PyTorch on this kind of GPU is loaded."""


@dataclass
class _Binding:
    """Contexts, buffers and CUDA graph for one number of targets or images."""

    contexts: list[Any]
    buffers: dict[str, Any]
    replay: Callable[[], None] | None = None
    is_warm: bool = False


class FusedRunner(Runner):
    """Engines that run in order on one stream as one call, without copies in between.

    Tensors of the same name share a buffer: an output of one engine that a later one takes is read
    in place, and is an output of the runner too. Calls from several threads are serialized, because
    a context runs one call at a time. Close the runner before those that own the engines.
    """

    def __init__(self, engines: Sequence[TrtEngine], device: CudaDevice, cuda_graphs: bool) -> None:
        outputs = tuple(tensor for engine in engines for tensor in engine.spec.outputs)
        computed = {tensor.name for tensor in outputs}
        inputs = {t.name: t for e in engines for t in e.spec.inputs if t.name not in computed}
        spec = msgspec.structs.replace(
            engines[0].spec,
            name=" and ".join(engine.spec.name for engine in engines),
            inputs=tuple(inputs.values()),
            outputs=outputs,
        )
        super().__init__(spec, engines[0].description)
        self._engines = engines
        self._device = device
        self._cuda_graphs = cuda_graphs
        self._bindings: dict[int, _Binding] = {}
        self._is_closed = False
        self._lock = threading.Lock()

    def _run(self, inputs: Mapping[str, Array | DeviceTensor]) -> dict[str, DeviceTensor]:
        with self._lock, self._device.current():
            if self._is_closed:
                raise CoPRSError(f"{self.spec.name} was called after it was closed")
            binding = self._binding_for(inputs)
            for tensor in self.spec.inputs:
                self._device.fill(tensor.name, binding.buffers[tensor.name], inputs[tensor.name])
            if binding.replay is not None:
                binding.replay()
            else:
                self._execute(binding)
                if self._cuda_graphs and not binding.is_warm:
                    # The first run compiles and allocates; only later runs can be captured.
                    binding.replay = self._device.capture(lambda: self._execute(binding))
                binding.is_warm = True
            return {
                t.name: self._device.copy_out(binding.buffers[t.name]) for t in self.spec.outputs
            }

    def _binding_for(self, inputs: Mapping[str, Array | DeviceTensor]) -> _Binding:
        """Return the binding for the number of targets or images in the inputs."""
        count = self.spec.count_of({name: value.shape for name, value in inputs.items()})
        profile = self.spec.profile
        if count is not None and not profile.min <= count <= profile.max:
            what = "targets" if self.spec.images.is_static else "images"
            raise ValueError(
                f"{self.spec.name} was given {count} {what}; its engine was built for "
                f"{profile.min} to {profile.max}: split the call, or export with --{what}"
            )
        count = count or profile.opt
        if count not in self._bindings:
            self._bindings[count] = self._make_binding(count)
        return self._bindings[count]

    def _make_binding(self, count: int) -> _Binding:
        tensors = {t.name: t for e in self._engines for t in (*e.spec.inputs, *e.spec.outputs)}
        buffers = {
            name: self._device.empty(tensor.shape_for(count), tensor.dtype)
            for name, tensor in tensors.items()
        }
        contexts = [engine.make_context(buffers, count) for engine in self._engines]
        return _Binding(contexts, buffers)

    def _execute(self, binding: _Binding) -> None:
        for engine, context in zip(self._engines, binding.contexts, strict=True):
            engine.execute(context, self._device.stream_handle)

    def close(self) -> None:
        """Wait for the GPU and drop the contexts."""
        with self._lock, self._device.current():
            self._is_closed = True
            self._device.synchronize()
            self._bindings.clear()


class TrtRunner(FusedRunner):
    """One engine on one GPU; ``layers`` and ``device_memory_bytes`` are those of the engine."""

    def __init__(self, engine: TrtEngine, device: CudaDevice, cuda_graphs: bool) -> None:
        super().__init__([engine], device, cuda_graphs)
        self._engine = engine
        self.gpu_name: str = device.gpu.name
        self.layers = engine.layers
        self.device_memory_bytes = engine.device_memory_bytes

    def fused_with(self, following: Runner) -> Runner | None:
        """See :meth:`Runner.fused_with`; engines on one GPU can be fused."""
        if not isinstance(following, TrtRunner) or following._device.index != self._device.index:
            return None
        # A stream of its own: other threads may call the two runners at the same time.
        device = self._device.sibling()
        return FusedRunner([self._engine, following._engine], device, self._cuda_graphs)

    @property
    def stream(self) -> Any:
        """The CUDA stream of the engine, as PyTorch's object."""
        return self._device.stream

    def close(self) -> None:
        """Wait for the GPU, save compiled kernels, and free the engine."""
        super().close()
        with self._lock, self._device.current():
            self._engine.close()


def open_engine(
    variant: TrtVariant,
    path: Path,
    spec: GraphSpec,
    options: RunnerOptions,
    engine: EngineRecord | None = None,
) -> TrtRunner:
    """Open an engine file; see :func:`coprs_deploy.engines.open_graph`."""
    if engine is None:
        raise BundleError(
            f"the engine {path} has no record: engines are loaded only with their record in a "
            f"manifest; `coprs-deploy export CHECKPOINT --out BUNDLE --runtime {variant.name}`"
        )
    if engine.variant != variant.name:
        raise EngineMismatchError(
            f"{path.name} was built by {TRT_VARIANTS[engine.variant].title}, and {variant.title} "
            f"cannot load it. Run it with --runtime {engine.variant}, or rebuild it: "
            f"`coprs-deploy export CHECKPOINT --out BUNDLE --runtime {variant.name} --overwrite`"
        )
    if options.device_type != "cuda":
        raise RuntimeUnavailableError(
            f"device is {options.device!r}, and {variant.title} runs on CUDA: pass --device cuda, "
            "or export for onnxruntime"
        )
    variant.load()
    device = CudaDevice(options.device_index, high_priority=spec.name != IMAGE_ENCODER)
    opened = TrtEngine(path, spec, options, engine, device)
    runner = TrtRunner(opened, device, options.cuda_graphs)
    if engine.verified_on != device.gpu.name:
        where = "on a GPU"
        if engine.verified_on is not None:
            where = f"on this {device.gpu.name}, only on {engine.verified_on}"
        warnings.warn(
            f"the engine {path.name} was never compared with PyTorch {where}: run "
            "`coprs-deploy verify BUNDLE --against CHECKPOINT --device cuda` once",
            UnverifiedEngineWarning,
            stacklevel=2,
        )
    return runner


def trt_availability(variant: TrtVariant) -> list[Availability]:
    """Report whether a variant is installed and a GPU can run its engines."""
    try:
        library = variant.load()
    except MissingDependencyError:
        return [Availability(variant.name, False, "not installed", install_hint(variant.name))]
    detail, remedy = library.__version__, ""
    supported = supported_capabilities(library)
    gpu = current_gpu()
    if gpu is None:
        remedy = "run the engines on a machine with one"
        detail += ", no GPU to run engines"
        if variant.builds_without_gpu:
            detail += f"; builds for {', '.join(supported)}"
    elif variant.builds_without_gpu and gpu.compute_capability not in supported:
        remedy = "export with --runtime tensorrt"
        detail += f" does not support {gpu.name} ({gpu.compute_capability})"
    else:
        detail += f" on {gpu.name}"
    return [Availability(variant.name, not remedy, detail, remedy)]
