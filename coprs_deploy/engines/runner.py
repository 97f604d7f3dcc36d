"""The one call signature of all runners, and the check of what goes in.

A runner is a context manager. Calling it takes the graph's inputs by name, as numpy arrays or as
tensors that a runner gave, and returns its outputs by name as tensors that stay where they are.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from coprs_deploy.closing import Closeable
from coprs_deploy.specs import GraphSpec

Array: TypeAlias = NDArray[Any]

INFERENCE_PRECISIONS = ("fp32", "bf16")


class DeviceTensor(Protocol):
    """A tensor where its runner left it; ``numpy()`` brings it to the host."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its dimensions."""

    @property
    def dtype(self) -> str:
        """Its element type under numpy's name, as in ``float32``."""

    def numpy(self) -> Array:
        """Return the values as a host array."""

    def rows(self) -> Sequence[DeviceTensor]:
        """Return its parts along the first dimension, each (1, ...), on the same device."""


@dataclass(frozen=True)
class HostTensor:
    """A host array as a :class:`DeviceTensor`."""

    array: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Its dimensions."""
        return self.array.shape

    @property
    def dtype(self) -> str:
        """Its element type."""
        return str(self.array.dtype)

    def numpy(self) -> Array:
        """Return the array."""
        return self.array

    def rows(self) -> list[HostTensor]:
        """Return its parts along the first dimension; each has memory of its own."""
        return [HostTensor(self.array[i : i + 1].copy()) for i in range(len(self.array))]


@dataclass(frozen=True)
class RunnerOptions:
    """How a graph is run.

    Attributes:
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        num_threads: threads of one operator on the CPU; None leaves it to the runtime.
        cuda_graphs: whether an engine's work is captured once and launched whole.
        allow_engine_host_code: whether version-compatible plans, which carry code, may be loaded.
        inference_precision: what float32 products are computed in: ``fp32``, or ``bf16``, which
            OpenVINO does on processors that have such units.
        cache: folder of graphs that were compiled before; None takes the user's.
    """

    device: str = "cpu"
    num_threads: int | None = None
    cuda_graphs: bool = True
    allow_engine_host_code: bool = False
    inference_precision: str = "fp32"
    cache: Path | None = None

    def __post_init__(self) -> None:
        kind, colon, index = self.device.partition(":")
        if kind not in ("cpu", "cuda") or (colon and (kind == "cpu" or not index.isdigit())):
            raise ValueError(f"device is {self.device!r}; accepted: 'cpu', 'cuda' or 'cuda:N'")
        if self.num_threads is not None and self.num_threads < 1:
            raise ValueError(f"num_threads is {self.num_threads}; it must be at least 1")
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
        """The number behind the colon; 0 without one."""
        return int(self.device.partition(":")[2] or 0)


@dataclass(frozen=True)
class Availability:
    """Whether a runtime can use a device here; ``remedy`` mends it where it cannot."""

    name: str
    is_available: bool
    detail: str
    remedy: str = ""


class Runner(Closeable):
    """A graph that is ready to run.

    Attributes:
        spec: its inputs and outputs.
        description: runtime and device, for people.
    """

    def __init__(self, spec: GraphSpec, description: str) -> None:
        self.spec = spec
        self.description = description

    def __call__(self, **inputs: Array | DeviceTensor) -> dict[str, DeviceTensor]:
        """Run the graph.

        Args:
            inputs: the tensors that ``spec.inputs`` names.

        Returns:
            The tensors that ``spec.outputs`` names.

        Raises:
            ValueError: an input is missing, unknown, or of another dtype or shape.
        """
        check_inputs(self.spec, inputs)
        return self._run(inputs)

    @abstractmethod
    def _run(self, inputs: Mapping[str, Array | DeviceTensor]) -> dict[str, DeviceTensor]:
        """Run with inputs that have been checked."""

    def fused_with(self, following: Runner) -> Runner | None:
        """Make one call of this graph and one that reads its outputs, if the runtime can.

        Returns:
            A runner that takes the inputs of both and gives the outputs of both, to be closed
            before them; None where two calls are as good.
        """
        del following
        return None

    @abstractmethod
    def close(self) -> None:
        """Free the graph's memory; the runner must not be called again."""


def check_inputs(spec: GraphSpec, inputs: Mapping[str, Array | DeviceTensor]) -> None:
    """Refuse inputs that the graph does not take.

    Raises:
        ValueError: names the input, what was found and what is accepted.
    """
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
    """Return a value as a C-contiguous host array; arrays that are so already are not copied."""
    return np.ascontiguousarray(value if isinstance(value, np.ndarray) else value.numpy())
