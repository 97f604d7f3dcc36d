"""ONNX graphs through ONNX Runtime, on the CPU or on CUDA.

Outputs are bound to the device and passed on as they are, so that the image embedding is not copied
between the graphs. A requested provider that is not used is an error, never a fallback.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from coprs_deploy.bundle import EngineRecord
from coprs_deploy.engines.runner import (
    Array,
    Availability,
    DeviceTensor,
    HostTensor,
    Runner,
    RunnerOptions,
    host_array,
)
from coprs_deploy.errors import (
    BundleError,
    MissingDependencyError,
    RuntimeUnavailableError,
    import_failure,
    install_hint,
)
from coprs_deploy.machine import describe_processor
from coprs_deploy.specs import GraphSpec

if TYPE_CHECKING:
    import onnxruntime

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
INSTALL = {
    "cpu": install_hint("cpu"),
    "cuda": "pip uninstall onnxruntime; " + install_hint("gpu,torch"),
}
_ELEMENT_TYPES = {"tensor(float)": "float32", "tensor(int64)": "int64"}


@dataclass(frozen=True)
class OrtTensor(DeviceTensor):
    """An ``OrtValue``, or one row of it, as a :class:`DeviceTensor`.

    Attributes:
        row: index along the first dimension; None for the whole value.
    """

    row: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Dimensions of the tensor."""
        count, *rest = self.tensor.shape()
        return (count if self.row is None else 1, *rest)

    @property
    def dtype(self) -> str:
        """Element type under numpy's name."""
        name: str = self.tensor.data_type()
        return _ELEMENT_TYPES.get(name, name)

    @property
    def address(self) -> int:
        """Device address of the first element."""
        row_bytes = math.prod(self.shape[1:]) * np.dtype(self.dtype).itemsize
        return int(self.tensor.data_ptr()) + (self.row or 0) * row_bytes

    def numpy(self) -> Array:
        """Copy the values to the host."""
        array: Array = self.tensor.numpy()
        return array if self.row is None else array[self.row : self.row + 1]

    def rows(self) -> Sequence[DeviceTensor]:
        """Split along the first dimension; on a GPU the parts share the memory."""
        if self.tensor.device_name() == "cpu":
            return HostTensor(self.numpy()).rows()
        if self.row is not None:
            return [self]
        return [OrtTensor(self.tensor, row) for row in range(self.shape[0])]


