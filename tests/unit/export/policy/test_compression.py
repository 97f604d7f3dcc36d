"""Compression of a policy's graphs: calibration examples, GPTQ, records, errors per layer."""

import re

import numpy as np
import pytest

from coprs_deploy.bundle import PolicyCalibration, PolicyEquivalence
from coprs_deploy.checkpoint import read_checkpoint
from coprs_deploy.data.examples import write_examples
from coprs_deploy.data.synthetic.examples import held_out_examples
from coprs_deploy.data.synthetic.presets import PRESETS
from coprs_deploy.errors import EquivalenceError
from coprs_deploy.export import ExportOptions
from coprs_deploy.export.tolerances import POLICY_TOLERANCES, PolicyTolerance

pytest.importorskip("openvino", reason="OpenVINO is not installed")
pytest.importorskip("nncf", reason="NNCF is not installed")

import openvino as ov

from coprs_deploy.export.calibration_examples import split_examples
from coprs_deploy.export.policy import export as policy_export
from coprs_deploy.export.policy.check import describe_layer_errors
from coprs_deploy.export.policy.compression import compress_graph, compression_of
from coprs_deploy.export.policy.graphs import export_policy_graphs
from coprs_deploy.policy.openvino_policy.graphs import EXACT


@pytest.mark.parametrize(
    "options",
    [
        {"policy_runtime": "openvino", "policy_precision": "int8"},
        {"policy_runtime": "transformers", "policy_precision": "int4"},
    ],
)
def test_calibration_without_int4_graphs_is_refused(options):
    with pytest.raises(ValueError, match="accepted: --policy-calibration with --policy-runtime"):
        ExportOptions(**options, policy_calibration="examples.jsonl")


def test_compression_of_a_precision_is_recorded():
    calibration = PolicyCalibration("examples.parquet", 32, 4, "0" * 64)
    assert compression_of("bf16") is None
    assert str(compression_of("int8")) == "int8_sym, one scale per row, nearest"
    assert str(compression_of("int4")) == "int4_sym, groups of 128, nearest"
    expected = "int4_sym, groups of 128, gptq on 32 examples of examples.parquet"
    assert str(compression_of("int4", calibration)) == expected


def test_int4_fitted_to_inputs_rounds_their_products_more_exactly():
    generator = np.random.default_rng(0)
    weights = generator.normal(size=(64, 128)).astype(np.float32)
    mixing = generator.normal(size=(16, 128)).astype(np.float32)
    inputs = [generator.normal(size=(1, 40, 16)).astype(np.float32) @ mixing for _ in range(5)]

    def error(samples):
        x = ov.opset13.parameter([1, -1, 128], np.float32, name="x")
        product = ov.opset13.matmul(x, ov.opset13.constant(weights), False, True)
        graph = compress_graph(ov.Model([product], [x]), "int4", all_layers=True, inputs=samples)
        assert any(op.get_element_type() == ov.Type.i4 for op in graph.get_ops())
        found = ov.Core().compile_model(graph, "CPU", EXACT)(inputs[-1])[0]
        wanted = inputs[-1] @ weights.T
        return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)

    nearest, fitted = error([]), error([[each] for each in inputs[:4]])
    assert fitted < nearest / 2


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint):
    return read_checkpoint(tiny_checkpoint)


@pytest.fixture
def export(checkpoint, tmp_path):
    """Export of an int4 policy with five examples, and what it noted."""
    (tmp_path / "scratch").mkdir()
    write_examples(tmp_path / "e.jsonl", held_out_examples(PRESETS["plain"], 8, 0))

    def run(precision="int4", max_used=5):
        examples = split_examples(tmp_path / "e.jsonl", max_used, 1) if max_used else None
        notes = []
        record = policy_export.PolicyExport(
            checkpoint,
            tmp_path / "graphs",
            precision,
            examples,
            allow_inexact=False,
            report=lambda step: None,
            note=notes.append,
        ).write(tmp_path / "scratch")
        return record, notes, tmp_path / "graphs"

    return run


@pytest.mark.slow
@pytest.mark.parametrize("cosine", [0.99, pytest.param(0.97, marks=pytest.mark.extended)])
def test_a_calibrated_decoder_is_kept_only_if_it_is_better(export, monkeypatch, cosine):
    weights, cosines = [], [0.98, cosine]

    def compare(_, graphs, *__, examples):
        assert len(examples) == 1
        weights.append((graphs / "decoder.bin").read_bytes())
        return PolicyEquivalence(0.1, 0.0, cosines[len(weights) - 1], 1.0, 1.0, 8, 100, True)

    monkeypatch.setattr(policy_export, "compare_policy", compare)
    record, notes, graphs = export()
    assert weights[0] != weights[1]
    kept = (graphs / "decoder.bin").read_bytes()
    assert record.equivalence.cosine == max(cosines)
    if cosine > 0.98:
        assert kept == weights[1]
        assert record.compression.method == "gptq"
        assert record.compression.calibration.num_samples == 5
    else:
        assert kept == weights[0]
        assert record.compression == compression_of("int4")
        assert "not used" in notes[-1]


@pytest.mark.slow
def test_a_refusal_lists_the_error_of_each_layer(export, monkeypatch):
    monkeypatch.setitem(POLICY_TOLERANCES, "int8", PolicyTolerance(0, 0, 1, 1, 1, "none"))
    with pytest.raises(EquivalenceError) as caught:
        export("int8", max_used=0)
    lines = str(caught.value).splitlines()
    assert "accepted: 100% of the tokens" in lines[0]
    errors = [float(re.search(r": ([\d.]+)%", line)[1]) for line in lines[2:-1]]
    assert [line.split(":")[0].strip() for line in lines[2:-1]] == [
        "vision tokens",
        *(f"layer {number}" for number in range(len(errors) - 1)),
    ]
    assert all(0 < error < 20 for error in errors)
    assert "a higher --policy-precision" in lines[-1]


@pytest.mark.slow
def test_layer_errors_of_float32_graphs_are_zero(tiny_llava_checkpoint, tmp_path):
    checkpoint = read_checkpoint(tiny_llava_checkpoint)
    export_policy_graphs(checkpoint.policy_path, tmp_path / "graphs", "fp32", lambda step: None)
    lines = describe_layer_errors(checkpoint, tmp_path / "graphs").splitlines()
    assert len(lines) > 2
    assert all(": 0.00%" in line for line in lines[1:])
