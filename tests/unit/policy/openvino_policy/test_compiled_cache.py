"""Compiled graphs of a small policy in the cache: found again by content, never by name."""

import os
import shutil

import numpy as np
import pytest

from coprs_deploy import demo
from coprs_deploy.bundle import POLICY_GRAPHS_DIRECTORY, read_manifest
from coprs_deploy.engines import openvino_runner
from coprs_deploy.policy import PolicyRequest
from coprs_deploy.policy.openvino_policy.policy import OpenVinoPolicy

pytest.importorskip("openvino", reason="OpenVINO is not installed")

GRAPHS = demo.BUNDLE / POLICY_GRAPHS_DIRECTORY


def opened(path, cache_dir):
    """Open the demo model's policy; return which graphs came from the cache, and a response."""
    record = read_manifest(demo.BUNDLE).policy
    limits = (record.min_pixels, record.max_pixels)
    with OpenVinoPolicy(path, record.prompt, *limits, cache_dir=cache_dir) as policy:
        compiled = (policy._vision._compiled, policy._decoder._compiled)
        request = PolicyRequest(np.full((128, 128, 3), 90, np.uint8), "the circle")
        *_, result = policy.stream(request)
        return [graph.get_property("LOADED_FROM_CACHE") for graph in compiled], result


def test_graphs_are_compiled_once_and_respond_alike(tmp_path):
    (first, expected), (second, result) = opened(GRAPHS, tmp_path), opened(GRAPHS, tmp_path)
    assert (first, second) == ([False, False], [True, True])
    assert result.token_ids == expected.token_ids
    np.testing.assert_array_equal(result.concentrations, expected.concentrations)


def test_changed_weights_under_the_same_name_and_date_are_compiled_again(tmp_path):
    graphs = tmp_path / "graphs"
    shutil.copytree(GRAPHS, graphs)
    opened(graphs, tmp_path / "cache")
    weights = graphs / "decoder.bin"
    date, content = weights.stat().st_mtime_ns, bytearray(weights.read_bytes())
    content[5000] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(date, date))
    assert opened(graphs, tmp_path / "cache")[0] == [True, False]


def test_a_large_policy_is_not_cached(tmp_path, monkeypatch):
    monkeypatch.setattr(openvino_runner, "CACHED_GRAPH_BYTES", 1_000_000)
    assert opened(GRAPHS, tmp_path / "cache")[0] == [False, False]
    assert not (tmp_path / "cache").exists()
