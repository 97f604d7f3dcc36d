"""A deserialized engine: its contexts, and the kernels that TensorRT for RTX compiles for it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from coprs_deploy.bundle import EngineRecord
from coprs_deploy.engines.cache import BuildCache
from coprs_deploy.engines.cuda import CudaDevice
from coprs_deploy.engines.runner import RunnerOptions
from coprs_deploy.engines.trt.build import check_signature, make_logger, tensor_spec
from coprs_deploy.engines.trt.checks import check_loadable, read_plan, remedy
from coprs_deploy.engines.trt.variants import TRT_VARIANTS, TrtVariant
from coprs_deploy.errors import BundleError, BundleIntegrityError, RuntimeUnavailableError
from coprs_deploy.specs import GraphSpec

RUNTIME_CACHE_FOLDER = "runtime"


class TrtEngine:
    """One engine on one GPU; used with its device as the current one.

    Attributes:
        spec: inputs and outputs.
        description: library and GPU, for people.
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
        cache: BuildCache,
    ) -> None:
        variant = TRT_VARIANTS[engine.variant]
        library = variant.load()
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
                f"{variant.title} {library.__version__} refuses {path}: "
                f"{'; '.join(logger.errors) or 'no reason given'}. {remedy(engine)}"
            )
        problem = check_signature(spec, engine_tensors(loaded))
        if problem is not None:
            raise BundleIntegrityError(f"{path}: {problem}. {remedy(engine)}")
        verified = f"verified on {engine.verified_on}" if engine.verified_on else "never verified"
        self.spec = spec
        self.description = (
            f"{engine.variant} {library.__version__} on {device.gpu.name}, {verified}"
        )
        self.layers = engine_layers(library, loaded)
        self.device_memory_bytes: int = getattr(
            loaded, "device_memory_size_v2", getattr(loaded, "device_memory_size", 0)
        )
        self._library, self._runtime, self._logger = library, runtime, logger
        self._engine: Any = loaded
        self._cache = cache
        self._cache_name = f"{engine.sha256}-{device.gpu.compute_capability}"
        self._config, self._compiled = self._runtime_cache(variant)

    @property
    def is_open(self) -> bool:
        """Whether it may still be used."""
        return self._engine is not None

    def _runtime_cache(self, variant: TrtVariant) -> tuple[Any, Any]:
        """Give TensorRT for RTX the kernels that it compiled on this GPU before."""
        if variant.name != "tensorrt-rtx":
            return None, None
        config = self._engine.create_runtime_config()
        compiled = config.create_runtime_cache()
        known = self._cache.load_blob(RUNTIME_CACHE_FOLDER, self._cache_name)
        if known is not None and not compiled.deserialize(known):
            warnings.warn(
                f"{self.description}: its kernel cache cannot be read and is made anew",
                stacklevel=5,
            )
        config.set_runtime_cache(compiled)
        return config, compiled

    def make_context(self, buffers: dict[str, Any], count: int) -> Any:
        """Make a context for a number of targets or images that reads and writes buffers by name.

        Raises:
            RuntimeUnavailableError: the GPU has no room for it.
            BundleError: the engine does not take a tensor.
        """
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
        for tensor in (*self.spec.inputs, *self.spec.outputs):
            shape = tensor.shape_for(count)
            is_input = tensor in self.spec.inputs
            if is_input and not context.set_input_shape(tensor.name, shape):
                raise BundleError(f"the engine refuses {tensor.name} of shape {shape}")
            if not context.set_tensor_address(tensor.name, buffers[tensor.name].data_ptr()):
                raise BundleError(f"the engine knows no tensor {tensor.name}")
        return context

    def execute(self, context: Any, stream_handle: int) -> None:
        """Put a run of a context on a stream.

        Raises:
            RuntimeUnavailableError: TensorRT refuses.
        """
        if not context.execute_async_v3(stream_handle):
            raise RuntimeUnavailableError(
                f"{self.description} could not run {self.spec.name}: "
                f"{'; '.join(self._logger.errors[-3:]) or 'no reason given'}"
            )

    def close(self) -> None:
        """Free the engine, whose contexts are gone, and keep what was compiled."""
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
                stacklevel=3,
            )


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
