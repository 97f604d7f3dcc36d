"""ONNX Runtime behind the common call signature: on the asked device, or an error."""

import gc
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnxruntime
import pytest

from coprs_deploy.bundle import open_bundle
from coprs_deploy.checkpoint import load_segmentation_model, read_checkpoint
from coprs_deploy.engines import RunnerOptions, onnxruntime_runner
from coprs_deploy.engines.onnxruntime_runner import OrtTensor
from coprs_deploy.engines.torch_runner import TorchRunner
from coprs_deploy.errors import BundleError, MissingDependencyError, RuntimeUnavailableError
from coprs_deploy.specs import GRAPH_NAMES, IMAGE_ENCODER, MASK_DECODER, PRIOR

RELATIVE = 1e-4
"""Float32 sums in another order; the export of the same graphs measured below 1e-6."""


@pytest.fixture(scope="module")
def bundle(tiny_bundle):
    return open_bundle(tiny_bundle)


@pytest.fixture(scope="module")
def open_stage(bundle):
    """Open a graph of the tiny bundle."""

    def opener(name, options=None):
        spec = bundle.manifest.graphs[name].spec
        path = bundle.graph_path(name)
        return onnxruntime_runner.open_graph(path, spec, options or RunnerOptions())

    return opener


def inputs_of(spec, seed=0):
    generator = np.random.default_rng(seed)
    drawn = {
        t.name: generator.standard_normal(t.shape, dtype=np.float32)
        for t in spec.inputs
        if t.dtype == "float32"
    }
    if len(drawn) < len(spec.inputs):
        drawn["unpadded_size"] = np.array([82, 128], dtype=np.int64)
    return drawn


@pytest.mark.parametrize("name", GRAPH_NAMES)
def test_a_graph_computes_what_the_module_computes(name, open_stage, tiny_checkpoint):
    module = load_segmentation_model(read_checkpoint(tiny_checkpoint)).graph_modules()[name]
    with open_stage(name) as runner:
        inputs = inputs_of(runner.spec)
        found = runner(**dict(reversed(inputs.items())))
        expected = TorchRunner(module, runner.spec)(**inputs)
    assert found.keys() == expected.keys()
    for output, tensor in found.items():
        truth = expected[output].numpy()
        assert (tensor.shape, tensor.dtype) == (truth.shape, "float32")
        assert np.abs(tensor.numpy() - truth).max() <= RELATIVE * np.abs(truth).max()


def test_an_embedding_goes_from_graph_to_graph_without_a_copy(open_stage, monkeypatch):
    with open_stage(IMAGE_ENCODER) as encoder, open_stage(PRIOR) as prior:
        embedding = encoder(**inputs_of(encoder.spec))["image_embedding"]
        inputs = inputs_of(prior.spec) | {"image_embedding": embedding.numpy()}
        expected = prior(**inputs)["prior_logits"].numpy()

        def refuse(self):
            raise AssertionError("the tensor was brought to the host")

        with monkeypatch.context() as patch:
            patch.setattr(OrtTensor, "numpy", refuse)
            output = prior(**{**inputs, "image_embedding": embedding})
        assert np.array_equal(output["prior_logits"].numpy(), expected)


def test_an_output_outlives_its_runner_and_the_next_call(open_stage):
    runner = open_stage(PRIOR)
    first = runner(**inputs_of(runner.spec))["prior_logits"]
    kept = first.numpy().copy()
    runner(**inputs_of(runner.spec, seed=1))
    runner.close()
    del runner
    gc.collect()
    assert np.array_equal(first.numpy(), kept)


def test_arrays_that_are_made_for_the_call_stay_alive_during_it(open_stage, monkeypatch):
    made = []

    def copy_to_host(value):
        array = np.array(value)
        made.append(weakref.ref(array))
        return array

    class Watched:
        def __init__(self, session):
            self.session = session

        def io_binding(self):
            return self.session.io_binding()

        def run_with_iobinding(self, binding):
            getattr(binding, "_bound_inputs", {}).clear()  # older versions keep nothing there
            gc.collect()
            assert len(made) == 3
            assert all(array() is not None for array in made)
            self.session.run_with_iobinding(binding)

    monkeypatch.setattr(onnxruntime_runner, "host_array", copy_to_host)
    with open_stage(MASK_DECODER) as runner:
        runner._session = Watched(runner._session)
        runner(**inputs_of(runner.spec))


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


