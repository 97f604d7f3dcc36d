"""Damaged bundles and checkpoints: they open with equal contents, or fail with our own error."""

import contextlib
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coprs_deploy.bundle import open_bundle, read_manifest
from coprs_deploy.checkpoint import check_values, load_segmentation_model, read_checkpoint
from coprs_deploy.conversion.policy_files import load_policy
from coprs_deploy.conversion.weight_files import read_sam
from coprs_deploy.engines import RunnerOptions, open_bundle_graph, open_graph
from coprs_deploy.engines.autotune import random_inputs
from coprs_deploy.errors import CoPRSError
from coprs_deploy.specs import GRAPH_NAMES
from tests.unit.damage import Damaged, damages


@pytest.fixture(scope="module")
def bundle(tiny_bundle, tmp_path_factory):
    return Damaged(tiny_bundle, tmp_path_factory.mktemp("damaged") / "bundle")


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint, tmp_path_factory):
    return Damaged(tiny_checkpoint, tmp_path_factory.mktemp("damaged") / "checkpoint")


@pytest.mark.fuzz
@given(data=st.data(), damage=damages())
def test_open_bundle_damaged_file_is_equal_or_refused(bundle, tiny_bundle, data, damage):
    name = data.draw(st.sampled_from(bundle.names))
    with bundle.file(name, damage) as path, contextlib.suppress(CoPRSError):
        opened = open_bundle(bundle.root)
        assert opened.manifest == open_bundle(tiny_bundle).manifest
        assert name == "manifest.json" or path.read_bytes() == (tiny_bundle / name).read_bytes()


@pytest.mark.fuzz
@given(name=st.sampled_from(GRAPH_NAMES), damage=damages())
def test_open_graph_damaged_onnx_file_runs_or_is_refused(bundle, name, damage):
    graph = read_manifest(bundle.root).graphs[name]
    with (
        bundle.file(graph.file, damage) as path,
        contextlib.suppress(CoPRSError),
        open_graph("onnxruntime", path, graph.spec, RunnerOptions()) as runner,
    ):
        runner(**random_inputs(graph.spec))


def test_open_graph_undamaged_onnx_files_run(bundle):
    opened = open_bundle(bundle.root)
    for name in GRAPH_NAMES:
        with open_bundle_graph(opened, name, RunnerOptions()) as runner:
            for output in runner(**random_inputs(runner.spec)).values():
                assert np.isfinite(output.numpy()).all()


@pytest.mark.fuzz
@given(data=st.data(), damage=damages())
def test_load_segmentation_model_damaged_checkpoint_is_equal_or_refused(checkpoint, data, damage):
    name = data.draw(st.sampled_from(["config.json", "segmentation.safetensors"]))
    with checkpoint.file(name, damage), contextlib.suppress(CoPRSError):
        opened = read_checkpoint(checkpoint.root)
        model = load_segmentation_model(opened)
        assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
        check_values(model.state_dict(), "the checkpoint")


@pytest.mark.fuzz
@given(data=st.data(), damage=damages())
def test_load_policy_damaged_directory_is_loaded_or_refused(checkpoint, data, damage):
    names = [name for name in checkpoint.names if name.startswith("policy/")]
    name = data.draw(st.sampled_from(names))
    with checkpoint.file(name, damage), contextlib.suppress(CoPRSError):
        model, tokenizer = load_policy(checkpoint.root / "policy")
        assert all(weight.isfinite().all() for weight in model.parameters())
        assert len(tokenizer) > 0


@pytest.fixture(scope="module")
def weight_files(tiny_checkpoint, tmp_path_factory):
    root = tmp_path_factory.mktemp("weights")
    state = load_segmentation_model(read_checkpoint(tiny_checkpoint)).state_dict()
    tensors = {name: tensor for name, tensor in state.items() if not name.startswith("prior.")}
    torch.save({"model": tensors}, root / "sam.pth")
    torch.save(tensors, root / "old.pth", _use_new_zipfile_serialization=False)
    return Damaged(root, tmp_path_factory.mktemp("damaged") / "weights"), tensors


@pytest.mark.fuzz
@given(damage=damages())
def test_read_sam_damaged_file_is_equal_or_refused(weight_files, damage):
    files, tensors = weight_files
    with files.file("sam.pth", damage) as path, contextlib.suppress(CoPRSError):
        found = read_sam(path)[1]
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


@pytest.mark.fuzz
@given(damage=damages())
def test_read_sam_damaged_file_of_the_old_format_is_read_or_refused(weight_files, damage):
    files, _ = weight_files
    with (
        files.file("old.pth", damage) as path,
        contextlib.suppress(CoPRSError),
        warnings.catch_warnings(action="ignore"),
    ):
        check_values(read_sam(path)[1], "the file")