class OrtRunner(Runner):
    """One ONNX graph in an ONNX Runtime session."""

    def __init__(self, path: Path, spec: GraphSpec, options: RunnerOptions) -> None:
        ort = _import_onnxruntime(options.device_type)
        provider = PROVIDERS[options.device_type]
        if provider not in ort.get_available_providers():
            raise RuntimeUnavailableError(
                f"ONNX Runtime {ort.__version__} has no {provider} here (it has "
                f"{', '.join(ort.get_available_providers())}); {INSTALL[options.device_type]}"
            )
        settings = ort.SessionOptions()
        # Memory patterns allocate the first run's pattern in addition to the arena.
        settings.enable_mem_pattern = False
        if options.device_type == "cpu":
            _share_arena()
            settings.add_session_config_entry("session.use_env_allocators", "1")
            if not describe_processor().has_int8_units:
                # Without int8 dot products, pairs of int8 products are added in 16 bits and
                # saturate, unless the weights are stored without a sign.
                settings.add_session_config_entry("session.x64quantprecision", "1")
        # Spinning idle threads take cores from the policy and from resizing: segmentation with the
        # demo model took a quarter longer.
        settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if options.num_threads is not None:
            settings.intra_op_num_threads = options.num_threads
        provider_options = [_provider_options(options)]
        try:
            session = ort.InferenceSession(str(path), settings, [provider], provider_options)
        except MemoryError:
            raise
        except Exception as error:  # ONNX Runtime raises classes of its own that share no base
            raise BundleError(f"ONNX Runtime cannot open {path}: {error}") from error
        if session.get_providers()[0] != provider:
            raise RuntimeUnavailableError(
                f"ONNX Runtime could not start {provider} and chose {session.get_providers()[0]}; "
                "check the driver and the CUDA libraries with `coprs-deploy doctor`"
            )
        super().__init__(spec, f"onnxruntime {ort.__version__} on {options.device}")
        self._ort = ort
        self._device = (options.device_type, options.device_index)
        self._session: onnxruntime.InferenceSession | None = session

    def _run(self, inputs: Mapping[str, Array | DeviceTensor]) -> dict[str, DeviceTensor]:
        assert self._session is not None, "the runner was closed"
        binding = self._session.io_binding()
        # A CPU OrtValue points into its numpy array; not every version lets the binding keep both.
        bound = {name: self._on_device(value) for name, value in inputs.items()}
        for name, value in bound.items():
            if value.row is None:
                binding.bind_ortvalue_input(name, value.tensor)
            else:
                dtype = np.dtype(value.dtype)
                binding.bind_input(name, *self._device, dtype, value.shape, value.address)
        for tensor in self.spec.outputs:
            binding.bind_output(tensor.name, *self._device)
        self._session.run_with_iobinding(binding)
        pairs = zip(self.spec.outputs, binding.get_outputs(), strict=True)
        return {tensor.name: OrtTensor(value) for tensor, value in pairs}

    def _on_device(self, value: Array | DeviceTensor) -> OrtTensor:
        if isinstance(value, OrtTensor) and (
            value.row is None or value.tensor.device_name() == self._device[0]
        ):
            return value
        array = host_array(value)
        return OrtTensor(self._ort.OrtValue.ortvalue_from_numpy(array, *self._device))

    def close(self) -> None:
        """Free the session."""
        self._session = None


def _provider_options(options: RunnerOptions) -> dict[str, str]:
    if options.device_type == "cpu":
        return {}
    provider_options = {"use_tf32": "0"}  # TF32 is not float32
    if options.device_index:  # from 1.26 on, passing a device_id causes a warning about plug-ins
        provider_options["device_id"] = str(options.device_index)
    return provider_options


@cache
def _share_arena() -> None:
    """Register one arena for all sessions of this process, which grows by the requested size.

    A session's own arena grows in powers of two. Without an arena, every large tensor is mapped and
    page-faulted again: a fifth more time for ViT-B, and no less memory.
    """
    import onnxruntime as ort

    memory = ort.OrtMemoryInfo(
        "Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT
    )
    settings = ort.OrtArenaCfg({"arena_extend_strategy": 1})  # kSameAsRequested
    ort.create_and_register_allocator(memory, settings)


def open_graph(
    path: Path, spec: GraphSpec, options: RunnerOptions, engine: EngineRecord | None = None
) -> Runner:
    """Open an ONNX file with ONNX Runtime; see :func:`coprs_deploy.engines.open_graph`."""
    return OrtRunner(path, spec, options)


def availability() -> list[Availability]:
    """Report which of the two providers can be used on this machine."""
    try:
        ort = _import_onnxruntime("cpu")
    except MissingDependencyError as error:
        return [Availability("onnxruntime", False, str(error), INSTALL["cpu"])]
    present = ort.get_available_providers()
    return [
        Availability(
            f"onnxruntime {device}",
            provider in present,
            f"{ort.__version__}, {provider}" + ("" if provider in present else " is not included"),
            "" if provider in present else INSTALL[device],
        )
        for device, provider in PROVIDERS.items()
    ]


def _import_onnxruntime(device_type: str) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        remedy = INSTALL[device_type]
        raise import_failure(error, "onnxruntime", remedy, title="ONNX Runtime") from error
    if device_type == "cuda" and hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()  # finds the CUDA libraries in PyTorch's wheels
    return onnxruntime
