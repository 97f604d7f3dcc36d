"""Runtime of each graph: the bundle's own, a requested one, or the measured one."""

import logging
from concurrent.futures import CancelledError

import pytest
import torch

from coprs_deploy import demo
from coprs_deploy.bundle import open_bundle
from coprs_deploy.engines.autotune import RuntimeChoice
from coprs_deploy.engines.onnxruntime_runner import OrtRunner
from coprs_deploy.errors import RuntimeUnavailableError
from coprs_deploy.policy.torch_settings import torch_threads
from coprs_deploy.policy.vllm_policy.settings import VllmSettings
from coprs_deploy.runtime import CoPRS, RuntimeOptions, loading
from coprs_deploy.runtime.loading import choose_runtimes, open_graphs
from coprs_deploy.specs import GRAPH_NAMES, IMAGE_ENCODER


@pytest.fixture(scope="module")
def bundle(tiny_bundle):
    return open_bundle(tiny_bundle)


@pytest.fixture
def measured(monkeypatch):
    """Fake measurement: OpenVINO for the image encoder; records the arguments of autotune."""
    arguments = {}

    def autotune(bundle, options, retune, progress):
        arguments.update(options=options, retune=retune)
        return {
            name: RuntimeChoice(
                name, "openvino" if name == IMAGE_ENCODER else "onnxruntime", "for a test"
            )
            for name in GRAPH_NAMES
        }

    monkeypatch.setattr(loading, "autotune", autotune)
    return arguments


@pytest.mark.parametrize(
    ("runtime", "opened"),
    [(None, "onnxruntime"), ("onnxruntime", "onnxruntime"), ("openvino", "openvino")],
)
def test_open_graphs_uses_the_requested_runtime(bundle, runtime, opened):
    options = RuntimeOptions(runtime=runtime)
    assert choose_runtimes(bundle, options) == ()
    with open_graphs(bundle, options) as graphs:
        descriptions = [runner.description for runner in graphs.runners.values()]
    assert [description.split()[0] for description in descriptions] == [opened] * 3


def test_load_with_auto_opens_and_logs_the_measured_runtimes(
    tiny_bundle, measured, scene, caplog, tmp_path
):
    options = RuntimeOptions(runtime="auto", retune=True, num_threads=1, cache_dir=tmp_path)
    with caplog.at_level(logging.INFO), CoPRS.load(tiny_bundle, options) as coprs:
        assert coprs.description.startswith("graphs: openvino")
        assert " + onnxruntime" in coprs.description
        assert [choice.graph for choice in coprs.runtime_choices] == list(GRAPH_NAMES)
        result = coprs.segment(scene, "the red disc")
    assert result.found
    assert result.runtime == coprs.description
    assert "image_encoder: openvino, for a test" in caplog.messages
    assert (measured["options"].num_threads, measured["retune"]) == (1, True)
    assert measured["options"].cache_dir == tmp_path


@pytest.mark.parametrize("runtime", ["tensorrt", "openvin0"])
def test_open_graphs_unsuitable_runtime_is_refused(bundle, runtime):
    message = (
        f"runtime is '{runtime}'.*exported for onnxruntime in fp32; accepted: onnxruntime, openvino"
    )
    with pytest.raises(ValueError, match=message):
        open_graphs(bundle, RuntimeOptions(runtime=runtime))


def test_open_graphs_bf16_on_a_runtime_without_it_is_refused(bundle):
    with pytest.raises(ValueError, match=r"'bf16', and onnxruntime computes in the precision"):
        open_graphs(bundle, RuntimeOptions(inference_precision="bf16"))


def test_open_graphs_failure_closes_the_graphs_before_it(bundle, monkeypatch):
    closed = []
    open_bundle_graph = loading.open_bundle_graph

    def failing(bundle, name, options, runtime):
        if name == GRAPH_NAMES[-1]:
            raise RuntimeUnavailableError("no more")
        runner = open_bundle_graph(bundle, name, options, runtime)
        monkeypatch.setattr(runner, "close", lambda: closed.append(name))
        return runner

    monkeypatch.setattr(loading, "open_bundle_graph", failing)
    with pytest.raises(RuntimeUnavailableError, match="no more"):
        open_graphs(bundle, RuntimeOptions())
    assert closed == list(reversed(GRAPH_NAMES[:-1]))


