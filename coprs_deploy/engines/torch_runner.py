"""PyTorch modules behind the common call signature: the reference for every other runtime.

The caller builds the modules; a bundle contains none, so opening a graph file is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from coprs_deploy.bundle import EngineRecord
from coprs_deploy.engines.runner import (
    Array,
    Availability,
    DeviceTensor,
    Runner,
    RunnerOptions,
    host_array,
)
from coprs_deploy.errors import RuntimeUnavailableError, import_failure, install_hint
from coprs_deploy.specs import GraphSpec

if TYPE_CHECKING:
    import torch


class TorchTensor(DeviceTensor):
    """A torch tensor as a :class:`DeviceTensor`."""

    def numpy(self) -> Array:
        """Copy the values to the host."""
        array: Array = self.tensor.detach().cpu().numpy()
        return array


class TorchRunner(Runner):
    """One module of a ``SegmentationModel``, run without gradients.

    The module takes the inputs of ``spec`` by position and returns its only output.
    """

    def __init__(
        self, module: torch.nn.Module, spec: GraphSpec, options: RunnerOptions | None = None
    ) -> None:
        self._device = (options or RunnerOptions()).device
        super().__init__(spec, f"torch on {self._device}")
        self._module: torch.nn.Module | None = module.to(self._device).eval()

    def _run(self, inputs: Mapping[str, Array | DeviceTensor]) -> dict[str, DeviceTensor]:
        import torch

        assert self._module is not None, "the runner was closed"
        with torch.inference_mode():
            output = self._module(*(self._tensor(inputs[t.name]) for t in self.spec.inputs))
        return {self.spec.outputs[0].name: TorchTensor(output)}

    def _tensor(self, value: Array | DeviceTensor) -> torch.Tensor:
        import torch

        if isinstance(value, TorchTensor):
            moved: torch.Tensor = value.tensor.to(self._device)
            return moved
        return torch.from_numpy(host_array(value)).to(self._device)

    def close(self) -> None:
        """Release the module."""
        self._module = None


def open_graph(
    path: Path, spec: GraphSpec, options: RunnerOptions, engine: EngineRecord | None = None
) -> Runner:
    """Raise :class:`RuntimeUnavailableError`: PyTorch runs modules, not graph files."""
    raise RuntimeUnavailableError(
        f"PyTorch cannot run {path.name}: it is the reference for other runtimes; export for one "
        "of those"
    )


def availability() -> list[Availability]:
    """Report whether PyTorch is installed and finds a GPU."""
    try:
        import torch
    except (ImportError, OSError) as error:
        remedy = install_hint("torch")
        return [Availability("torch", False, str(import_failure(error, "torch", remedy)), remedy)]
    cuda = torch.cuda.is_available()
    return [
        Availability("torch cpu", True, torch.__version__),
        Availability(
            "torch cuda",
            cuda,
            torch.cuda.get_device_name() if cuda else "torch finds no CUDA device",
            "" if cuda else "install an NVIDIA driver and a CUDA build: pip install torch",
        ),
    ]
