"""Graphs in bfloat16 and float16: types, float32 parts, and emulated rounding."""

import json
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from coprs_deploy.bundle import read_manifest
from coprs_deploy.export import ExportOptions, precision
from coprs_deploy.export.precision import OPSETS, type_graph, write_rounded_graph
from coprs_deploy.specs import GRAPH_NAMES, IMAGE_ENCODER, MASK_DECODER, PRIOR

HALF = {"bf16": TensorProto.BFLOAT16, "fp16": TensorProto.FLOAT16}


def with_opset(source, target, precision):
    """Copy a graph under another opset; no operator in it changed between the two."""
    model = onnx.load(source)
    model.opset_import[0].version = OPSETS[precision]
    onnx.save(model, target)
    return target


@pytest.fixture(scope="module")
def typed(tiny_bundle, tmp_path_factory):
    """Paths of the typed graphs by precision and name."""
    folder = tmp_path_factory.mktemp("typed")
    specs = {name: graph.spec for name, graph in read_manifest(tiny_bundle).graphs.items()}
    paths = {}
    for kind in HALF:
        for name in GRAPH_NAMES:
            source = with_opset(tiny_bundle / f"{name}.onnx", folder / "source.onnx", kind)
            paths[kind, name] = folder / f"{name}.{kind}.onnx"
            type_graph(source, paths[kind, name], specs[name], kind)
    return paths


@pytest.fixture(params=HALF)
def kind(request):
    return request.param


