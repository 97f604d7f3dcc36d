"""engines/check_engines.py on the CPU, with a bundle of ONNX graphs."""

import importlib.util
import json
import shutil

import msgspec
import numpy as np
import onnx
import pytest

from coprs_deploy.artifacts import record_files
from coprs_deploy.bundle import read_manifest, write_manifest
from coprs_deploy.conversion import ConversionOptions, random_checkpoint
from coprs_deploy.specs import GRAPH_NAMES
from tests import ROOT


@pytest.fixture(scope="module")
def script():
    path = ROOT / "engines" / "check_engines.py"
    spec = importlib.util.spec_from_file_location("check_engines", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def copy_of_bundle(tiny_bundle, tmp_path):
    return shutil.copytree(tiny_bundle, tmp_path / "damaged")


def run(script, tmp_path, checkpoint, *arguments):
    """Run on the CPU; return the exit code and the records by bundle."""
    folder = tmp_path / "records"
    code = script.main(
        [
            *map(str, arguments),
            *("--against", str(checkpoint), "--device", "cpu"),
            *("--runs", "3", "--records", str(folder)),
        ]
    )
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return code, {record["bundle"]: record for record in records}


def test_a_passing_bundle_is_recorded_with_errors_and_latency(
    script, tmp_path, tiny_bundle, tiny_checkpoint, capsys
):
    code, records = run(script, tmp_path, tiny_checkpoint, tiny_bundle)
    assert code == 0
    record = records[tiny_bundle.name]
    assert (record["passed"], record["error"]) == (True, "")
    manifest = read_manifest(tiny_bundle)
    assert record["checkpoint_fingerprint"] == manifest.checkpoint_fingerprint
    assert [one["graph"] for one in record["equivalence"]] == [*GRAPH_NAMES, "end_to_end"]
    assert all(one["passed"] and one["relative_error"] < 1e-4 for one in record["equivalence"])
    assert list(record["graphs"]) == list(GRAPH_NAMES)
    for graph in record["graphs"].values():
        assert graph["runner"].startswith("onnxruntime ") and graph["engine"] is None
        assert 0 < graph["latency_ms"]["median"] <= graph["latency_ms"]["p90"]
        assert graph["latency_ms"]["num_runs"] == 3
    machine = record["machine"]
    assert machine["gpu"] is None and machine["cores"] >= 1
    assert {"coprs-deploy", "onnxruntime", "torch"} <= set(machine["versions"])
    assert "passed, recorded in" in capsys.readouterr().out


def test_a_bundle_outside_its_tolerance_fails_and_others_are_checked(
    script, tmp_path, copy_of_bundle, tiny_bundle, tiny_checkpoint
):
    graph = copy_of_bundle / "prior.onnx"
    model = onnx.load(graph)
    for tensor in model.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        if values.dtype == np.float32 and values.ndim > 1:
            tensor.CopyFrom(onnx.numpy_helper.from_array(1.1 * values, tensor.name))
    onnx.save(model, graph)
    manifest = read_manifest(copy_of_bundle)
    hashes = {file.path: file for file in record_files(copy_of_bundle)}
    files = tuple(hashes[file.path] for file in manifest.files)
    write_manifest(copy_of_bundle, msgspec.structs.replace(manifest, files=files))
    code, records = run(script, tmp_path, tiny_checkpoint, copy_of_bundle, tiny_bundle)
    assert code == 1
    failed = records["damaged"]
    assert (failed["passed"], failed["error"], failed["graphs"]) == (False, "", {})
    assert not all(one["passed"] for one in failed["equivalence"])
    assert records[tiny_bundle.name]["passed"]


def test_a_bundle_that_cannot_be_checked_is_recorded_with_its_error(
    script, tmp_path, tiny_bundle, capsys
):
    other = random_checkpoint(tmp_path / "other", options=ConversionOptions(seed=1)).path
    code, records = run(script, tmp_path, other, tiny_bundle)
    assert code == 1
    assert "another checkpoint" in records[tiny_bundle.name]["error"]
    assert "another checkpoint" in capsys.readouterr().err


def test_without_a_gpu_one_sentence_is_printed(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "current_gpu", lambda index: None)
    code = script.main(
        ["bundle", "--against", "checkpoint", "--records", str(tmp_path / "records")]
    )
    assert code == 2
    error = capsys.readouterr().err
    assert error.startswith("PyTorch finds no NVIDIA GPU for device 'cuda': ")
    assert error.count("\n") == 1
    assert not (tmp_path / "records").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a/bundle", "b/bundle"], "two bundles have the same name"),
        (["bundle", "--runs", "1"], "--runs is 1; it must be at least 2"),
    ],
)
def test_wrong_arguments_are_refused(script, arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        script.main([*arguments, "--against", "checkpoint"])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_the_record_of_a_gpu_is_named_by_bundle_gpu_and_day(script, tmp_path):
    name = script._record_name(tmp_path / "rtx", {"gpu": "NVIDIA H100 80GB HBM3"})
    assert name.startswith("rtx-nvidia-h100-80gb-hbm3-20")
