"""OpenVINO behind the common call signature: same files and results, caching, requests."""

import gc
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import openvino
import pytest

from coprs_deploy import demo
from coprs_deploy.bundle import open_bundle
from coprs_deploy.checkpoint import load_segmentation_model, read_checkpoint
from coprs_deploy.engines import RunnerOptions, onnxruntime_runner, openvino_runner
from coprs_deploy.engines.torch_runner import TorchRunner
from coprs_deploy.errors import (
    BundleError,
    MissingDependencyError,
    RuntimeUnavailableError,
    install_hint,
)
from coprs_deploy.export import ExportOptions, export_checkpoint
from coprs_deploy.machine import Processor
from coprs_deploy.specs import GRAPH_NAMES, IMAGE_ENCODER, MASK_DECODER, PRIOR, OptimizationProfile

RELATIVE_ERROR = 1e-4
"""float32 sums in another order; the demo model's graphs measure below 5e-6."""


@pytest.fixture(scope="module")
def bundle(tiny_bundle):
    return open_bundle(tiny_bundle)


@pytest.fixture(scope="module")
def open_tiny(bundle):
    """Open a graph of the tiny bundle."""

    def opener(name, options=None):
        spec = bundle.manifest.graphs[name].spec
        path = bundle.graph_path(name)
        return openvino_runner.open_graph(path, spec, options or RunnerOptions())

    return opener


def inputs_of(spec, seed=0, targets=1):
    generator = np.random.default_rng(seed)
    inputs = {}
    for tensor in spec.inputs:
        shape = tuple(targets if isinstance(size, str) else size for size in tensor.shape)
        inputs[tensor.name] = (
            generator.standard_normal(shape, dtype=np.float32)
            if tensor.dtype == "float32"
            else np.array([82, 128], dtype=np.int64)
        )
    return inputs


def compiled(runner):
    """OpenVINO's own object behind a runner with one target."""
    return runner._compiled_for(1).compiled


def assert_close(found, expected):
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert np.abs(found - expected).max() <= RELATIVE_ERROR * np.abs(expected).max()


@pytest.mark.parametrize("name", GRAPH_NAMES)
def test_graph_outputs_equal_the_pytorch_module(name, open_tiny, tiny_checkpoint):
    module = load_segmentation_model(read_checkpoint(tiny_checkpoint)).graph_modules()[name]
    with open_tiny(name) as runner:
        inputs = inputs_of(runner.spec)
        (found,) = runner(**dict(reversed(inputs.items()))).values()
        (expected,) = TorchRunner(module, runner.spec)(**inputs).values()
    assert_close(found.numpy(), expected.numpy())


@pytest.mark.parametrize("name", GRAPH_NAMES)
@pytest.mark.parametrize("model", ["tiny", "demo"])
def test_graph_outputs_equal_onnx_runtime(model, name, bundle):
    opened = bundle if model == "tiny" else open_bundle(demo.BUNDLE)
    path, spec = opened.graph_path(name), opened.manifest.graphs[name].spec
    with (
        openvino_runner.open_graph(path, spec, RunnerOptions()) as ours,
        onnxruntime_runner.open_graph(path, spec, RunnerOptions()) as theirs,
    ):
        inputs = inputs_of(spec)
        (found,), (expected,) = ours(**inputs).values(), theirs(**inputs).values()
    assert_close(found.numpy(), expected.numpy())


def test_threads_are_not_bound_to_cores_also_from_the_cache(open_tiny, tmp_path):
    for _ in range(2):
        with open_tiny(PRIOR, RunnerOptions(cache_dir=tmp_path)) as runner:
            assert compiled(runner).get_property("ENABLE_CPU_PINNING") is False


