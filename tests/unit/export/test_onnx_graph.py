"""Exported graphs: names, shapes, metadata and operators."""

import re
import sys
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from coprs_deploy.bundle import read_manifest
from coprs_deploy.checkpoint import read_checkpoint
from coprs_deploy.errors import EquivalenceError, MissingDependencyError, install_hint
from coprs_deploy.export import onnx_graph
from coprs_deploy.export.onnx_graph import (
    OPSET,
    SCOPES,
    STACK_TRACE,
    check_onnx_graph,
    export_onnx_graph,
)
from coprs_deploy.model_config import SAM_SIZES, SegmentationConfig
from coprs_deploy.models.prior import PositionalPrior
from coprs_deploy.specs import (
    GRAPH_NAMES,
    GraphSpec,
    OptimizationProfile,
    TensorSpec,
    graph_specs,
)
from coprs_deploy.version import __version__

DEPTH = SAM_SIZES["tiny"].encoder_depth
CONFIG = SegmentationConfig(policy_hidden_size=256, sam=SAM_SIZES["tiny"])
SPEC = graph_specs(CONFIG.geometry, 256)["prior"]


@pytest.fixture(scope="module")
def graphs(tiny_bundle):
    """The three graphs of the tiny bundle by name."""
    return {name: onnx.load(tiny_bundle / f"{name}.onnx") for name in GRAPH_NAMES}


@pytest.fixture(scope="module")
def prior():
    torch.manual_seed(0)
    return PositionalPrior(CONFIG).requires_grad_(False).eval()


def operators(model):
    return Counter(node.op_type for node in model.graph.node)


@pytest.mark.parametrize("name", GRAPH_NAMES)
def test_graph_passes_checker_with_one_opset(graphs, name):
    onnx.checker.check_model(graphs[name], full_check=True)
    assert [(o.domain, o.version) for o in graphs[name].opset_import] == [("", OPSET)]
    assert all(node.domain == "" for node in graphs[name].graph.node)
    assert len(graphs[name].functions) == 0


@pytest.mark.parametrize("name", GRAPH_NAMES)
def test_graph_inputs_and_outputs_equal_spec(graphs, name):
    spec = graph_specs(CONFIG.geometry, 64)[name]
    for found, wanted in (
        (graphs[name].graph.input, spec.inputs),
        (graphs[name].graph.output, spec.outputs),
    ):
        assert [value.name for value in found] == [tensor.name for tensor in wanted]
        shapes = [tuple(d.dim_value for d in v.type.tensor_type.shape.dim) for v in found]
        assert shapes == [tensor.shape for tensor in wanted]


@pytest.mark.parametrize("name", GRAPH_NAMES)
def test_graph_metadata_records_origin(graphs, name, tiny_bundle, tiny_checkpoint):
    metadata = {p.key: p.value for p in graphs[name].metadata_props}
    own = {key: value for key, value in metadata.items() if key.startswith("coprs_deploy.")}
    assert own == {
        "coprs_deploy.graph": name,
        "coprs_deploy.version": __version__,
        "coprs_deploy.checkpoint": read_checkpoint(tiny_checkpoint).fingerprint(),
        "coprs_deploy.opset": str(OPSET),
        "coprs_deploy.precision": "fp32",
    }
    assert graphs[name].graph.name == name
    assert graphs[name].producer_name == "coprs_deploy"
    manifest = read_manifest(tiny_bundle)
    assert own["coprs_deploy.checkpoint"] == manifest.checkpoint_fingerprint


@pytest.mark.parametrize("name", GRAPH_NAMES)
def test_graph_contains_no_machine_path(tiny_bundle, name):
    written = (tiny_bundle / f"{name}.onnx").read_bytes()
    assert STACK_TRACE.encode() not in written
    assert b".py" not in written
    assert SCOPES.encode() in written


def test_graph_norms_are_layer_normalization_nodes(graphs):
    assert operators(graphs["image_encoder"])["LayerNormalization"] == 2 * DEPTH + 2
    # Four a two-way block, one after the last attention, one in the upscaling, two in the prompt.
    assert operators(graphs["mask_decoder"])["LayerNormalization"] == 4 * 2 + 1 + 1 + 2


