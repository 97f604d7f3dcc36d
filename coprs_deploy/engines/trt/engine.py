"""A deserialized engine: its execution contexts, and the kernel cache of TensorRT for RTX."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from coprs_deploy.bundle import EngineRecord
from coprs_deploy.engines.cache import Cache
from coprs_deploy.engines.cuda import CudaDevice
from coprs_deploy.engines.runner import RunnerOptions
from coprs_deploy.engines.trt.checks import (
    check_loadable,
    read_engine,
    rebuild_command,
    signature_mismatch,
    tensor_spec,
)
from coprs_deploy.engines.trt.variants import TENSORRT_RTX, TRT_VARIANTS, TrtVariant, make_logger
from coprs_deploy.errors import BundleError, BundleIntegrityError, RuntimeUnavailableError
from coprs_deploy.specs import GraphSpec, TensorSpec

KERNEL_CACHE_FOLDER = "runtime"


class TrtEngine:
    """One engine on one GPU, which must be the thread's current device during calls.

    Attributes:
        layers: layers of the compiled network, one line each.
        device_memory_bytes: scratch memory of one execution context.

    Raises:
        BundleError: the file cannot be read, or the library refuses it.
        BundleIntegrityError: the file was changed, or its tensors differ from ``spec``.
        EngineMismatchError: it was built for another library version or GPU.
    """

    def __init__(
        self,
        path: Path,
        spec: GraphSpec,
        options: RunnerOptions,
        engine: EngineRecord,
        device: CudaDevice,
    ) -> None:
        variant = TRT_VARIANTS[engine.variant]
        library = variant.load()
        check_loadable(path.name, engine, library.__version__, device.gpu, options)
        data = read_engine(path, engine)
        logger = make_logger(library)
        with device.current():
            runtime = library.Runtime(logger)
            if engine.version_compatible:
                runtime.engine_host_code_allowed = True
            loaded = runtime.deserialize_cuda_engine(data)
        del data
        if loaded is None:
            raise BundleError(
                f"{variant.title} {library.__version__} refuses {path}: {logger}. "
                f"Rebuild it: {rebuild_command(engine)}"
            )
        mismatch = signature_mismatch(spec, _io_tensors(loaded))
        if mismatch is not None:
            raise BundleIntegrityError(f"{path}: {mismatch}. Rebuild it: {rebuild_command(engine)}")
        verified = f"verified on {engine.verified_on}" if engine.verified_on else "never verified"
        self.spec = spec
        self.description = (
            f"{engine.variant} {library.__version__} on {device.gpu.name}, {verified}"
        )
        self.layers = _layer_lines(library, loaded)
        self.device_memory_bytes: int = getattr(
            loaded, "device_memory_size_v2", getattr(loaded, "device_memory_size", 0)
        )
        self._runtime, self._logger = runtime, logger
        self._engine: Any = loaded
        self._cache = Cache(options.cache_dir)
        self._kernel_cache_name = f"{engine.sha256}-{device.gpu.compute_capability}"
        self._config, self._kernel_cache = self._open_kernel_cache(variant)

    def _open_kernel_cache(self, variant: TrtVariant) -> tuple[Any, Any]:
        """Load the kernels that TensorRT for RTX compiled on this GPU before."""
        if variant.name != TENSORRT_RTX.name:
            return None, None
        config = self._engine.create_runtime_config()
        kernel_cache = config.create_runtime_cache()
        saved = self._cache.load_blob(KERNEL_CACHE_FOLDER, self._kernel_cache_name)
        if saved is not None and not kernel_cache.deserialize(saved):
            warnings.warn(
                f"{self.description}: its kernel cache cannot be read; kernels are compiled again",
                stacklevel=5,
            )
        config.set_runtime_cache(kernel_cache)
        return config, kernel_cache

    def make_context(self, buffers: dict[str, Any], count: int) -> Any:
        """Create an execution context on device buffers for a number of targets or images."""
        arguments = () if self._config is None else (self._config,)
        context = self._engine.create_execution_context(*arguments)
        if context is None:
            raise RuntimeUnavailableError(
                f"{self.description} cannot create a context for {self.spec.name}: {self._logger}; "
                "free GPU memory"
            )
        for tensor in (*self.spec.inputs, *self.spec.outputs):
            shape = tensor.shape_for(count)
            is_input = tensor in self.spec.inputs
            if is_input and not context.set_input_shape(tensor.name, shape):
                raise BundleError(f"the engine refuses {tensor.name} of shape {shape}")
            if not context.set_tensor_address(tensor.name, buffers[tensor.name].data_ptr()):
                raise BundleError(f"the engine has no tensor {tensor.name}")
        return context

    def execute(self, context: Any, stream_handle: int) -> None:
        """Enqueue one run of a context on a CUDA stream."""
        if not context.execute_async_v3(stream_handle):
            raise RuntimeUnavailableError(
                f"{self.description} could not run {self.spec.name}: {self._logger}"
            )

    def close(self) -> None:
        """Free the engine and save its compiled kernels; all contexts must be gone before."""
        kernels = None if self._kernel_cache is None else bytes(self._kernel_cache.serialize())
        self._config = self._kernel_cache = None
        self._engine = self._runtime = None
        if kernels is not None:
            self._cache.save_blob(KERNEL_CACHE_FOLDER, self._kernel_cache_name, kernels)


def _io_tensors(engine: Any) -> list[TensorSpec]:
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    return [tensor_spec(n, engine.get_tensor_dtype(n), engine.get_tensor_shape(n)) for n in names]


def _layer_lines(library: Any, engine: Any) -> tuple[str, ...]:
    inspector = engine.create_engine_inspector()
    form = library.LayerInformationFormat.ONELINE
    return tuple(inspector.get_layer_information(i, form).strip() for i in range(engine.num_layers))
