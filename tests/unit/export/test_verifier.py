"""Verification of a bundle: unchanged, with another checkpoint, and after tampering."""

import json
import shutil
import sys

import msgspec
import onnx
import pytest
from onnx import numpy_helper

from coprs_deploy import bundle, demo
from coprs_deploy.artifacts import FileRecord, hash_file
from coprs_deploy.bundle import read_manifest, write_manifest
from coprs_deploy.cli.main import main
from coprs_deploy.conversion import ConversionOptions, random_checkpoint
from coprs_deploy.errors import (
    BundleError,
    BundleIntegrityError,
    CheckpointError,
    EquivalenceError,
    RuntimeUnavailableError,
)
from coprs_deploy.export import verify_bundle
from coprs_deploy.specs import GRAPH_NAMES


@pytest.fixture
def bundle_copy(tiny_bundle, tmp_path):
    """A copy of the tiny bundle that may be changed."""
    copied = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, copied)
    return copied


def test_verify_unchanged_bundle_passes_on_other_samples(tiny_bundle, tiny_checkpoint):
    records = verify_bundle(tiny_bundle, tiny_checkpoint)
    assert [record.graph for record in records] == [*GRAPH_NAMES, "end_to_end"]
    assert all(record.passed for record in records)
    exported = json.loads((tiny_bundle / "manifest.json").read_text())["equivalence"]
    assert [r.max_abs_error for r in records] != [r["max_abs_error"] for r in exported]


def test_verify_steps_are_announced(tiny_bundle, tiny_checkpoint):
    steps = []
    verify_bundle(tiny_bundle, tiny_checkpoint, progress=steps.append)
    assert steps[0] == "reference image_encoder"
    assert len(steps) == 6


def test_verify_other_checkpoint_names_both_fingerprints(tiny_bundle, tiny_checkpoint, tmp_path):
    other = random_checkpoint(tmp_path / "other", options=ConversionOptions(seed=9))
    with pytest.raises(EquivalenceError, match="exported from another checkpoint") as caught:
        verify_bundle(tiny_bundle, other.path)
    assert other.fingerprint()[:12] in str(caught.value)
    assert caught.value.exit_code == 1


def test_verify_reads_each_file_of_the_bundle_once(
    tiny_bundle, tiny_checkpoint, monkeypatch, capsys
):
    hashed = []
    monkeypatch.setattr(bundle, "hash_file", lambda path: hashed.append(path) or hash_file(path))
    assert main(["verify", str(tiny_bundle), "--against", str(tiny_checkpoint)]) == 0
    assert hashed
    assert sorted(hashed) == sorted(set(hashed))


def test_verify_without_the_runtime_of_the_export_takes_no_other(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    steps = []
    with pytest.raises(RuntimeUnavailableError, match=r"ONNX Runtime .*pip install"):
        verify_bundle(demo.BUNDLE, demo.CHECKPOINT, progress=steps.append)
    assert steps == []


def test_verify_changed_checkpoint_is_refused(tiny_bundle, tiny_checkpoint, tmp_path):
    changed = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, changed)
    file = changed / "segmentation.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(EquivalenceError, match="exported from another checkpoint"):
        verify_bundle(tiny_bundle, changed)


def test_verify_changed_file_is_refused(bundle_copy, tiny_checkpoint):
    graph = bundle_copy / "prior.onnx"
    data = bytearray(graph.read_bytes())
    data[len(data) // 2] ^= 1
    graph.write_bytes(data)
    with pytest.raises(BundleIntegrityError, match=r"prior\.onnx was changed"):
        verify_bundle(bundle_copy, tiny_checkpoint)


def test_verify_changed_graph_with_updated_manifest_fails(bundle_copy, tiny_checkpoint):
    graph = bundle_copy / "prior.onnx"
    model = onnx.load(graph)
    weight = next(
        w for w in model.graph.initializer if w.dims and numpy_helper.to_array(w).size > 99
    )
    weight.CopyFrom(numpy_helper.from_array(1.01 * numpy_helper.to_array(weight), weight.name))
    onnx.save(model, graph)
    changed = FileRecord("prior.onnx", graph.stat().st_size, hash_file(graph))
    manifest = read_manifest(bundle_copy)
    files = tuple(changed if file.path == "prior.onnx" else file for file in manifest.files)
    write_manifest(bundle_copy, msgspec.structs.replace(manifest, files=files))

    records = {record.graph: record for record in verify_bundle(bundle_copy, tiny_checkpoint)}
    assert not records["prior"].passed
    assert records["image_encoder"].passed
    assert records["mask_decoder"].passed


def test_verify_missing_bundle_or_checkpoint_is_named(tiny_bundle, tiny_checkpoint, tmp_path):
    with pytest.raises(BundleError, match="there is no bundle"):
        verify_bundle(tmp_path, tiny_checkpoint)
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        verify_bundle(tiny_bundle, tmp_path / "absent")