def test_open_graphs_that_cannot_be_fused_are_closed(monkeypatch):
    closed = []

    def failing(self, following):
        raise RuntimeUnavailableError("no memory for another stream")

    monkeypatch.setattr(OrtRunner, "fused_with", failing)
    monkeypatch.setattr(OrtRunner, "close", lambda self: closed.append(self.spec.name))
    with pytest.raises(RuntimeUnavailableError, match="no memory"):
        open_graphs(open_bundle(demo.BUNDLE), RuntimeOptions(runtime="onnxruntime"))
    assert closed == list(reversed(GRAPH_NAMES))


def test_load_passes_options_to_graphs_and_policy(tiny_bundle, scene, tmp_path, monkeypatch):
    opened = []
    open_bundle_graph = loading.open_bundle_graph

    def recording(bundle, name, options, runtime):
        opened.append(options)
        return open_bundle_graph(bundle, name, options, runtime)

    monkeypatch.setattr(loading, "open_bundle_graph", recording)
    options = RuntimeOptions(
        policy_dtype="bfloat16", num_threads=1, max_cached_images=0, cache_dir=tmp_path
    )
    with CoPRS.load(tiny_bundle, options) as coprs:
        assert coprs.description.endswith("bfloat16 (as requested)")
        assert coprs.segment(scene, "the red disc").found
        assert len(coprs._pipeline.cache) == 0
    assert len(opened) == 3
    assert {(o.num_threads, o.cache_dir) for o in opened} == {(1, tmp_path)}


@pytest.mark.parametrize(("num_threads", "expected"), [(None, 1), (1, 1), (3, 3)])
def test_load_num_threads_reaches_graphs_and_every_step_of_the_policy(
    tiny_bundle, scene, num_threads, expected
):
    found = []
    with CoPRS.load(tiny_bundle, RuntimeOptions(num_threads=num_threads)) as coprs:
        model = coprs._policy._model
        for module in (model.model, model.lm_head):
            module.register_forward_pre_hook(lambda *_: found.append(torch.get_num_threads()))
        with torch_threads(2):
            result = coprs.segment(scene, "the red disc")
            assert torch.get_num_threads() == 2
        sessions = [runner._session for runner in coprs._graphs.runners.values()]
    assert len(found) >= 2 * result.timings.response_tokens
    assert set(found) == {expected}
    assert {s.get_session_options().intra_op_num_threads for s in sessions} == {num_threads or 0}


@pytest.mark.parametrize(
    ("own", "shared", "expected"), [(None, None, None), (None, 3, 3), (2, 3, 2), (2, None, 2)]
)
def test_load_num_threads_reaches_the_vllm_worker_unless_it_has_its_own(
    tiny_bundle, monkeypatch, own, shared, expected
):
    settings = []

    class Stopped(Exception):
        pass

    def refuse(*arguments, **options):
        settings.append(options["settings"])
        raise Stopped

    monkeypatch.setattr("coprs_deploy.policy.vllm_policy.policy.VllmPolicy", refuse)
    options = RuntimeOptions(
        policy="vllm", num_threads=shared, vllm=VllmSettings(num_threads=own, max_num_seqs=3)
    )
    with pytest.raises(Stopped):
        CoPRS.load(tiny_bundle, options)
    assert settings == [VllmSettings(num_threads=expected, max_num_seqs=3)]


def test_load_with_an_error_of_the_graphs_does_not_start_vllm(tiny_bundle, monkeypatch):
    ended = []

    def waiting(*arguments, memory_is_ready, **options):
        try:
            memory_is_ready.result(timeout=20)
        except BaseException as error:
            ended.append(type(error))
            raise

    monkeypatch.setattr("coprs_deploy.policy.vllm_policy.policy.VllmPolicy", waiting)
    with pytest.raises(ValueError, match="runtime is 'tensorrt'"):
        CoPRS.load(tiny_bundle, RuntimeOptions(policy="vllm", runtime="tensorrt"))
    assert ended == [CancelledError]


def test_load_reports_its_progress(tiny_bundle):
    steps = []
    CoPRS.load(tiny_bundle, progress=steps.append).close()
    assert steps[:2] == [
        "verifying the bundle's files",
        "loading graphs and policy (transformers, the bundle has no graphs of the policy)",
    ]
    assert steps[2].startswith("graphs ready after")
    assert steps[3].startswith("policy ready after")
    assert "transformers qwen2_5_vl on cpu" in steps[3]
