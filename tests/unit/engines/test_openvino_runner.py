"""OpenVINO behind the common call signature: the same files, the same numbers, its own requests."""

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
from coprs_deploy.errors import BundleError, MissingDependencyError, RuntimeUnavailableError
from coprs_deploy.export import ExportOptions, export_checkpoint
from coprs_deploy.machine import Processor
from coprs_deploy.specs import GRAPH_NAMES, IMAGE_ENCODER, MASK_DECODER, PRIOR, OptimizationProfile

RELATIVE = 1e-4
"""Float32 sums in another order; the shipped model's graphs measure below 5e-6."""


@pytest.fixture(scope="module")
def bundles(tiny_bundle):
    return {"tiny": open_bundle(tiny_bundle), "shipped": open_bundle(demo.BUNDLE)}


@pytest.fixture(scope="module")
def open_stage(bundles):
    """Open a graph of the tiny bundle."""

    def opener(name, options=None):
        bundle = bundles["tiny"]
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
    assert np.abs(found - expected).max() <= RELATIVE * np.abs(expected).max()


@pytest.mark.parametrize("name", GRAPH_NAMES)
def test_a_graph_computes_what_the_module_computes(name, open_stage, tiny_checkpoint):
    module = load_segmentation_model(read_checkpoint(tiny_checkpoint)).graph_modules()[name]
    with open_stage(name) as runner:
        inputs = inputs_of(runner.spec)
        (found,) = runner(**dict(reversed(inputs.items()))).values()
        (expected,) = TorchRunner(module, runner.spec)(**inputs).values()
    assert_close(found.numpy(), expected.numpy())


@pytest.mark.parametrize("name", GRAPH_NAMES)
@pytest.mark.parametrize("model", ["tiny", "shipped"])
def test_a_graph_computes_what_onnx_runtime_computes(model, name, bundles):
    path, spec = bundles[model].graph_path(name), bundles[model].manifest.graphs[name].spec
    with (
        openvino_runner.open_graph(path, spec, RunnerOptions()) as ours,
        onnxruntime_runner.open_graph(path, spec, RunnerOptions()) as theirs,
    ):
        inputs = inputs_of(spec)
        (found,), (expected,) = ours(**inputs).values(), theirs(**inputs).values()
    assert_close(found.numpy(), expected.numpy())


def test_many_targets_equal_one_at_a_time(tiny_checkpoint, tmp_path):
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


def test_an_output_outlives_its_runner_and_the_next_call(open_stage):
    runner = open_stage(PRIOR)
    first = runner(**inputs_of(runner.spec))["prior_logits"]
    kept = first.numpy().copy()
    second = runner(**inputs_of(runner.spec, seed=1))["prior_logits"]
    runner.close()
    del runner
    gc.collect()
    assert np.array_equal(first.numpy(), kept)
    assert not np.array_equal(second.numpy(), kept)


def test_an_array_that_is_not_contiguous_is_read_right(open_stage):
    with open_stage(IMAGE_ENCODER) as runner:
        inputs = inputs_of(runner.spec)
        expected = runner(**inputs)["image_embedding"].numpy()
        strided = {"image": np.asfortranarray(inputs["image"])}
        assert np.array_equal(runner(**strided)["image_embedding"].numpy(), expected)


def test_calls_from_several_threads_do_not_mix(open_stage):
    with open_stage(PRIOR) as runner:
        questions = [inputs_of(runner.spec, seed) for seed in range(4)]
        expected = [runner(**question)["prior_logits"].numpy() for question in questions]

        def ask(i):
            return runner(**questions[i % 4])["prior_logits"].numpy()

        with ThreadPoolExecutor(4) as pool:
            for i, found in enumerate(pool.map(ask, range(40))):
                assert np.array_equal(found, expected[i % 4])
    assert not np.array_equal(expected[0], expected[1])


def test_threads_and_precision_are_passed_on(open_stage):
    with open_stage(PRIOR, RunnerOptions(num_threads=1)) as runner:
        assert compiled(runner).get_property("INFERENCE_NUM_THREADS") == 1
        assert compiled(runner).get_property("INFERENCE_PRECISION_HINT") == openvino.Type.f32


def test_the_description_names_runtime_version_and_device(open_stage):
    version = openvino.__version__.split("-")[0]
    with open_stage(PRIOR) as runner:
        assert runner.description == f"openvino {version} on cpu"