def types_of(model):
    """Element type of every tensor of a graph by name."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    values = (*inferred.input, *inferred.value_info, *inferred.output)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    return types | {weight.name: weight.data_type for weight in inferred.initializer}


def run(path, inputs):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, inputs)[0]


class TestTypes:
    @pytest.mark.parametrize("name", GRAPH_NAMES)
    def test_type_graph_keeps_inputs_and_outputs_float32(self, typed, kind, name, tiny_bundle):
        graph, source = (
            onnx.load(path).graph for path in (typed[kind, name], tiny_bundle / f"{name}.onnx")
        )
        for ours, theirs in ((graph.input, source.input), (graph.output, source.output)):
            assert [(v.name, v.type) for v in ours] == [(v.name, v.type) for v in theirs]

    @pytest.mark.parametrize("name", GRAPH_NAMES)
    def test_type_graph_keeps_float32_parts_and_lowers_rest(self, typed, kind, name):
        model = onnx.load(typed[kind, name])
        types = types_of(model)
        listed = {p.key: p.value for p in model.metadata_props}
        kept = set(json.loads(listed["coprs_deploy.float32_nodes"]))
        assert listed["coprs_deploy.precision"] == kind
        halves = 0
        for node in model.graph.node:
            if node.op_type == "Cast":
                continue
            tensors = [types[n] for n in (*node.input, *node.output) if n]
            floats = {t for t in tensors if t in (TensorProto.FLOAT, HALF[kind])}
            assert floats <= ({TensorProto.FLOAT} if node.name in kept else {HALF[kind]}), node.name
            halves += floats == {HALF[kind]}
        assert halves > (10 if name != PRIOR else 2)

    def test_float32_parts_select_existing_nodes(self, typed, kind):
        by_name = {}
        for name in GRAPH_NAMES:
            model = onnx.load(typed[kind, name])
            kept = json.loads(
                {p.key: p.value for p in model.metadata_props}["coprs_deploy.float32_nodes"]
            )
            by_name[name] = Counter(n.op_type for n in model.graph.node if n.name in kept)
        assert set(by_name[IMAGE_ENCODER]) == {"LayerNormalization"}
        assert by_name[PRIOR]["MatMul"] == by_name[PRIOR]["Resize"] == 1
        assert by_name[MASK_DECODER]["MatMul"] == by_name[MASK_DECODER]["Where"] == 1
        assert by_name[MASK_DECODER]["ConvTranspose"] == (2 if kind == "bf16" else 0)

    def test_type_graph_halves_weights_and_leaves_none_unused(self, typed, kind, tiny_bundle):
        model = onnx.load(typed[kind, IMAGE_ENCODER])
        source = onnx.load(tiny_bundle / f"{IMAGE_ENCODER}.onnx")
        size = sum(numpy_helper.to_array(w).nbytes for w in model.graph.initializer)
        before = sum(numpy_helper.to_array(w).nbytes for w in source.graph.initializer)
        assert 0.5 * before <= size < 0.55 * before
        used = {name for node in model.graph.node for name in node.input}
        assert {weight.name for weight in model.graph.initializer} <= used

    def test_type_graph_has_no_redundant_casts(self, typed, kind):
        for name in GRAPH_NAMES:
            nodes = onnx.load(typed[kind, name]).graph.node
            casts = {n.output[0] for n in nodes if n.op_type == "Cast"}
            assert not [n.name for n in nodes if n.op_type == "Cast" and n.input[0] in casts]


class TestRounding:
    def test_rounded_graph_error_is_in_range_of_its_type(self, typed, kind, tiny_bundle, tmp_path):
        image = np.random.default_rng(0).standard_normal((1, 3, 128, 128), dtype=np.float32)
        exact = run(tiny_bundle / f"{IMAGE_ENCODER}.onnx", {"image": image})
        rounded = tmp_path / "rounded.onnx"
        assert write_rounded_graph(typed[kind, IMAGE_ENCODER], rounded) > 50
        error = np.abs(run(rounded, {"image": image}) - exact).max() / np.abs(exact).max()
        half_a_step = {"bf16": 2**-9, "fp16": 2**-12}[kind]
        assert half_a_step < error < 16 * half_a_step

    def test_rounded_graph_rounds_every_tensor(self, typed, kind, tmp_path):
        rounded = tmp_path / "rounded.onnx"
        write_rounded_graph(typed[kind, MASK_DECODER], rounded)
        model = onnx.load(rounded)
        types = types_of(model)
        halves = [name for name, found in types.items() if found == HALF[kind]]
        ups = {n.input[0] for n in model.graph.node if n.op_type == "Cast"}
        assert set(halves) <= ups
        for node in model.graph.node:
            if node.op_type != "Cast":
                assert not {types[n] for n in node.output} & set(HALF.values())

    def test_rounded_graph_shows_overflow_hidden_by_cpu_provider(self, tmp_path):
        """300 * 300 is above float16's 65504; half of a matrix product of it is not."""
        half = TensorProto.FLOAT16
        scale = helper.make_tensor("scale", half, [1], [300.0])
        graph = helper.make_graph(
            [
                helper.make_node("Cast", ["x"], ["low"], to=half),
                helper.make_node("Mul", ["low", "scale"], ["large"]),
                helper.make_node("Div", ["large", "scale"], ["back"]),
                helper.make_node("Cast", ["back"], ["y"], to=TensorProto.FLOAT),
            ],
            "overflow",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])],
            [scale],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        source, target = tmp_path / "source.onnx", tmp_path / "rounded.onnx"
        onnx.save(onnx.shape_inference.infer_shapes(model), source)
        write_rounded_graph(source, target)
        inputs = {"x": np.array([300, 2], np.float32)}
        assert run(source, inputs).tolist() == [300, 2]
        assert run(target, inputs).tolist() == [np.inf, 2]

    def test_save_graph_large_weights_are_external(self, typed, tiny_bundle, tmp_path, monkeypatch):
        monkeypatch.setattr(precision, "EXTERNAL_DATA_BYTES", 1000)
        spec = read_manifest(tiny_bundle).graphs[PRIOR].spec
        path, rounded = tmp_path / "prior.onnx", tmp_path / "rounded.onnx"
        type_graph(tiny_bundle / "prior.onnx", path, spec, "fp16")
        write_rounded_graph(path, rounded)
        assert {p.name for p in tmp_path.iterdir()} == {
            "prior.onnx",
            "prior.onnx.data",
            "rounded.onnx",
            "rounded.onnx.data",
        }
        generator = np.random.default_rng(3)
        inputs = {t.name: generator.standard_normal(t.shape, dtype=np.float32) for t in spec.inputs}
        assert np.array_equal(run(path, inputs), run(typed["fp16", PRIOR], inputs))

    @pytest.mark.parametrize("name", ["prior.onnx", "source.onnx"])
    def test_save_graph_small_graph_has_no_external_data(self, name, typed, tiny_bundle, tmp_path):
        """ViT-H's weights lie beside its float32 graph; in bfloat16 they fit into the file."""
        (tmp_path / "large").mkdir()
        model = onnx.load(tiny_bundle / "prior.onnx")
        source, path = tmp_path / "large" / name, tmp_path / "prior.onnx"
        onnx.save(
            model, source, save_as_external_data=True, location=f"{name}.data", size_threshold=0
        )
        spec = read_manifest(tiny_bundle).graphs[PRIOR].spec
        type_graph(source, path, spec, "fp16")
        for file in (tmp_path / "large").iterdir():
            file.unlink()
        assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["prior.onnx"]
        generator = np.random.default_rng(3)
        inputs = {t.name: generator.standard_normal(t.shape, dtype=np.float32) for t in spec.inputs}
        assert np.array_equal(run(path, inputs), run(typed["fp16", PRIOR], inputs))


class TestOptions:
    @pytest.mark.parametrize(
        ("runtime", "kind", "message"),
        [
            ("onnxruntime", "half", "precision is 'half'; accepted: fp32, bf16, fp16"),
            ("onnxruntime", "bf16", "CPU provider does not implement; accepted for onnxruntime"),
            ("tensorflow", "fp16", "runtime and precision are tensorflow fp16; accepted: onnx"),
        ],
    )
    def test_export_options_unsupported_precision_is_refused(self, runtime, kind, message):
        with pytest.raises(ValueError, match=message):
            ExportOptions(runtime=runtime, precision=kind)

    @pytest.mark.parametrize(
        "option",
        [
            {"compute_capabilities": ("sm_89",)},
            {"workspace_bytes": 1 << 30},
            {"version_compatible": True},
        ],
    )
    def test_export_options_engine_options_are_refused_for_onnx(self, option):
        with pytest.raises(ValueError, match="apply to engines, and the runtime is onnxruntime"):
            ExportOptions(**option)
