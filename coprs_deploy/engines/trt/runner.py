"""Engine plans behind the common call signature, for both flavors of TensorRT.

Before a plan is deserialized, its flavor, version, GPU and hash are checked against what is known
about it; an engine that does not fit here is refused with the command that mends it, and nothing
else runs in its place. Each runner has a stream of its own, and what it returns stays on the GPU.
Prior and mask decoder can be joined: one piece of work on one stream, captured whole.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coprs_deploy.bundle import EngineRecord
from coprs_deploy.engines.cache import BuildCache
from coprs_deploy.engines.cuda import CudaDevice
from coprs_deploy.engines.runner import Array, Availability, DeviceTensor, Runner, RunnerOptions
from coprs_deploy.engines.trt.engine import TrtEngine
from coprs_deploy.engines.trt.variants import TRT_VARIANTS, TrtVariant, known_capabilities
from coprs_deploy.errors import (
    BundleError,
    CoPRSError,
    EngineMismatchError,
    MissingDependencyError,
    RuntimeUnavailableError,
)
from coprs_deploy.specs import IMAGE_ENCODER, GraphSpec


class UnverifiedEngineWarning(UserWarning):
    """An engine is loaded that was never compared with PyTorch on this kind of GPU."""


@dataclass
class _Shape:
    """The contexts and the buffers of one number of targets, or of images."""

    contexts: list[Any]
    buffers: dict[str, Any]
    replay: Callable[[], None] | None = None
    is_warm: bool = False


class _Work:
    """Plans that run one after the other on one stream; tensors of one name are one buffer.

    Args:
        plans: in the order in which they run.
        spec: what goes in and what comes out of all of them together.
        device: where they run.
        captures: whether the work is captured once and launched whole.

    Calls from several threads wait for each other: a context runs one call at a time.
    """

    def __init__(
        self, plans: Sequence[TrtEngine], spec: GraphSpec, device: CudaDevice, captures: bool
    ) -> None:
        self._plans = plans
        self._spec = spec
        self._device = device
        self._captures = captures
        self._shapes: dict[int, _Shape] = {}
        self._is_closed = False
        self.lock = threading.Lock()

    def run(self, inputs: Mapping[str, Array | DeviceTensor]) -> dict[str, DeviceTensor]:
        """Run all plans on inputs that have been checked.

        Raises:
            CoPRSError: they were closed.
        """
        with self.lock, self._device.current():
            if self._is_closed:
                raise CoPRSError(f"{self._spec.name} was closed while it was asked")
            shape = self._shape(inputs)
            for tensor in self._spec.inputs:
                self._device.fill(tensor.name, shape.buffers[tensor.name], inputs[tensor.name])
            if shape.replay is not None:
                shape.replay()
            else:
                self._execute(shape)
                if self._captures and not shape.is_warm:
                    # The first run compiles and sets up; only what follows can be captured.
                    shape.replay = self._device.capture(lambda: self._execute(shape))
                shape.is_warm = True
            return {
                t.name: self._device.copy_out(shape.buffers[t.name]) for t in self._spec.outputs
            }

    def _shape(self, inputs: Mapping[str, Array | DeviceTensor]) -> _Shape:
        """Give the contexts of these inputs' number; captured work must keep its contexts."""
        count = self._spec.count_of({name: value.shape for name, value in inputs.items()})
        profile = self._spec.profile
        if count is not None and not profile.min <= count <= profile.max:
            what = "targets" if self._spec.images.is_static else "images"
            raise ValueError(
                f"{self._spec.name} was given {count} {what}; its engine was built for "
                f"{profile.min} to {profile.max}: ask in parts, or export with --{what}"
            )
        count = count or profile.opt
        if count not in self._shapes:
            self._shapes[count] = self._make_shape(count)
        return self._shapes[count]

    def _make_shape(self, count: int) -> _Shape:
        tensors = {t.name: t for p in self._plans for t in (*p.spec.inputs, *p.spec.outputs)}
        buffers = {
            name: self._device.empty(tensor.shape_for(count), tensor.dtype)
            for name, tensor in tensors.items()
        }
        return _Shape([plan.make_context(buffers, count) for plan in self._plans], buffers)

    def _execute(self, shape: _Shape) -> None:
        for plan, context in zip(self._plans, shape.contexts, strict=True):
            plan.execute(context, self._device.stream_handle)

    def free(self) -> None:
        """Wait for the GPU and drop the contexts; the lock is held, the device is current."""
        self._is_closed = True
        self._device.synchronize()
        self._shapes.clear()


