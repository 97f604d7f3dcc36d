"""ONNX Runtime behind the common call signature: on the requested device, or an error."""

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
from coprs_deploy.errors import (
    BundleError,
    MissingDependencyError,
    RuntimeUnavailableError,
    install_hint,
)
from coprs_deploy.specs import GRAPH_NAMES, IMAGE_ENCODER, MASK_DECODER, PRIOR

RELATIVE_ERROR = 1e-4
"""float32 sums in another order; the export of the same graphs measured below 1e-6."""


@pytest.fixture(scope="module")
def bundle(tiny_bundle):
    return open_bundle(tiny_bundle)


@pytest.fixture(scope="module")
def open_tiny(bundle):
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
def test_graph_outputs_equal_the_pytorch_module(name, open_tiny, tiny_checkpoint):
    module = load_segmentation_model(read_checkpoint(tiny_checkpoint)).graph_modules()[name]
    with open_tiny(name) as runner:
        inputs = inputs_of(runner.spec)
        found = runner(**dict(reversed(inputs.items())))
        expected = TorchRunner(module, runner.spec)(**inputs)
    assert found.keys() == expected.keys()
    for output, tensor in found.items():
        reference = expected[output].numpy()
        assert (tensor.shape, tensor.dtype) == (reference.shape, "float32")
        limit = RELATIVE_ERROR * np.abs(reference).max()
        assert np.abs(tensor.numpy() - reference).max() <= limit


def test_an_embedding_as_input_is_not_copied_to_the_host(open_tiny, monkeypatch):
    with open_tiny(IMAGE_ENCODER) as encoder, open_tiny(PRIOR) as prior:
        embedding = encoder(**inputs_of(encoder.spec))["image_embedding"]
        inputs = inputs_of(prior.spec) | {"image_embedding": embedding.numpy()}
        expected = prior(**inputs)["prior_logits"].numpy()

        def refuse(self):
            raise AssertionError("the tensor was copied to the host")

        with monkeypatch.context() as patch:
            patch.setattr(OrtTensor, "numpy", refuse)
            output = prior(**{**inputs, "image_embedding": embedding})
        assert np.array_equal(output["prior_logits"].numpy(), expected)


def test_an_output_outlives_its_runner_and_the_next_call(open_tiny):
    runner = open_tiny(PRIOR)
    first = runner(**inputs_of(runner.spec))["prior_logits"]
    kept = first.numpy().copy()
    runner(**inputs_of(runner.spec, seed=1))
    runner.close()
    del runner
    gc.collect()
    assert np.array_equal(first.numpy(), kept)


def test_temporary_input_arrays_stay_alive_during_the_call(open_tiny, monkeypatch):
    created = []

    def copy_to_host(value):
        array = np.array(value)
        created.append(weakref.ref(array))
        return array

    class Watched:
        def __init__(self, session):
            self.session = session

        def io_binding(self):
            return self.session.io_binding()

        def run_with_iobinding(self, binding):
            getattr(binding, "_bound_inputs", {}).clear()  # older versions keep no references
            gc.collect()
            assert len(created) == 3
            assert all(array() is not None for array in created)
            self.session.run_with_iobinding(binding)

    monkeypatch.setattr(onnxruntime_runner, "host_array", copy_to_host)
    with open_tiny(MASK_DECODER) as runner:
        runner._session = Watched(runner._session)
        runner(**inputs_of(runner.spec))


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


def test_num_threads_is_set_on_the_session(open_tiny):
    runner = open_tiny(PRIOR, RunnerOptions(num_threads=1))
    assert runner._session.get_session_options().intra_op_num_threads == 1
    assert runner._session.get_providers() == ["CPUExecutionProvider"]
    runner.close()


def test_the_description_names_runtime_version_and_device(open_tiny):
    with open_tiny(PRIOR) as runner:
        assert runner.description == f"onnxruntime {onnxruntime.__version__} on cpu"


def test_call_with_a_wrong_input_raises(open_tiny):
    with open_tiny(PRIOR) as runner:
        inputs = inputs_of(runner.spec)
        with pytest.raises(ValueError, match=r"prior was given concentration as float32 \(2, 64\)"):
            runner(**{**inputs, "concentration": np.zeros((2, 64), dtype=np.float32)})
        with pytest.raises(ValueError, match=r"it takes image_embedding, concentration"):
            runner(concentration=inputs["concentration"])


def test_call_after_close_raises(open_tiny):
    runner = open_tiny(PRIOR)
    inputs = inputs_of(runner.spec)
    runner.close()
    with pytest.raises(AssertionError, match="the runner was closed"):
        runner(**inputs)


@pytest.mark.parametrize("content", [b"", b"not a graph", None])
def test_open_graph_of_a_damaged_file_raises(bundle, tmp_path, content):
    path = tmp_path / "prior.onnx"
    whole = bundle.graph_path(PRIOR).read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(BundleError, match=f"ONNX Runtime cannot open {path}"):
        onnxruntime_runner.open_graph(path, bundle.manifest.graphs[PRIOR].spec, RunnerOptions())


def test_open_graph_of_a_missing_file_names_it(bundle, tmp_path):
    path = tmp_path / "missing.onnx"
    with pytest.raises(BundleError, match=f"cannot open {path}"):
        onnxruntime_runner.open_graph(path, bundle.manifest.graphs[PRIOR].spec, RunnerOptions())


def test_open_graph_without_the_provider_names_the_pip_command(open_tiny, monkeypatch):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    with pytest.raises(RuntimeUnavailableError) as caught:
        open_tiny(PRIOR, RunnerOptions(device="cuda"))
    message = str(caught.value)
    assert "has no CUDAExecutionProvider here (it has CPUExecutionProvider)" in message
    assert message.endswith(install_hint("gpu,torch"))


def test_open_graph_with_a_silent_fallback_raises(open_tiny, monkeypatch):
    requested = []

    class FallenBack:
        def __init__(self, path, settings, providers, provider_options):
            requested.append((providers, provider_options))

        def get_providers(self):
            return ["CPUExecutionProvider"]

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    monkeypatch.setattr(onnxruntime, "InferenceSession", FallenBack)
    message = "could not start CUDAExecutionProvider and chose CPUExecutionProvider"
    for device in ("cuda", "cuda:1"):
        with pytest.raises(RuntimeUnavailableError, match=message):
            open_tiny(PRIOR, RunnerOptions(device=device))
    provider = ["CUDAExecutionProvider"]
    assert requested == [
        (provider, [{"use_tf32": "0"}]),
        (provider, [{"use_tf32": "0", "device_id": "1"}]),
    ]


@pytest.mark.parametrize(("device", "extra"), [("cpu", "cpu"), ("cuda", "gpu,torch")])
def test_open_graph_without_the_library_names_the_pip_command(
    open_tiny, monkeypatch, device, extra
):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependencyError) as caught:
        open_tiny(PRIOR, RunnerOptions(device=device))
    assert str(caught.value).startswith("ONNX Runtime is not installed; ")
    assert str(caught.value).endswith(install_hint(extra))


def test_availability_reports_each_provider(monkeypatch):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    cpu, cuda = onnxruntime_runner.availability()
    assert (cpu.name, cpu.is_available, cpu.remedy) == ("onnxruntime cpu", True, "")
    assert (cuda.name, cuda.is_available) == ("onnxruntime cuda", False)
    assert install_hint("gpu,torch") in cuda.remedy
    assert "is not included" in cuda.detail


def test_availability_without_the_library_names_the_pip_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    (missing,) = onnxruntime_runner.availability()
    assert not missing.is_available
    assert missing.remedy == install_hint("cpu")