def test_the_number_of_threads_is_passed_on(open_stage):
    runner = open_stage(PRIOR, RunnerOptions(num_threads=1))
    assert runner._session.get_session_options().intra_op_num_threads == 1
    assert runner._session.get_providers() == ["CPUExecutionProvider"]
    runner.close()


def test_the_description_names_runtime_version_and_device(open_stage):
    with open_stage(PRIOR) as runner:
        assert runner.description == f"onnxruntime {onnxruntime.__version__} on cpu"


def test_a_wrong_input_is_refused_before_the_session_runs(open_stage):
    with open_stage(PRIOR) as runner:
        inputs = inputs_of(runner.spec)
        with pytest.raises(ValueError, match=r"prior was given concentration as float32 \(2, 64\)"):
            runner(**{**inputs, "concentration": np.zeros((2, 64), dtype=np.float32)})
        with pytest.raises(ValueError, match=r"it takes image_embedding, concentration"):
            runner(concentration=inputs["concentration"])


def test_a_closed_runner_is_not_called_again(open_stage):
    runner = open_stage(PRIOR)
    inputs = inputs_of(runner.spec)
    runner.close()
    with pytest.raises(AssertionError, match="the runner was closed"):
        runner(**inputs)


@pytest.mark.parametrize("content", [b"", b"not a graph", None])
def test_a_file_that_is_no_graph_is_refused(bundle, tmp_path, content):
    path = tmp_path / "prior.onnx"
    whole = bundle.graph_path(PRIOR).read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(BundleError, match=f"ONNX Runtime cannot open {path}"):
        onnxruntime_runner.open_graph(path, bundle.manifest.graphs[PRIOR].spec, RunnerOptions())


def test_a_missing_file_is_named(bundle, tmp_path):
    path = tmp_path / "absent.onnx"
    with pytest.raises(BundleError, match=f"cannot open {path}"):
        onnxruntime_runner.open_graph(path, bundle.manifest.graphs[PRIOR].spec, RunnerOptions())


def test_a_device_without_its_provider_is_refused_with_the_pip_line(open_stage, monkeypatch):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    with pytest.raises(RuntimeUnavailableError) as caught:
        open_stage(PRIOR, RunnerOptions(device="cuda"))
    message = str(caught.value)
    assert "has no CUDAExecutionProvider here (it has CPUExecutionProvider)" in message
    assert message.endswith('pip install "coprs-deploy[gpu]"')


def test_a_provider_that_silently_falls_back_is_an_error(open_stage, monkeypatch):
    asked = []

    class FallenBack:
        def __init__(self, path, settings, providers, provider_options):
            asked.append((providers, provider_options))

        def get_providers(self):
            return ["CPUExecutionProvider"]

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    monkeypatch.setattr(onnxruntime, "InferenceSession", FallenBack)
    message = "could not start CUDAExecutionProvider and chose CPUExecutionProvider"
    for device in ("cuda", "cuda:1"):
        with pytest.raises(RuntimeUnavailableError, match=message):
            open_stage(PRIOR, RunnerOptions(device=device))
    provider = ["CUDAExecutionProvider"]
    assert asked == [
        (provider, [{"use_tf32": "0"}]),
        (provider, [{"use_tf32": "0", "device_id": "1"}]),
    ]


@pytest.mark.parametrize(("device", "extra"), [("cpu", "cpu"), ("cuda", "gpu")])
def test_a_missing_library_ends_in_the_pip_line(open_stage, monkeypatch, device, extra):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependencyError) as caught:
        open_stage(PRIOR, RunnerOptions(device=device))
    assert str(caught.value).startswith("ONNX Runtime is not installed; ")
    assert str(caught.value).endswith(f'pip install "coprs-deploy[{extra}]"')


def test_availability_names_each_device_and_what_is_lacking(monkeypatch):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    cpu, cuda = onnxruntime_runner.availability()
    assert (cpu.name, cpu.is_available, cpu.remedy) == ("onnxruntime cpu", True, "")
    assert (cuda.name, cuda.is_available) == ("onnxruntime cuda", False)
    assert 'pip install "coprs-deploy[gpu]"' in cuda.remedy
    assert "is not in it" in cuda.detail


def test_availability_without_the_library_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    (missing,) = onnxruntime_runner.availability()
    assert not missing.is_available
    assert missing.remedy == 'pip install "coprs-deploy[cpu]"'
