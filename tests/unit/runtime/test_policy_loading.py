"""The library of the policy: chosen without a measurement, measured, stopped, cached."""

import dataclasses

import msgspec
import pytest

from coprs_deploy import CoPRS, demo
from coprs_deploy.bundle import open_bundle
from coprs_deploy.engines.autotune import Timing
from coprs_deploy.runtime import RuntimeOptions, policy_loading
from coprs_deploy.runtime.policy_loading import choose_policy

pytest.importorskip("openvino", reason="OpenVINO is not installed")


@pytest.fixture(scope="module")
def bundle():
    """Bundle that has both graphs and weights of its policy."""
    return open_bundle(demo.BUNDLE)


@pytest.fixture
def times(monkeypatch):
    """Latencies in milliseconds by library instead of measured ones; records the limits."""
    table = {"openvino": 20.0, "transformers": 50.0, "limits": []}

    def timed(bundle, options, library, limit_ms):
        table["limits"].append(limit_ms)
        return Timing(library, table[library], 3)

    monkeypatch.setattr(policy_loading, "_time_policy", timed)
    return table


def without(bundle, **changes):
    """Return the bundle with other fields in its manifest."""
    changed = msgspec.structs.replace(bundle.manifest, **changes)
    return dataclasses.replace(bundle, manifest=changed)


@pytest.mark.parametrize(
    ("options", "library", "reason"),
    [
        ({"policy": "vllm"}, "vllm", "as requested"),
        ({"policy_device": "cuda"}, "transformers", "the policy's graphs run on a CPU only"),
        ({"policy_dtype": "float32"}, "transformers", "the policy's graphs have the dtype that"),
    ],
)
def test_choose_policy_follows_the_options(bundle, times, options, library, reason):
    choice = choose_policy(bundle, RuntimeOptions(**options))
    assert choice.runtime == library
    assert choice.reason.startswith(reason)
    assert times["limits"] == []


def test_choose_policy_takes_the_only_form_of_the_bundle(bundle, times):
    policy = msgspec.structs.replace(bundle.manifest.policy, path=None)
    graphs_only = choose_policy(without(bundle, policy=policy), RuntimeOptions())
    assert str(graphs_only) == "policy: openvino, the bundle has the policy's graphs only"
    weights_only = choose_policy(without(bundle, policy_graphs=None), RuntimeOptions())
    assert str(weights_only) == "policy: transformers, the bundle has no graphs of the policy"
    assert times["limits"] == []


@pytest.mark.parametrize(
    ("missing", "shown"),
    [
        (["openvino"], "policy: transformers, OpenVINO is not installed"),
        (["torch"], "policy: openvino, torch not installed"),
        (
            ["openvino", "torch"],
            "policy: openvino, torch not installed",
        ),  # its error: the edge install
    ],
)
def test_choose_policy_takes_the_only_installed_library(bundle, times, monkeypatch, missing, shown):
    found = policy_loading.installed_versions

    def installed(packages):
        return found([package for package in packages if package not in missing])

    monkeypatch.setattr(policy_loading, "installed_versions", installed)
    assert str(choose_policy(bundle, RuntimeOptions())) == shown
    assert times["limits"] == []


def test_choose_policy_measures_no_weights_that_do_not_fit(bundle, times, monkeypatch):
    monkeypatch.setattr(policy_loading, "available_memory_bytes", lambda: 3_600_000)
    choice = choose_policy(bundle, RuntimeOptions())
    assert str(choice) == "policy: openvino, the weights (0.0 GB) do not fit into the memory"


@pytest.mark.parametrize(
    ("transformers_ms", "library"), [(50.0, "openvino"), (19.5, "openvino"), (10.0, "transformers")]
)
def test_choose_policy_measures_both_and_caches_the_choice(
    bundle, times, tmp_path, transformers_ms, library
):
    times["transformers"] = transformers_ms
    steps = []
    choice = choose_policy(bundle, RuntimeOptions(cache_dir=tmp_path), steps.append)
    assert choice.runtime == library
    assert steps == ["time policy on openvino", "time policy on transformers"]
    assert times["limits"] == [float("inf"), 60.0]
    cached = choose_policy(bundle, RuntimeOptions(cache_dir=tmp_path))
    assert cached == msgspec.structs.replace(choice, is_cached=True)
    assert not choose_policy(bundle, RuntimeOptions(cache_dir=tmp_path, retune=True)).is_cached
    assert not choose_policy(bundle, RuntimeOptions(cache_dir=tmp_path, num_threads=1)).is_cached
    assert len(times["limits"]) == 6


@pytest.mark.slow
def test_load_with_auto_runs_the_measured_library(tmp_path):
    with CoPRS.load(demo.BUNDLE, RuntimeOptions(cache_dir=tmp_path)) as coprs:
        (choice,) = coprs.runtime_choices
        assert choice.graph == "policy"
        assert f"policy: {choice.runtime} qwen2_5_vl on cpu" in coprs.description
    assert [timing.runtime for timing in choice.timings] == ["openvino", "transformers"]
    assert all(timing.median_ms > 0 and timing.num_runs >= 1 for timing in choice.timings)


def test_a_slow_library_is_stopped(bundle, monkeypatch):
    monkeypatch.setattr(policy_loading, "LEAST_LIMIT_MS", 0.01)
    timing = policy_loading._time_policy(bundle, RuntimeOptions(), "openvino", 0.0)
    assert (timing.num_runs, timing.error) == (0, "stopped")
    assert timing.median_ms > 0.01
