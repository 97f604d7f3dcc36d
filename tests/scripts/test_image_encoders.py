"""Image encoders at full size: steps that are kept, goals, the report."""

import json
from types import SimpleNamespace

import pytest

from coprs_deploy.bench.fixtures import RANDOM_MODELS
from coprs_deploy.machine import INT8_UNITS
from coprs_deploy.model_config import SAM_SIZES
from tests.scripts import load_script

image_encoders = load_script("benchmarks/image_encoders.py")


def row(encoder, median_ms, runtime="onnxruntime", precision="fp32"):
    return {
        "encoder": encoder,
        "runtime": runtime,
        "precision": precision,
        "parameters": 5_743_892,
        "multiply_adds": 37_000_000_000,
        "image_size": 1024,
        "graph_bytes": 23_000_000,
        "median_ms": median_ms,
        "min_ms": median_ms - 1,
        "cpu_ms": 2 * median_ms,
        "load": 0.5,
        "runs": 3,
        "peak_bytes": 600_000_000,
        "cosine": 0.999999,
        "relative_error": 1e-6,
    }


def report(*rows):
    machine = {"processor": "none", "cores": 2, "vector_units": ["avx2"], "memory_bytes": 2**33}
    machine |= {"system": "Linux", "commit": "", "versions": {"torch": "2.13.0"}}
    return {"rows": list(rows), "machine": machine}


def test_goals_are_shares_of_the_same_runtime_and_state_what_is_missed():
    rows = [row("vit_h", 2500.0), row("tinyvit_5m", 90.0), row("efficientvit_l0", 50.0)]
    rows += [row("tinyvit_5m", 63.0, precision="int8"), row("tinyvit_5m", 1.0, "openvino")]
    fastest = "onnxruntime: the fastest, efficientvit_l0, over vit_h"
    assert image_encoders.goals(report(*rows)) == [
        "onnxruntime: tinyvit_5m over vit_h: 0.0360, goal at most 0.0400: reached",
        f"{fastest}: 0.0200, goal at most 0.0167: missed",
        "onnxruntime: tinyvit_5m int8 over float32: 0.7000, goal at most 0.6000: missed",
    ]


def test_render_shows_each_row_with_its_share_of_vit_h():
    text = image_encoders.render(report(row("vit_h", 2500.0), row("tinyvit_5m", 100.0)))
    (line,) = [line for line in text.splitlines() if "TinyViT-5M" in line]
    assert "| 100 ms | 99 ms | 200 ms | 0.5 | 1/25.0 | 600 MB |" in line


def test_kept_steps_are_not_repeated(tmp_path, monkeypatch):
    calls = []

    def call(target, timeout_s, **settings):
        calls.append(target.rpartition(":")[2])
        return {"parameters": 1}

    monkeypatch.setattr(image_encoders, "call_once", call)
    image_encoders.run(tmp_path / "out", tmp_path, ["tinyvit_5m"], prepare_only=True)
    assert calls == ["make_checkpoint", "export_encoder", "export_encoder"]
    image_encoders.run(tmp_path / "out", tmp_path, ["tinyvit_5m"], prepare_only=True)
    assert len(calls) == 3
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("units", "expected"),
    [(frozenset({"avx2"}), ["onnxruntime"]), (INT8_UNITS, ["onnxruntime", "openvino"])],
)
def test_int8_is_measured_where_its_products_are_exact(monkeypatch, units, expected):
    processor = SimpleNamespace(has_int8_units=bool(units & INT8_UNITS))
    monkeypatch.setattr(image_encoders, "describe_processor", lambda: processor)
    assert image_encoders.runtimes("int8") == expected
    assert image_encoders.runtimes("fp32") == ["onnxruntime", "openvino"]


def test_unknown_size_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        image_encoders.main(["--out", str(tmp_path), "--work-dir", str(tmp_path), "--sizes", "x"])
    assert "--sizes names 'x'; accepted: vit_b" in capsys.readouterr().err


def test_bench_knows_every_size():
    assert RANDOM_MODELS.keys() == SAM_SIZES.keys()
    assert set(image_encoders.SIZES) == SAM_SIZES.keys() - {"tiny"}


@pytest.mark.extended
def test_script_measures_a_tiny_encoder(tmp_path):
    out = tmp_path / "out"
    work = str(tmp_path / "work")
    assert image_encoders.main(["--out", str(out), "--work-dir", work, "--sizes", "tiny"]) == 0
    rows = json.loads((out / "image-encoders.json").read_text())["rows"]
    assert [(r["runtime"], r["precision"]) for r in rows] == [
        (runtime, precision)
        for precision in ("fp32", "int8")
        for runtime in image_encoders.runtimes(precision)
    ]
    assert all(r["cosine"] > 0.99 and r["median_ms"] > 0 for r in rows)