class TrtRunner(Runner):
    """One engine plan on one GPU.

    Attributes:
        gpu_name: the GPU.
        layers: what the engine runs, one line a layer.
        device_memory_bytes: scratch memory of one context.
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
        self._plan = TrtEngine(
            path, spec, options, engine=engine, device=device, cache=cache or BuildCache()
        )
        super().__init__(spec, self._plan.description)
        self._device = device
        self._captures = options.cuda_graphs
        self._work = _Work([self._plan], spec, device, options.cuda_graphs)
        self.gpu_name: str = device.gpu.name
        self.layers = self._plan.layers
        self.device_memory_bytes = self._plan.device_memory_bytes

    def _run(self, inputs: Mapping[str, Array | DeviceTensor]) -> dict[str, DeviceTensor]:
        return self._work.run(inputs)

    def fused_with(self, following: Runner) -> Runner | None:
        """See :meth:`Runner.fused_with`; plans on one GPU can be joined."""
        if not isinstance(following, TrtRunner) or following._device.index != self._device.index:
            return None
        # A stream of its own: the runners go on being called apart, by other threads too.
        device = self._device.sibling()
        return FusedRunner([self._plan, following._plan], device, self._captures)

    @property
    def stream(self) -> Any:
        """The CUDA stream on which the engine runs, as PyTorch's object."""
        return self._device.stream

    def close(self) -> None:
        """Wait for the GPU, keep what was compiled, and free the engine."""
        with self._work.lock, self._device.current():
            if not self._plan.is_open:
                return
            self._work.free()
            self._plan.close()


class FusedRunner(Runner):
    """Plans of other runners as one call; between them nothing is copied.

    Each tensor of one plan that an earlier one gives is read where it lies. What an earlier plan
    gives is given out too. It must be closed before the runners that the plans belong to.
    """

    def __init__(self, plans: Sequence[TrtEngine], device: CudaDevice, captures: bool) -> None:
        given = {tensor.name for plan in plans for tensor in plan.spec.outputs}
        taken = {t.name: t for plan in plans for t in plan.spec.inputs if t.name not in given}
        spec = GraphSpec(
            name=" and ".join(plan.spec.name for plan in plans),
            inputs=tuple(taken.values()),
            outputs=tuple(tensor for plan in plans for tensor in plan.spec.outputs),
            targets=plans[0].spec.targets,
        )
        super().__init__(spec, plans[0].description)
        self._device = device
        self._work = _Work(plans, spec, device, captures)

    def _run(self, inputs: Mapping[str, Array | DeviceTensor]) -> dict[str, DeviceTensor]:
        return self._work.run(inputs)

    def close(self) -> None:
        """Wait for the GPU and drop the contexts."""
        with self._work.lock, self._device.current():
            self._work.free()


def open_engine(
    variant: TrtVariant,
    path: Path,
    spec: GraphSpec,
    options: RunnerOptions,
    engine: EngineRecord | None = None,
) -> TrtRunner:
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
            f"manifest; `coprs-deploy export CHECKPOINT --out BUNDLE --runtime {variant.name}`"
        )
    if engine.variant != variant.name:
        raise EngineMismatchError(
            f"{path.name} was built by {TRT_VARIANTS[engine.variant].title}, and {variant.title} cannot "
            f"load it. Run it with --runtime {engine.variant}, or build it with {variant.title}: "
            f"`coprs-deploy export CHECKPOINT --out BUNDLE --runtime {variant.name} --overwrite`"
        )
    if options.device_type != "cuda":
        raise RuntimeUnavailableError(
            f"{variant.title} runs on CUDA, and the device is {options.device!r}: pass "
            "--device cuda, or export for onnxruntime"
        )
    variant.load()
    device = CudaDevice(options.device_index, high_priority=spec.name != IMAGE_ENCODER)
    runner = TrtRunner(path, spec, options, engine=engine, device=device)
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


def trt_availability(variant: TrtVariant) -> list[Availability]:
    """Say whether a flavor is installed, and whether a GPU can run its engines."""
    from coprs_deploy.engines.cuda import current_gpu

    try:
        library = variant.load()
    except MissingDependencyError:
        return [Availability(variant.name, False, "not installed", variant.install)]
    gpu = current_gpu()
    if gpu is None:
        detail = f"{library.__version__}, no GPU here to run engines"
        if variant.builds_without_gpu:
            detail += f"; builds them for {', '.join(known_capabilities(library))}"
        return [Availability(variant.name, False, detail, "run the engines on a machine with one")]
    known = known_capabilities(library)
    if variant.builds_without_gpu and gpu.compute_capability not in known:
        detail = f"{library.__version__} is not for {gpu.name} ({gpu.compute_capability})"
        return [Availability(variant.name, False, detail, "export with --runtime tensorrt")]
    return [Availability(variant.name, True, f"{library.__version__} on {gpu.name}")]
