"""PyTorch modules behind the common call signature."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from coprs_deploy.engines import RunnerOptions, torch_runner
from coprs_deploy.engines.torch_runner import TorchRunner, TorchTensor
from coprs_deploy.errors import RuntimeUnavailableError, install_hint
from coprs_deploy.specs import GraphSpec, TensorSpec

SPEC = GraphSpec(
    "sum",
    (TensorSpec("left", "float32", (2, 3)), TensorSpec("right", "float32", (2, 3))),
    (TensorSpec("total", "float32", (2, 3)),),
)


class Difference(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(2.0))
        self.dropout = torch.nn.Dropout(0.9)

    def forward(self, left, right):
        return self.dropout(self.scale * left - right)


def arrays():
    return {
        "left": np.arange(6, dtype=np.float32).reshape(2, 3),
        "right": np.ones((2, 3), dtype=np.float32),
    }


def test_call_maps_inputs_and_the_output_by_name():
    with TorchRunner(Difference().train(), SPEC) as runner:
        inputs = arrays()
        swapped = dict(reversed(inputs.items()))
        (name, output), *rest = runner(**swapped).items()
    assert (name, rest) == ("total", [])
    assert np.array_equal(output.numpy(), 2 * inputs["left"] - inputs["right"])
    assert (output.shape, output.dtype) == ((2, 3), "float32")


def test_outputs_require_no_gradient():
    output = TorchRunner(Difference(), SPEC)(**arrays())["total"]
    assert not output.tensor.requires_grad


def test_an_output_as_input_is_not_copied_to_the_host(monkeypatch):
    runner = TorchRunner(Difference(), SPEC)
    first = runner(**arrays())["total"]

    def refuse(self):
        raise AssertionError("the tensor was copied to the host")

    monkeypatch.setattr(TorchTensor, "numpy", refuse)
    second = runner(left=first, right=arrays()["right"])["total"]
    assert torch.equal(second.tensor, 2 * first.tensor - 1)


def test_inputs_in_another_memory_order_are_accepted():
    runner = TorchRunner(Difference(), SPEC)
    inputs = arrays()
    turned = np.asfortranarray(inputs["left"])
    output = runner(left=turned, right=inputs["right"])["total"].numpy()
    assert np.array_equal(output, 2 * inputs["left"] - inputs["right"])


def test_call_with_a_wrong_input_raises():
    runner = TorchRunner(Difference(), SPEC)
    with pytest.raises(ValueError, match=r"left as float64 \(2, 3\); it takes left: float32"):
        runner(**{**arrays(), "left": np.zeros((2, 3))})


def test_call_after_close_raises():
    runner = TorchRunner(Difference(), SPEC)
    runner.close()
    with pytest.raises(AssertionError, match="the runner was closed"):
        runner(**arrays())


def test_open_graph_raises():
    with pytest.raises(RuntimeUnavailableError, match=r"PyTorch cannot run prior\.onnx"):
        torch_runner.open_graph(Path("prior.onnx"), SPEC, RunnerOptions())


def test_availability_reports_version_and_gpu():
    cpu, cuda = torch_runner.availability()
    assert (cpu.name, cpu.is_available, cpu.detail) == ("torch cpu", True, torch.__version__)
    assert cuda.name == "torch cuda"
    assert cuda.is_available == torch.cuda.is_available()
    assert cuda.is_available or "driver" in cuda.remedy


def test_availability_without_torch_names_the_pip_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (missing,) = torch_runner.availability()
    assert not missing.is_available
    assert missing.remedy == install_hint("torch")