@pytest.mark.parametrize("name", GRAPH_NAMES)
def test_graph_has_no_unsupported_operator(graphs, name):
    refused = {"Einsum", "OneHot", "Tile", "Shape", "NonZero", "If", "Loop", "Scan", "RandomNormal"}
    assert not refused & set(operators(graphs[name]))


def test_graph_resize_is_in_prior_only(graphs):
    assert operators(graphs["prior"])["Resize"] == 1
    assert operators(graphs["image_encoder"])["Resize"] == 0
    assert operators(graphs["mask_decoder"])["Resize"] == 0


def test_graph_attention_has_one_softmax(graphs):
    assert operators(graphs["image_encoder"])["Softmax"] == DEPTH
    # The first attention, of the tokens to each other, is a constant and folded.
    assert operators(graphs["mask_decoder"])["Softmax"] == 2 * 3 + 1 - 1


def test_export_profile_that_starts_above_two_targets(prior, tmp_path):
    spec = graph_specs(CONFIG.geometry, 256, OptimizationProfile(3, 4, 8))["prior"]
    export_onnx_graph(prior, spec, tmp_path / "prior.onnx", {})
    session = onnxruntime.InferenceSession(tmp_path / "prior.onnx")
    inputs = {t.name: np.ones(t.shape_for(5), np.float32) for t in spec.inputs}
    assert session.run(None, inputs)[0].shape == spec.outputs[0].shape_for(5)


def test_export_large_weights_are_external(prior, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_graph, "EXTERNAL_DATA_BYTES", 1000)
    path = tmp_path / "prior.onnx"
    export_onnx_graph(prior, SPEC, path, {})
    assert {p.name for p in tmp_path.iterdir()} == {"prior.onnx", "prior.onnx.data"}
    weights = sum(p.numel() * 4 for p in prior.parameters())
    assert (tmp_path / "prior.onnx.data").stat().st_size >= 0.9 * weights
    assert path.stat().st_size < weights / 2

    generator = torch.Generator().manual_seed(1)
    inputs = {t.name: torch.randn(t.shape, generator=generator) for t in SPEC.inputs}
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    # One product and two small convolutions in another order.
    np.testing.assert_allclose(found, prior(**inputs).numpy(), rtol=1e-4, atol=1e-5)


def test_export_small_weights_are_internal(tiny_bundle):
    assert not list(tiny_bundle.glob("*.data"))


@pytest.mark.parametrize(
    ("inputs", "outputs", "message"),
    [
        ((SPEC.inputs[0],), SPEC.outputs, r"prior\.onnx has the inputs .*concentration"),
        (SPEC.inputs[::-1], SPEC.outputs, r"has the inputs image_embedding"),
        (
            (SPEC.inputs[0], TensorSpec("concentration", "float16", (1, 256))),
            SPEC.outputs,
            r"concentration: float32 \(1, 256\), not .*concentration: float16 \(1, 256\)",
        ),
        (SPEC.inputs, (TensorSpec("prior_logits", "float32", (2, 1, 64, 64)),), "has the outputs"),
    ],
)
def test_check_graph_other_signature_is_refused(prior, tmp_path, inputs, outputs, message):
    path = tmp_path / "prior.onnx"
    export_onnx_graph(prior, SPEC, path, {})
    check_onnx_graph(path, SPEC)
    with pytest.raises(EquivalenceError, match=message):
        check_onnx_graph(path, GraphSpec("prior", inputs, outputs))


def test_check_graph_invalid_file_is_refused(prior, tmp_path):
    path = tmp_path / "prior.onnx"
    export_onnx_graph(prior, SPEC, path, {})
    model = onnx.load(path)
    model.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(model, path)
    with pytest.raises(EquivalenceError, match=r"prior\.onnx is not valid ONNX: .*NoSuchOperator"):
        check_onnx_graph(path, SPEC)


def test_export_missing_package_names_pip_line(prior, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingDependencyError, match=re.escape(install_hint("export"))):
        export_onnx_graph(prior, SPEC, tmp_path / "prior.onnx", {})