@pytest.mark.slow
def test_several_targets_equal_one_at_a_time(tiny_checkpoint, tmp_path):
    options = ExportOptions(runtime="openvino", targets=OptimizationProfile(1, 2, 4))
    bundle = export_checkpoint(tiny_checkpoint, tmp_path / "bundle", options).bundle
    assert {graph.runtime for graph in bundle.manifest.graphs.values()} == {"openvino"}
    for name in (PRIOR, MASK_DECODER):
        spec = bundle.manifest.graphs[name].spec
        with openvino_runner.open_graph(bundle.graph_path(name), spec, RunnerOptions()) as runner:
            for targets in (3, 1, 4):
                inputs = inputs_of(spec, targets=targets)
                (together,) = runner(**inputs).values()
                for n in range(targets):
                    single = {
                        k: v[n : n + 1] if k in ("concentration", "prior_logits") else v
                        for k, v in inputs.items()
                    }
                    (alone,) = runner(**single).values()
                    assert_close(together.numpy()[n : n + 1], alone.numpy())


def test_an_output_outlives_its_runner_and_the_next_call(open_tiny):
    runner = open_tiny(PRIOR)
    first = runner(**inputs_of(runner.spec))["prior_logits"]
    kept = first.numpy().copy()
    second = runner(**inputs_of(runner.spec, seed=1))["prior_logits"]
    runner.close()
    del runner
    gc.collect()
    assert np.array_equal(first.numpy(), kept)
    assert not np.array_equal(second.numpy(), kept)


def test_a_strided_input_gives_the_same_output(open_tiny):
    with open_tiny(IMAGE_ENCODER) as runner:
        inputs = inputs_of(runner.spec)
        expected = runner(**inputs)["image_embedding"].numpy()
        strided = {"image": np.asfortranarray(inputs["image"])}
        assert np.array_equal(runner(**strided)["image_embedding"].numpy(), expected)


def test_calls_from_several_threads_do_not_mix(open_tiny):
    with open_tiny(PRIOR) as runner:
        requests = [inputs_of(runner.spec, seed) for seed in range(4)]
        expected = [runner(**request)["prior_logits"].numpy() for request in requests]

        def run(i):
            return runner(**requests[i % 4])["prior_logits"].numpy()

        with ThreadPoolExecutor(4) as pool:
            for i, found in enumerate(pool.map(run, range(40))):
                assert np.array_equal(found, expected[i % 4])
    assert not np.array_equal(expected[0], expected[1])


def test_num_threads_and_precision_are_set(open_tiny):
    with open_tiny(PRIOR, RunnerOptions(num_threads=1)) as runner:
        assert compiled(runner).get_property("INFERENCE_NUM_THREADS") == 1
        assert compiled(runner).get_property("INFERENCE_PRECISION_HINT") == openvino.Type.f32


def test_the_description_names_runtime_version_and_device(open_tiny):
    version = openvino.__version__.split("-")[0]
    with open_tiny(PRIOR) as runner:
        assert runner.description == f"openvino {version} on cpu"


def test_an_unsupported_precision_raises(open_tiny, monkeypatch):
    monkeypatch.setattr(openvino_runner, "inference_precisions", lambda: ["fp32"])
    with pytest.raises(
        RuntimeUnavailableError, match=r"'bf16'.*does not support.*accepted here: fp32"
    ):
        open_tiny(PRIOR, RunnerOptions(inference_precision="bf16"))


def test_bfloat16_on_a_supporting_processor_is_set(open_tiny, monkeypatch):
    monkeypatch.setattr(openvino_runner, "inference_precisions", lambda: ["fp32", "bf16"])
    with open_tiny(PRIOR, RunnerOptions(inference_precision="bf16")) as runner:
        assert runner._settings["INFERENCE_PRECISION_HINT"] == "bf16"
        assert runner.description.endswith(", bf16")


def test_the_second_opening_loads_the_compiled_graph(open_tiny, tmp_path):
    options = RunnerOptions(cache_dir=tmp_path)
    for is_cached in (False, True):
        with open_tiny(PRIOR, options) as runner:
            assert compiled(runner).get_property("LOADED_FROM_CACHE") is is_cached


