"""The common call signature of all runners, their options, and the check of inputs.

A runner is a context manager. Calling it takes the graph's inputs by name, as numpy arrays or as
outputs of other runners, and returns its outputs by name as tensors that stay on the device.
"""

from __future__ import annotations

import re
import reprlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from coprs_deploy.closing import Closeable
from coprs_deploy.errors import check_number, check_type
from coprs_deploy.specs import GraphSpec

Array: TypeAlias = NDArray[Any]

INFERENCE_PRECISIONS = ("fp32", "bf16")

MAX_THREADS = 1024
"""More threads than any machine has cores for; the runtimes would try to start them."""


@dataclass(frozen=True)
class DeviceTensor(ABC):
    """An output of a runner, in the memory of its device.

    Attributes:
        tensor: the array or tensor of the library.
    """

    tensor: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Dimensions of the tensor."""
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> str:
        """Element type under numpy's name, as in ``float32``."""
        return str(self.tensor.dtype).removeprefix("torch.")

    @abstractmethod
    def numpy(self) -> Array:
        """Copy the values to the host."""

    def rows(self) -> Sequence[DeviceTensor]:
        """Split along the first dimension into (1, ...) tensors, which share the memory."""
        return [replace(self, tensor=self.tensor[i : i + 1]) for i in range(len(self.tensor))]


class HostTensor(DeviceTensor):
    """A host array as a :class:`DeviceTensor`."""

    def numpy(self) -> Array:
        """Return the array itself."""
        array: Array = self.tensor
        return array

    def rows(self) -> list[HostTensor]:
        """Split along the first dimension; each part has memory of its own."""
        return [HostTensor(self.tensor[i : i + 1].copy()) for i in range(len(self.tensor))]


def check_device(name: str, device: object) -> None:
    """Check the name of a device.

    Raises:
        ValueError: it is none of ``cpu``, ``cuda`` and ``cuda:N``.
    """
    if not isinstance(device, str) or not re.fullmatch(r"cpu|cuda(:[0-9]+)?", device):
        raise ValueError(f"{name} is {reprlib.repr(device)}; accepted: 'cpu', 'cuda' or 'cuda:N'")


@dataclass(frozen=True)
class RunnerOptions:
    """Options of a runner.

    Attributes:
        device: device of the graphs: ``cpu``, ``cuda`` or ``cuda:N``.
        num_threads: CPU threads per graph operator; None selects the runtime's own number.
        cuda_graphs: capture the kernels of an engine once as a CUDA graph and replay it.
        allow_engine_host_code: load version-compatible engines, which carry host code.
        inference_precision: precision of float32 products: ``fp32``, or ``bf16`` with OpenVINO on
            processors that support it.
        cache_dir: folder of compiled graphs and measured choices; None selects the user's.
    """

    device: str = "cpu"
    num_threads: int | None = None
    cuda_graphs: bool = True
    allow_engine_host_code: bool = False
    inference_precision: str = "fp32"
    cache_dir: Path | None = None

    def __post_init__(self) -> None:
        check_device("device", self.device)
        if self.num_threads is not None:
            check_number("num_threads", self.num_threads, least=1, most=MAX_THREADS)
        check_type("cuda_graphs", self.cuda_graphs, bool)
        check_type("allow_engine_host_code", self.allow_engine_host_code, bool)
        check_type("cache_dir", self.cache_dir, Path, NoneType)
        if self.inference_precision not in INFERENCE_PRECISIONS:
            raise ValueError(
                f"inference_precision is {self.inference_precision!r}; accepted: "
                f"{', '.join(INFERENCE_PRECISIONS)}"
            )

    @property
    def device_type(self) -> str:
        """``cpu`` or ``cuda``."""
        return self.device.partition(":")[0]

    @property
    def device_index(self) -> int:
        """Index after the colon; 0 without one."""
        return int(self.device.partition(":")[2] or 0)


@dataclass(frozen=True)
class Availability:
    """Whether a runtime or policy can run on this machine.

    Attributes:
        name: runtime and device, as in ``onnxruntime cuda``.
        is_available: whether it can run.
        detail: version, or what is missing.
        remedy: command or step that makes it available; "" if it is.
    """

    name: str
    is_available: bool
    detail: str
    remedy: str = ""


class Runner(Closeable):
    """A graph that is ready to run.

    Attributes:
        spec: inputs and outputs.
        description: runtime, version and device in one line.
    """

    def __init__(self, spec: GraphSpec, description: str) -> None:
        self.spec = spec
        self.description = description

    def __call__(self, **inputs: Array | DeviceTensor) -> dict[str, DeviceTensor]:
        """Run the graph.

        Args:
            inputs: tensors with the names, dtypes and shapes of ``spec.inputs``.

        Returns:
            Tensors with the names, dtypes and shapes of ``spec.outputs``.

        Raises:
            ValueError: an input is missing, unknown, or of another dtype or shape.
        """
        check_inputs(self.spec, inputs)
        return self._run(inputs)

    @abstractmethod
    def _run(self, inputs: Mapping[str, Array | DeviceTensor]) -> dict[str, DeviceTensor]:
        """Run with checked inputs."""

    def fused_with(self, following: Runner) -> Runner | None:
        """Return a runner with the inputs and outputs of both, to be closed before them.

        None if the runtime cannot fuse this graph with one that reads its outputs.
        """
        return None


def check_inputs(spec: GraphSpec, inputs: Mapping[str, Array | DeviceTensor]) -> None:
    """Raise ``ValueError`` unless names, dtypes and shapes are those of a graph's inputs."""
    names = [tensor.name for tensor in spec.inputs]
    if set(inputs) != set(names):
        raise ValueError(
            f"{spec.name} was given {', '.join(sorted(inputs)) or 'nothing'}; "
            f"it takes {', '.join(names)}"
        )
    for tensor in spec.inputs:
        value = inputs[tensor.name]
        if not tensor.accepts(str(value.dtype), tuple(value.shape)):
            raise ValueError(
                f"{spec.name} was given {tensor.name} as {value.dtype} {tuple(value.shape)}; "
                f"it takes {tensor}"
            )


def host_array(value: Array | DeviceTensor) -> Array:
    """Return a value as a C-contiguous host array, without a copy if it already is one."""
    return np.ascontiguousarray(value if isinstance(value, np.ndarray) else value.numpy())
