"""Which runtime opens each graph: the bundle's own, the asked one, or the measured one."""

import logging

import pytest

from coprs_deploy.bundle import open_bundle
from coprs_deploy.engines.autotune import RuntimeChoice
from coprs_deploy.errors import RuntimeUnavailableError
from coprs_deploy.runtime import CoPRS, RuntimeOptions, loading
from coprs_deploy.runtime.loading import open_graphs, resolve_runtimes
from coprs_deploy.specs import GRAPH_NAMES, IMAGE_ENCODER


@pytest.fixture(scope="module")
def bundle(tiny_bundle):
    return open_bundle(tiny_bundle)


@pytest.fixture
def measured(monkeypatch):
    """Choices in place of measured ones: OpenVINO for the image encoder."""
    asked = {}

    def choose(bundle, options, retune, report):
        asked.update(options=options, retune=retune)
        return {
            name: RuntimeChoice(
                name, "openvino" if name == IMAGE_ENCODER else "onnxruntime", "for a test"
            )
            for name in GRAPH_NAMES
        }

    monkeypatch.setattr(loading, "autotune", choose)
    return asked


def runtimes(stages):
    return [runner.description.split()[0] for runner in stages.runners.values()]


@pytest.mark.parametrize(
    ("runtime", "opened"),
    [(None, "onnxruntime"), ("onnxruntime", "onnxruntime"), ("openvino", "openvino")],
)
def test_the_runtime_that_was_asked_for_opens_every_graph(bundle, runtime, opened):
    options = RuntimeOptions(runtime=runtime)
    assert resolve_runtimes(bundle, options) == ()
    with open_graphs(bundle, options) as stages:
        assert runtimes(stages) == [opened] * 3


def test_auto_opens_what_was_measured_and_tells_it(tiny_bundle, measured, scene, caplog):
    options = RuntimeOptions(runtime="auto", retune=True, num_threads=1)
    with caplog.at_level(logging.INFO), CoPRS.load(tiny_bundle, options) as coprs:
        assert runtimes(coprs._stages) == ["openvino", "onnxruntime", "onnxruntime"]
        assert [choice.graph for choice in coprs.choices] == list(GRAPH_NAMES)
        answer = coprs.segment(scene, "the red disc")
    assert answer.found
    assert "openvino" in answer.runtime
    assert "onnxruntime" in answer.runtime
    assert "image_encoder: openvino, for a test" in caplog.messages
    assert (measured["options"].num_threads, measured["retune"]) == (1, True)


@pytest.mark.parametrize("runtime", ["tensorrt", "openvin0"])
def test_a_runtime_that_cannot_run_the_graphs_is_refused(bundle, runtime):
    message = (
        f"runtime is '{runtime}'.*exported for onnxruntime in fp32; accepted: onnxruntime, openvino"
    )
    with pytest.raises(ValueError, match=message):
        open_graphs(bundle, RuntimeOptions(runtime=runtime))


def test_bfloat16_needs_a_runtime_that_computes_in_it(bundle):
    with pytest.raises(ValueError, match=r"'bf16', and onnxruntime computes in the precision"):
        open_graphs(bundle, RuntimeOptions(inference_precision="bf16"))


def test_graphs_that_were_opened_are_closed_when_another_cannot_be(bundle, monkeypatch):
    closed = []
    opened = loading.open_bundle_graph

    def failing(bundle, name, options, runtime):
        if name == GRAPH_NAMES[-1]:
            raise RuntimeUnavailableError("no more")
        runner = opened(bundle, name, options, runtime)
        monkeypatch.setattr(runner, "close", lambda: closed.append(name))
        return runner

    monkeypatch.setattr(loading, "open_bundle_graph", failing)
    with pytest.raises(RuntimeUnavailableError, match="no more"):
        open_graphs(bundle, RuntimeOptions())
    assert closed == list(reversed(GRAPH_NAMES[:-1]))
