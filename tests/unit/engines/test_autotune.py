"""Choosing the fastest runtime: measurement, ties, failures, and the cached choice."""

import json

import msgspec
import pytest

from coprs_deploy.bundle import open_bundle
from coprs_deploy.engines import RunnerOptions
from coprs_deploy.engines import autotune as autotuning
from coprs_deploy.engines.autotune import (
    RuntimeChoice,
    Timing,
    autotune,
    choice_key,
    choose_fastest,
)
from coprs_deploy.engines.cache import Cache
from coprs_deploy.errors import MissingDependencyError
from coprs_deploy.machine import Processor
from coprs_deploy.specs import GRAPH_NAMES, IMAGE_ENCODER, PRIOR


@pytest.fixture(scope="module")
def bundle(tiny_bundle):
    return open_bundle(tiny_bundle)


@pytest.fixture
def options(tmp_path):
    return RunnerOptions(cache_dir=tmp_path)


@pytest.fixture
def times(monkeypatch):
    """Latencies in milliseconds by runtime instead of measured ones, and their number."""
    table = {"onnxruntime": 10.0, "openvino": 5.0, "measurements": 0}

    def timed(runtime, runner):
        table["measurements"] += 1
        return Timing(runtime, table[runtime], 3)

    monkeypatch.setattr(autotuning, "_time", timed)
    return table


def test_autotune_measures_both_runtimes_of_each_graph(bundle, options):
    steps = []
    choices = autotune(bundle, options, progress=steps.append)
    assert list(choices) == list(GRAPH_NAMES)
    for name, choice in choices.items():
        assert [timing.runtime for timing in choice.timings] == ["onnxruntime", "openvino"]
        assert all(timing.median_ms > 0 and timing.num_runs >= 1 for timing in choice.timings)
        assert choice.runtime in ("onnxruntime", "openvino")
        assert (choice.graph, choice.is_cached) == (name, False)
    assert steps[:2] == ["time image_encoder on onnxruntime", "time image_encoder on openvino"]


@pytest.mark.parametrize(
    ("openvino_ms", "chosen", "reason"),
    [
        (5.0, "openvino", "measured as the fastest"),
        (9.7, "onnxruntime", "preferred, and none is more than 5% faster"),
        (20.0, "onnxruntime", "measured as the fastest"),
    ],
)
def test_autotune_chooses_the_fastest_or_within_the_margin_its_own(
    bundle, options, times, openvino_ms, chosen, reason
):
    times["openvino"] = openvino_ms
    choice = autotune(bundle, options)[IMAGE_ENCODER]
    assert (choice.runtime, choice.reason) == (chosen, reason)
    timings = f"onnxruntime 10.00 ms, openvino {openvino_ms:.2f} ms"
    assert str(choice) == f"image_encoder: {chosen}, {reason}: {timings}"


def test_autotune_twice_uses_the_cached_choice(bundle, options, times):
    first = autotune(bundle, options)
    times["onnxruntime"] = 1.0
    second = autotune(bundle, options)
    assert times["measurements"] == 2 * len(GRAPH_NAMES)
    for name, choice in second.items():
        assert choice == msgspec.structs.replace(first[name], is_cached=True)
        assert str(choice).endswith(f" (cached on {choice.date})")


def test_autotune_with_retune_replaces_the_cached_choice(bundle, options, times):
    autotune(bundle, options)
    times["onnxruntime"] = 1.0
    assert autotune(bundle, options, retune=True)[PRIOR].runtime == "onnxruntime"
    cached = autotune(bundle, options)[PRIOR]
    assert (cached.runtime, cached.is_cached) == ("onnxruntime", True)


def test_autotune_with_an_unreadable_cached_choice_measures_again(bundle, options, times):
    key = choice_key(bundle, PRIOR, options)
    for content in (b"{", json.dumps({"graph": PRIOR}).encode()):
        Cache(options.cache_dir).save_blob(autotuning.AUTOTUNE_FOLDER, key, content)
        assert not autotune(bundle, options)[PRIOR].is_cached


def test_choice_key_changes_with_everything_that_changes_latency(bundle, monkeypatch):
    keys = [
        choice_key(bundle, IMAGE_ENCODER, RunnerOptions()),
        choice_key(bundle, PRIOR, RunnerOptions()),
        choice_key(bundle, IMAGE_ENCODER, RunnerOptions(num_threads=1)),
        choice_key(bundle, IMAGE_ENCODER, RunnerOptions(device="cuda")),
        choice_key(bundle, IMAGE_ENCODER, RunnerOptions(inference_precision="bf16")),
    ]
    with monkeypatch.context() as patch:
        patch.setattr(autotuning, "installed_versions", lambda packages: {"openvino": "1"})
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


def test_autotune_with_a_missing_runtime_records_its_error(bundle, options, times, monkeypatch):
    opened = autotuning.open_bundle_graph

    def without_openvino(bundle, name, options, runtime):
        if runtime == "openvino":
            raise MissingDependencyError("OpenVINO is not installed")
        return opened(bundle, name, options, runtime)

    monkeypatch.setattr(autotuning, "open_bundle_graph", without_openvino)
    choice = autotune(bundle, options)[PRIOR]
    assert (choice.runtime, choice.reason) == ("onnxruntime", "the only one that runs here")
    assert choice.timings[1] == Timing("openvino", None, error="OpenVINO is not installed")
    assert "openvino failed (OpenVINO is not installed)" in str(choice)


def test_autotune_without_any_runtime_raises_the_error_of_the_first(bundle, options, monkeypatch):
    def refuse(bundle, name, options, runtime):
        raise MissingDependencyError(f"{runtime} is not installed")

    monkeypatch.setattr(autotuning, "open_bundle_graph", refuse)
    with pytest.raises(MissingDependencyError, match="onnxruntime is not installed"):
        autotune(bundle, options)


def test_choose_fastest_passes_the_limit_and_shows_what_was_stopped(tmp_path):
    limits = []

    def measure(runtime, timing):
        def timed(limit_ms):
            limits.append(limit_ms)
            return timing

        return runtime, timed

    candidates = dict(
        [
            measure("openvino", Timing("openvino", 20.0, 3)),
            measure("transformers", Timing("transformers", 61.5, error="stopped")),
        ]
    )
    choice = choose_fastest("policy", candidates, cache=Cache(tmp_path), key="a")
    assert limits == [float("inf"), 60.0]
    assert str(choice) == (
        "policy: openvino, measured as the fastest: openvino 20.00 ms, transformers over 61.50 ms"
    )
    assert choose_fastest("policy", {}, cache=Cache(tmp_path), key="a").is_cached


def test_autotune_of_engines_measures_nothing(bundle, options, times):
    graphs = {
        name: msgspec.structs.replace(graph, runtime="tensorrt")
        for name, graph in bundle.manifest.graphs.items()
    }
    engines = type(bundle)(bundle.path, msgspec.structs.replace(bundle.manifest, graphs=graphs))
    choice = autotune(engines, options)[PRIOR]
    assert choice == RuntimeChoice(PRIOR, "tensorrt", "the only runtime of an engine")
    assert times["measurements"] == 0
