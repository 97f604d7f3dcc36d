"""Calls, inputs and options that all runners share, and the table of runtimes."""

import re
import sys

import numpy as np
import pytest

from coprs_deploy import demo, engines
from coprs_deploy.bundle import read_manifest
from coprs_deploy.engines import RunnerOptions, default_runtime, runtime_module, runtime_names
from coprs_deploy.engines.runner import HostTensor, Runner, check_inputs, host_array
from coprs_deploy.specs import PRIOR, Geometry, OptimizationProfile, graph_specs

GEOMETRY = Geometry(image_size=16, patch_size=4, out_chans=8)
SPEC = graph_specs(GEOMETRY, 3, OptimizationProfile(1, 2, 4))[PRIOR]


class RecordingRunner(Runner):
    def __init__(self):
        super().__init__(SPEC, "a runner for tests")
        self.calls = []
        self.is_closed = False

    def _run(self, inputs):
        self.calls.append(dict(inputs))
        return {"prior_logits": HostTensor(np.zeros((1, 1, 16, 16), np.float32))}

    def close(self):
        self.is_closed = True


def good_inputs(**changes):
    inputs = {
        "image_embedding": np.zeros((1, 8, 4, 4), np.float32),
        "concentration": np.zeros((2, 3), np.float32),
    }
    inputs.update(changes)
    return inputs


def test_call_passes_matching_inputs_unchanged():
    runner = RecordingRunner()
    inputs = good_inputs()
    outputs = runner(**inputs)
    assert list(outputs) == ["prior_logits"]
    assert len(runner.calls) == 1
    assert all(runner.calls[0][name] is value for name, value in inputs.items())


def test_call_accepts_outputs_of_runners():
    runner = RecordingRunner()
    runner(**good_inputs(image_embedding=HostTensor(np.zeros((1, 8, 4, 4), np.float32))))
    assert len(runner.calls) == 1


@pytest.mark.parametrize("targets", [1, 2, 5])
def test_check_inputs_accepts_any_size_of_a_symbolic_dimension(targets):
    inputs = good_inputs(concentration=np.zeros((targets, 3), np.float32))
    assert check_inputs(SPEC, inputs) is None


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "prior was given nothing; it takes image_embedding, concentration"),
        (["concentration"], "prior was given concentration; it takes image_embedding, conc"),
        (
            ["image_embedding", "concentration", "extra"],
            "prior was given concentration, extra, image_embedding; it takes",
        ),
        (["image_embedding", "Concentration"], "Concentration, image_embedding; it takes"),
    ],
)
def test_call_with_missing_or_unknown_inputs_raises(names, message):
    runner = RecordingRunner()
    inputs = {name: good_inputs().get(name, np.zeros(1)) for name in names}
    with pytest.raises(ValueError, match=message):
        runner(**inputs)
    assert runner.calls == []


@pytest.mark.parametrize("wrap", [np.asarray, HostTensor])
@pytest.mark.parametrize(
    ("value", "found"),
    [
        (np.zeros((2, 3)), "float64 (2, 3)"),
        (np.zeros((2, 3), np.float16), "float16 (2, 3)"),
        (np.zeros((2, 4), np.float32), "float32 (2, 4)"),
        (np.zeros(3, np.float32), "float32 (3,)"),
        (np.zeros((2, 3, 1), np.float32), "float32 (2, 3, 1)"),
    ],
)
def test_call_with_another_dtype_or_shape_raises(wrap, value, found):
    runner = RecordingRunner()
    message = (
        f"prior was given concentration as {found}; it takes concentration: float32 (targets, 3)"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        runner(**good_inputs(concentration=wrap(value)))
    assert runner.calls == []


def test_leaving_the_with_block_closes_the_runner():
    with RecordingRunner() as runner:
        assert not runner.is_closed
    assert runner.is_closed


def test_an_error_in_the_with_block_closes_the_runner_and_propagates():
    with pytest.raises(KeyError, match="inside"), RecordingRunner() as runner:
        raise KeyError("inside")
    assert runner.is_closed


def test_a_runner_without_run_cannot_be_instantiated():
    class Incomplete(Runner):
        def close(self):
            pass

    with pytest.raises(TypeError, match="_run"):
        Incomplete(SPEC, "incomplete")


def test_host_array_of_a_contiguous_array_is_no_copy():
    array = np.arange(6.0).reshape(2, 3)
    assert host_array(array) is array
    assert host_array(HostTensor(array)) is array


@pytest.mark.parametrize("wrap", [np.asarray, HostTensor])
def test_host_array_of_a_strided_array_is_contiguous(wrap):
    array = np.arange(6.0).reshape(2, 3).T
    result = host_array(wrap(array))
    assert result.flags.c_contiguous
    np.testing.assert_array_equal(result, array)


@pytest.mark.parametrize(
    ("device", "kind", "index"),
    [("cpu", "cpu", 0), ("cuda", "cuda", 0), ("cuda:0", "cuda", 0), ("cuda:12", "cuda", 12)],
)
def test_runner_options_split_the_device(device, kind, index):
    options = RunnerOptions(device=device)
    assert (options.device_type, options.device_index) == (kind, index)


@pytest.mark.parametrize(
    "device", ["", "gpu", "CPU", "cpu:0", "cuda:", "cuda:-1", "cuda:x", "cuda:0:1"]
)
def test_runner_options_refuse_an_unknown_device(device):
    with pytest.raises(
        ValueError, match=f"device is {device!r}; accepted: 'cpu', 'cuda' or 'cuda:N'"
    ):
        RunnerOptions(device=device)


@pytest.mark.parametrize("num_threads", [0, -1])
def test_runner_options_refuse_less_than_one_thread(num_threads):
    with pytest.raises(ValueError, match=f"num_threads is {num_threads}; it must be at least 1"):
        RunnerOptions(num_threads=num_threads)


def test_runner_options_default_to_the_cpu():
    options = RunnerOptions()
    assert (options.device, options.num_threads, options.cache_dir) == ("cpu", None, None)


def test_every_runtime_has_open_graph_and_availability():
    assert runtime_names() == ["onnxruntime", "openvino", "tensorrt-rtx", "tensorrt", "torch"]
    for name in runtime_names():
        module = runtime_module(name)
        assert callable(module.open_graph)
        assert callable(module.availability)


@pytest.mark.parametrize("name", ["", "onnx", "onnxruntime_runner", "runner", "trt"])
def test_open_graph_with_an_unknown_runtime_lists_the_accepted(name, tmp_path):
    with pytest.raises(ValueError, match=f"runtime is '{name}'; accepted: .*onnxruntime"):
        engines.open_graph(name, tmp_path, SPEC, RunnerOptions())


@pytest.mark.parametrize(
    ("missing", "device", "expected"),
    [
        ((), "cpu", "onnxruntime"),
        (("onnxruntime",), "cpu", "openvino"),
        (
            ("onnxruntime",),
            "cuda",
            "onnxruntime",
        ),  # OpenVINO has no CUDA
        (("onnxruntime", "openvino"), "cpu", "onnxruntime"),
    ],
)
def test_default_runtime_is_the_bundles_own_or_the_installed_one(
    monkeypatch, missing, device, expected
):
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    graph = read_manifest(demo.BUNDLE).graphs["prior"]
    assert default_runtime(graph, RunnerOptions(device=device)) == expected
