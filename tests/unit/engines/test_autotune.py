"""The fastest runtime by measurement: chosen, told, remembered, measured again on demand."""

import json

import msgspec
import pytest

from coprs_deploy.bundle import open_bundle
from coprs_deploy.engines import RunnerOptions
from coprs_deploy.engines import autotune as autotuning
from coprs_deploy.engines.autotune import RuntimeChoice, Timing, autotune, choice_key
from coprs_deploy.engines.cache import BuildCache
from coprs_deploy.errors import MissingDependencyError
from coprs_deploy.machine import Processor
from coprs_deploy.specs import GRAPH_NAMES, IMAGE_ENCODER, PRIOR


@pytest.fixture(scope="module")
def bundle(tiny_bundle):
    return open_bundle(tiny_bundle)


@pytest.fixture
def cache(tmp_path):
    return BuildCache(tmp_path)


@pytest.fixture
def times(monkeypatch):
    """Times in milliseconds by runtime, in place of measured ones; counts the trials."""
    table = {"onnxruntime": 10.0, "openvino": 5.0, "trials": 0}

    def timed(runtime, runner):
        table["trials"] += 1
        return Timing(runtime, table[runtime], 3)

    monkeypatch.setattr(autotuning, "_time", timed)
    return table


def test_both_runtimes_are_really_measured(bundle, cache):
    steps = []
    choices = autotune(bundle, RunnerOptions(), cache=cache, report=steps.append)
    assert list(choices) == list(GRAPH_NAMES)
    for name, choice in choices.items():
        assert [trial.runtime for trial in choice.trials] == ["onnxruntime", "openvino"]
        assert all(trial.median_ms > 0 and trial.runs >= 1 for trial in choice.trials)
        assert choice.runtime in ("onnxruntime", "openvino")
        assert (choice.graph, choice.is_cached) == (name, False)
    assert steps[:2] == ["time image_encoder on onnxruntime", "time image_encoder on openvino"]


@pytest.mark.parametrize(
    ("openvino_ms", "chosen", "reason"),
    [
        (5.0, "openvino", "measured as the fastest"),
        (9.7, "onnxruntime", "the bundle's own, and none is more than 5% faster"),
        (20.0, "onnxruntime", "measured as the fastest"),
    ],
)
def test_the_fastest_is_chosen_and_a_tie_stays(bundle, cache, times, openvino_ms, chosen, reason):
    times["openvino"] = openvino_ms
    choice = autotune(bundle, RunnerOptions(), cache=cache)[IMAGE_ENCODER]
    assert (choice.runtime, choice.reason) == (chosen, reason)
    told = f"image_encoder: {chosen}, {reason}: onnxruntime 10.00 ms, openvino {openvino_ms:.2f} ms"
    assert str(choice) == told


def test_a_choice_is_remembered_and_says_so(bundle, cache, times):
    first = autotune(bundle, RunnerOptions(), cache=cache)
    times["onnxruntime"] = 1.0
    second = autotune(bundle, RunnerOptions(), cache=cache)
    assert times["trials"] == 2 * len(GRAPH_NAMES)
    for name, choice in second.items():
        assert choice == msgspec.structs.replace(first[name], is_cached=True)
        assert str(choice).endswith(f" (remembered from {choice.measured})")


def test_measuring_again_replaces_what_was_remembered(bundle, cache, times):
    autotune(bundle, RunnerOptions(), cache=cache)
    times["onnxruntime"] = 1.0
    assert autotune(bundle, RunnerOptions(), True, cache)[PRIOR].runtime == "onnxruntime"
    kept = autotune(bundle, RunnerOptions(), cache=cache)[PRIOR]
    assert (kept.runtime, kept.is_cached) == ("onnxruntime", True)


def test_a_choice_that_cannot_be_read_is_measured_anew(bundle, cache, times):
    key = choice_key(bundle, PRIOR, RunnerOptions())
    for content in (b"{", json.dumps({"graph": PRIOR}).encode()):
        cache.save_blob(autotuning.FOLDER, key, content)
        assert not autotune(bundle, RunnerOptions(), cache=cache)[PRIOR].is_cached


def test_whatever_changes_the_times_changes_the_key(bundle, monkeypatch):
    keys = [
        choice_key(bundle, IMAGE_ENCODER, RunnerOptions()),
        choice_key(bundle, PRIOR, RunnerOptions()),
        choice_key(bundle, IMAGE_ENCODER, RunnerOptions(num_threads=1)),
        choice_key(bundle, IMAGE_ENCODER, RunnerOptions(device="cuda")),
        choice_key(bundle, IMAGE_ENCODER, RunnerOptions(inference_precision="bf16")),
    ]
    with monkeypatch.context() as patch:
        patch.setattr(autotuning, "installed_versions", lambda: {"openvino": "1"})
        keys.append(choice_key(bundle, IMAGE_ENCODER, RunnerOptions()))
    with monkeypatch.context() as patch:
        other = Processor("another", (), 2)
        patch.setattr(autotuning, "describe_processor", lambda: other)
        keys.append(choice_key(bundle, IMAGE_ENCODER, RunnerOptions()))
    files = tuple(msgspec.structs.replace(file, sha256="0" * 64) for file in bundle.manifest.files)
    changed = msgspec.structs.replace(bundle.manifest, files=files)
    keys.append(choice_key(type(bundle)(bundle.path, changed), IMAGE_ENCODER, RunnerOptions()))
    assert len(set(keys)) == len(keys)
    assert choice_key(bundle, IMAGE_ENCODER, RunnerOptions()) == keys[0]


def test_a_runtime_that_is_not_installed_is_a_row_with_its_reason(
    bundle, cache, times, monkeypatch
):
    opened = autotuning.open_bundle_graph

    def without_openvino(bundle, name, options, runtime):
        if runtime == "openvino":
            raise MissingDependencyError("OpenVINO is not installed")
        return opened(bundle, name, options, runtime)

    monkeypatch.setattr(autotuning, "open_bundle_graph", without_openvino)
    choice = autotune(bundle, RunnerOptions(), cache=cache)[PRIOR]
    assert (choice.runtime, choice.reason) == ("onnxruntime", "the only one that runs here")
    assert choice.trials[1] == Timing("openvino", None, problem="OpenVINO is not installed")
    assert "openvino did not run (OpenVINO is not installed)" in str(choice)


def test_no_runtime_at_all_is_the_error_of_the_first(bundle, cache, monkeypatch):
    def refuse(bundle, name, options, runtime):
        raise MissingDependencyError(f"{runtime} is not installed")

    monkeypatch.setattr(autotuning, "open_bundle_graph", refuse)
    with pytest.raises(MissingDependencyError, match="onnxruntime is not installed"):
        autotune(bundle, RunnerOptions(), cache=cache)


def test_an_engine_has_nothing_to_choose_from(bundle, cache, times):
    graphs = {
        name: msgspec.structs.replace(graph, runtime="tensorrt")
        for name, graph in bundle.manifest.graphs.items()
    }
    engines = type(bundle)(bundle.path, msgspec.structs.replace(bundle.manifest, graphs=graphs))
    choice = autotune(engines, RunnerOptions(), cache=cache)[PRIOR]
    assert choice == RuntimeChoice(PRIOR, "tensorrt", "the only runtime of an engine")
    assert times["trials"] == 0
