"""Full-size image encoders: typed graphs against PyTorch, and engine builds of them."""

import json
from pathlib import Path

import pytest

from coprs_deploy.bench.worker import WorkerError
from coprs_deploy.export.tolerances import TOLERANCES
from coprs_deploy.model_config import SAM_SIZES
from coprs_deploy.specs import IMAGE_ENCODER
from tests.scripts import load_script

ROOT = Path(__file__).parents[2]

full_size_engines = load_script("benchmarks/full_size_engines.py")

GPUS = ["sm_80", "sm_89", "sm_120"]
HALF = {"bf16": "bfloat16", "fp16": "float16", "int8": "float16"}


@pytest.fixture(scope="module")
def vit_b(tmp_path_factory):
    """The folder of a checkpoint with random weights and of what PyTorch computes with it."""
    folder = tmp_path_factory.mktemp("vit-b")
    made = full_size_engines.make_checkpoint(str(folder / "checkpoint"), "vit_b")
    assert made["weights_bytes"] > 350e6
    full_size_engines.run_reference(str(folder / "checkpoint"), str(folder))
    return folder


@pytest.mark.extended
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "int8"])
def test_vit_b_is_near_float32_and_compiles_for_all_gpus(vit_b, precision, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    checkpoint, graph = str(vit_b / "checkpoint"), str(tmp_path / "image_encoder.onnx")
    full_size_engines.export_encoder(checkpoint, graph, precision)
    found = full_size_engines.check_graph(checkpoint, graph, str(vit_b), precision)
    allowed = TOLERANCES["tensorrt-rtx", precision][IMAGE_ENCODER]
    assert found["cosine"] >= allowed.cosine
    assert (1e-4 if precision != "fp32" else 0) < found["relative_error"] <= allowed.relative_error
    # build_engine() compares the engine's tensors and GPUs with the requested ones.
    built = full_size_engines.build_engine(checkpoint, graph, GPUS)
    share = {"fp32": 1, "bf16": 2, "fp16": 2, "int8": 4}[precision]
    assert 0.8 / share < built["engine_bytes"] / (375e6 - 15e6) < 1.4 / share
    assert built["tensor_types"][HALF.get(precision, "float32")] > 100
    assert {path.name for path in tmp_path.iterdir()} <= {"image_encoder.onnx", "cache"}


def call_here(target, timeout_s, **settings):
    """Call a function of the script in this process."""
    return getattr(full_size_engines, target.rpartition(":")[2])(**settings)


@pytest.mark.slow
def test_run_measures_each_step_once(tmp_path, monkeypatch):
    """On a tiny model; finished steps are not repeated."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    assert set(full_size_engines.SIZES) < set(SAM_SIZES)
    steps = []
    monkeypatch.setattr(full_size_engines, "call_once", call_here)
    request = full_size_engines.Request(("tiny",), ("fp16", "int8"))
    out, work = tmp_path / "out", tmp_path / "work"
    report = full_size_engines.run(out, work, request, steps.append)
    assert full_size_engines.failures(report) == []
    assert [row["precision"] for row in report["rows"]] == ["fp16", "int8"]
    for row in report["rows"]:
        assert row["build_peak_bytes"] > row["engine_bytes"] > 0
        assert row["build_seconds"] > 0
        assert row["relative_error"] > 1e-4
    assert "| tiny | int8 |" in (out / "full-size-engines.md").read_text()
    monkeypatch.setattr(full_size_engines, "call_once", None)
    assert full_size_engines.run(out, work, request)["rows"] == report["rows"]


def test_failures_name_graphs_outside_their_tolerance(tmp_path):
    row = {"sam": "vit_b", "precision": "fp16", "cosine": 0.98, "relative_error": float("nan")}
    (line,) = full_size_engines.failures({"rows": [row]})
    assert line.startswith("vit_b fp16: cosine 0.98")


@pytest.mark.slow
def test_step_runs_in_a_process_and_is_kept(tmp_path):
    settings = {"checkpoint": str(tmp_path / "checkpoint"), "size": "tiny"}
    made = full_size_engines.run_step("make_checkpoint", tmp_path / "make.json", **settings)
    assert made["weights_bytes"] > 0
    assert json.loads((tmp_path / "make.json").read_text()) == made


def test_step_that_fails_raises_and_keeps_nothing(tmp_path):
    with pytest.raises(WorkerError, match="TypeError"):
        full_size_engines.run_step("build_engine", tmp_path / "build.json", no="such setting")
    assert list(tmp_path.iterdir()) == []


def test_committed_record_is_rendered_by_this_script():
    report = json.loads((ROOT / "engines/records/full-size-engines.json").read_text())
    text = (ROOT / "engines/records/full-size-engines.md").read_text(encoding="utf-8")
    assert text == full_size_engines.render(report)
    assert full_size_engines.failures(report) == []