def test_changed_weights_in_the_same_file_are_compiled_again(bundle, tmp_path):
    path, spec = tmp_path / "prior.onnx", bundle.manifest.graphs[PRIOR].spec
    shutil.copy(bundle.graph_path(PRIOR), path)
    options, inputs = RunnerOptions(cache_dir=tmp_path / "cache"), inputs_of(spec)
    with openvino_runner.open_graph(path, spec, options) as runner:
        first = runner(**inputs)["prior_logits"].numpy()
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) > 1:
            values = onnx.numpy_helper.to_array(tensor)
            tensor.CopyFrom(onnx.numpy_helper.from_array(-values, tensor.name))
    size = path.stat().st_size
    onnx.save(model, path)
    assert path.stat().st_size == size
    with (
        openvino_runner.open_graph(path, spec, options) as runner,
        onnxruntime_runner.open_graph(path, spec, options) as other,
    ):
        assert compiled(runner).get_property("LOADED_FROM_CACHE") is False
        second = runner(**inputs)["prior_logits"].numpy()
        assert_close(second, other(**inputs)["prior_logits"].numpy())
    assert np.abs(second - first).max() > 100 * RELATIVE_ERROR * np.abs(first).max()


def test_a_large_graph_is_not_cached(open_tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(openvino_runner, "CACHED_GRAPH_BYTES", 10)
    open_tiny(PRIOR, RunnerOptions(cache_dir=tmp_path / "cache")).close()
    assert not (tmp_path / "cache").exists()


def test_call_after_close_raises(open_tiny):
    runner = open_tiny(PRIOR)
    inputs = inputs_of(runner.spec)
    runner.close()
    with pytest.raises(AssertionError, match="the runner was closed"):
        runner(**inputs)


TWO_GRAPHS_AND_A_SIGNAL = """
import gc, os, signal, sys
from coprs_deploy.bundle import open_bundle
from coprs_deploy.engines import RunnerOptions, openvino_runner

bundle = open_bundle(sys.argv[1])
first, second = (
    openvino_runner.open_graph(bundle.graph_path(name), graph.spec, RunnerOptions())
    for name, graph in list(bundle.manifest.graphs.items())[:2]
)
del first
gc.collect()
del second
gc.collect()
signal.signal(signal.SIGTERM, lambda *_: print("handled"))
os.kill(os.getpid(), signal.SIGTERM)
"""


def test_a_signal_after_both_graphs_are_freed_is_handled(tiny_bundle):
    command = [sys.executable, "-c", TWO_GRAPHS_AND_A_SIGNAL, str(tiny_bundle)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr


@pytest.mark.parametrize("content", [b"", b"not a graph", None])
def test_open_graph_of_a_damaged_file_raises(bundle, tmp_path, content):
    path, spec = tmp_path / "prior.onnx", bundle.manifest.graphs[PRIOR].spec
    whole = bundle.graph_path(PRIOR).read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(BundleError, match=f"OpenVINO cannot open {path}"):
        openvino_runner.open_graph(path, spec, RunnerOptions())


def test_open_graph_of_a_missing_file_names_it(bundle, tmp_path):
    path = tmp_path / "missing.onnx"
    spec = bundle.manifest.graphs[PRIOR].spec
    with pytest.raises(BundleError, match=f"cannot open {path}"):
        openvino_runner.open_graph(path, spec, RunnerOptions())


def test_open_graph_on_cuda_raises(open_tiny):
    with pytest.raises(RuntimeUnavailableError, match=r"device is 'cuda'.*runtime onnxruntime"):
        open_tiny(PRIOR, RunnerOptions(device="cuda"))


def test_open_graph_without_the_library_names_the_pip_command(open_tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingDependencyError) as caught:
        open_tiny(PRIOR)
    assert str(caught.value) == f"OpenVINO is not installed; {install_hint('edge')}"
    (missing,) = openvino_runner.availability()
    assert not missing.is_available
    assert missing.remedy == install_hint("edge")


def test_availability_reports_version_and_precisions(monkeypatch):
    version = openvino.__version__.split("-")[0]
    monkeypatch.setattr(openvino_runner, "inference_precisions", lambda: ["fp32", "bf16"])
    for units, precisions in ((("avx2",), "fp32, bf16"), (("avx_vnni",), "fp32, bf16, int8")):
        processor = Processor("a processor", units, 2)
        monkeypatch.setattr(openvino_runner, "describe_processor", lambda it=processor: it)
        (found,) = openvino_runner.availability()
        assert (found.name, found.is_available) == ("openvino cpu", True)
        assert found.detail == f"{version}, {precisions}"
