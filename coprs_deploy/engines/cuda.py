"""A CUDA device through PyTorch: buffers, a prioritized stream, copies, CUDA graph capture.

Engines use CUDA through this module only; it does not depend on TensorRT.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from coprs_deploy.engines.runner import Array, DeviceTensor, host_array
from coprs_deploy.errors import RuntimeUnavailableError, import_failure, install_hint

if TYPE_CHECKING:
    import torch


_CAPTURING = threading.Lock()


@dataclass(frozen=True)
class Gpu:
    """Name and compute capability (``sm_89``) of a GPU."""

    name: str
    compute_capability: str


def current_gpu(index: int = 0) -> Gpu | None:
    """Describe a GPU by index; None if PyTorch finds none, or is not installed."""
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available() or index >= torch.cuda.device_count():
        return None
    major, minor = torch.cuda.get_device_capability(index)
    return Gpu(torch.cuda.get_device_name(index), f"sm_{major}{minor}")


def gpu_memory() -> list[dict[str, int]]:
    """Return the memory of each GPU in bytes; none where PyTorch has not used CUDA.

    Returns:
        ``used`` by all processes, ``total``, and ``reserved`` by PyTorch in this one.
    """
    try:
        import torch
    except ImportError:
        return []
    # A query would make a context, which takes memory.
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        reserved = torch.cuda.memory_reserved(index)
        found.append({"used": total - free, "total": total, "reserved": reserved})
    return found


@dataclass(frozen=True)
class CudaTensor(DeviceTensor):
    """A torch tensor in GPU memory, and the event after which its values are valid."""

    ready: torch.cuda.Event

    def numpy(self) -> Array:
        """Copy the values to the host, through pinned memory."""
        import torch

        stream = torch.cuda.current_stream(self.tensor.device)
        stream.wait_event(self.ready)
        self.tensor.record_stream(stream)
        host = torch.empty(self.tensor.shape, dtype=self.tensor.dtype, pin_memory=True)
        host.copy_(self.tensor, non_blocking=True)
        stream.synchronize()
        array: Array = host.numpy()
        return array


class CudaDevice:
    """One CUDA stream of one device, and the buffers that its kernels read and write.

    Kernels of a stream with high priority run before those of other streams.

    Attributes:
        stream: the stream as PyTorch's object.
        stream_handle: the ``cudaStream_t`` as an integer, for TensorRT.

    Raises:
        MissingDependencyError: PyTorch is not installed.
        RuntimeUnavailableError: PyTorch finds no such device.
    """

    def __init__(self, index: int, high_priority: bool) -> None:
        try:
            import torch
        except ImportError as error:
            hint = install_hint("torch")
            raise import_failure(error, "torch", hint, needed_by="CUDA memory") from error
        gpu = current_gpu(index)
        if gpu is None:
            raise RuntimeUnavailableError(
                f"PyTorch {torch.__version__} finds no CUDA device {index}; check the driver with "
                "nvidia-smi and that PyTorch is a CUDA build, or export for onnxruntime"
            )
        self._torch: Any = torch  # its streams and events have no types
        self._device = torch.device("cuda", index)
        self.index = index
        self._high_priority = high_priority
        self.gpu = gpu
        self.stream = self._torch.cuda.Stream(self._device, priority=-1 if high_priority else 0)
        self.stream_handle: int = self.stream.cuda_stream
        self._staging: dict[str, tuple[torch.Tensor, torch.cuda.Event]] = {}

    def sibling(self) -> CudaDevice:
        """Create another stream of the same device and priority, with buffers of its own."""
        return CudaDevice(self.index, self._high_priority)

    def current(self) -> Any:
        """Make this device the thread's current one within a block, as TensorRT requires."""
        return self._torch.cuda.device(self._device)

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        """Allocate a buffer; ``data_ptr()`` is its address."""
        with self._torch.cuda.stream(self.stream):
            return self._torch.empty(shape, dtype=getattr(self._torch, dtype), device=self._device)

    def fill(self, name: str, buffer: Any, value: Array | DeviceTensor) -> None:
        """Copy a value into a buffer of the same shape and dtype, on the stream.

        Host arrays go through pinned staging memory, one for each tensor name.
        """
        with self._torch.cuda.stream(self.stream):
            if isinstance(value, CudaTensor):
                self.stream.wait_event(value.ready)
                value.tensor.record_stream(self.stream)
                buffer.copy_(value.tensor, non_blocking=True)
                return
            pinned, used = self._pinned(name, buffer)
            used.synchronize()  # the previous copy may still read it
            np.copyto(pinned.numpy(), host_array(value))
            buffer.copy_(pinned, non_blocking=True)
            used.record(self.stream)

    def _pinned(self, name: str, buffer: Any) -> tuple[Any, Any]:
        if name not in self._staging or self._staging[name][0].shape != buffer.shape:
            pinned = self._torch.empty(buffer.shape, dtype=buffer.dtype, pin_memory=True)
            self._staging[name] = (pinned, self._torch.cuda.Event())
        return self._staging[name]

    def copy_out(self, buffer: Any) -> CudaTensor:
        """Copy a buffer, which the next call overwrites, into a tensor of its own."""
        with self._torch.cuda.stream(self.stream):
            copy = buffer.clone()
            ready = self._torch.cuda.Event()
            ready.record(self.stream)
        return CudaTensor(copy, ready)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Capture work, which has run before, as a CUDA graph; returns a function that replays it.

        Raises:
            RuntimeUnavailableError: the work cannot be captured.
        """
        graph = self._torch.cuda.CUDAGraph()
        self.stream.synchronize()
        # Other threads, such as the policy's, use CUDA during the capture. PyTorch captures one
        # graph at a time per process.
        options = {"stream": self.stream, "capture_error_mode": "thread_local"}
        try:
            with _CAPTURING, self._torch.cuda.graph(graph, **options):
                work()
        except RuntimeError as error:
            raise RuntimeUnavailableError(
                f"CUDA graph capture failed ({error}); disable it with --no-cuda-graphs "
                "(in Python: RuntimeOptions(cuda_graphs=False))"
            ) from error

        def replay() -> None:
            with self._torch.cuda.stream(self.stream):
                graph.replay()

        return replay

    def synchronize(self) -> None:
        """Wait until the stream has finished."""
        self.stream.synchronize()