def test_a_precision_without_units_is_refused(open_stage, monkeypatch):
    monkeypatch.setattr(openvino_runner, "_precisions", lambda core: ["fp32"])
    with pytest.raises(RuntimeUnavailableError, match=r"'bf16'.*no units.*accepted here: fp32"):
        open_stage(PRIOR, RunnerOptions(inference_precision="bf16"))


def test_bfloat16_is_passed_on_where_the_processor_has_it(open_stage, monkeypatch):
    monkeypatch.setattr(openvino_runner, "_precisions", lambda core: ["fp32", "bf16"])
    with open_stage(PRIOR, RunnerOptions(inference_precision="bf16")) as runner:
        assert runner._settings["INFERENCE_PRECISION_HINT"] == "bf16"
        assert runner.description.endswith(", bf16")


def test_the_second_opening_takes_the_compiled_graph(open_stage, tmp_path):
    options = RunnerOptions(cache=tmp_path)
    for is_known in (False, True):
        with open_stage(PRIOR, options) as runner:
            assert compiled(runner).get_property("LOADED_FROM_CACHE") is is_known


def test_other_weights_under_the_same_name_are_not_taken_from_the_cache(bundles, tmp_path):
    path, spec = tmp_path / "prior.onnx", bundles["tiny"].manifest.graphs[PRIOR].spec
    shutil.copy(bundles["tiny"].graph_path(PRIOR), path)
    options, inputs = RunnerOptions(cache=tmp_path / "cache"), inputs_of(spec)
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
    assert np.abs(second - first).max() > 100 * RELATIVE * np.abs(first).max()


def test_a_large_graph_is_not_written_to_the_cache(open_stage, tmp_path, monkeypatch):
    monkeypatch.setattr(openvino_runner, "CACHED_GRAPH_BYTES", 10)
    open_stage(PRIOR, RunnerOptions(cache=tmp_path / "cache")).close()
    assert not (tmp_path / "cache").exists()


def test_a_closed_runner_is_not_called_again(open_stage):
    runner = open_stage(PRIOR)
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


def test_a_signal_is_survived_after_the_first_of_two_graphs_went_first(tiny_bundle):
    command = [sys.executable, "-c", TWO_GRAPHS_AND_A_SIGNAL, str(tiny_bundle)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr


@pytest.mark.parametrize("content", [b"", b"not a graph", None])
def test_a_file_that_is_no_graph_is_refused(bundles, tmp_path, content):
    path, spec = tmp_path / "prior.onnx", bundles["tiny"].manifest.graphs[PRIOR].spec
    whole = bundles["tiny"].graph_path(PRIOR).read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(BundleError, match=f"OpenVINO cannot open {path}"):
        openvino_runner.open_graph(path, spec, RunnerOptions())


def test_a_missing_file_is_named(bundles, tmp_path):
    path = tmp_path / "absent.onnx"
    spec = bundles["tiny"].manifest.graphs[PRIOR].spec
    with pytest.raises(BundleError, match=f"cannot open {path}"):
        openvino_runner.open_graph(path, spec, RunnerOptions())


def test_a_gpu_is_refused(open_stage):
    with pytest.raises(RuntimeUnavailableError, match=r"device is 'cuda'.*runtime onnxruntime"):
        open_stage(PRIOR, RunnerOptions(device="cuda"))


def test_a_missing_library_ends_in_the_pip_line(open_stage, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingDependencyError) as caught:
        open_stage(PRIOR)
    assert str(caught.value) == 'OpenVINO is not installed; pip install "coprs-deploy[openvino]"'
    (missing,) = openvino_runner.availability()
    assert not missing.is_available
    assert missing.remedy == 'pip install "coprs-deploy[openvino]"'


def test_availability_names_version_and_precisions(monkeypatch):
    version = openvino.__version__.split("-")[0]
    monkeypatch.setattr(openvino_runner, "_precisions", lambda core: ["fp32", "bf16"])
    for units, precisions in ((("avx2",), "fp32, bf16"), (("avx_vnni",), "fp32, bf16, int8")):
        processor = Processor("a processor", units, 2)
        monkeypatch.setattr(openvino_runner, "describe_processor", lambda it=processor: it)
        (found,) = openvino_runner.availability()
        assert (found.name, found.is_available) == ("openvino cpu", True)
        assert found.detail == f"{version}, {precisions}"
