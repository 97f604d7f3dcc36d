"""int8 quantization: Q/DQ nodes, accuracy, and refused exports."""

import json
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, numpy_helper
from PIL import Image

from coprs_deploy.bundle import open_bundle, read_manifest
from coprs_deploy.checkpoint import load_segmentation_model, read_checkpoint
from coprs_deploy.engines import RunnerOptions, open_bundle_graph, openvino_runner
from coprs_deploy.errors import EquivalenceError, RuntimeUnavailableError
from coprs_deploy.export import ExportOptions, export_checkpoint, graph_writer, precision
from coprs_deploy.export.calibration import ProductRange, calibrate, find_calibration_images
from coprs_deploy.export.precision import type_graph
from coprs_deploy.export.quantization import product_names, quantize_graph
from coprs_deploy.machine import Processor, describe_processor
from coprs_deploy.specs import IMAGE_ENCODER, MASK_DECODER, PRIOR

ENCODER = f"{IMAGE_ENCODER}.onnx"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for number in range(8):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((120, 80)).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def spec(tiny_bundle):
    return read_manifest(tiny_bundle).graphs[IMAGE_ENCODER].spec


@pytest.fixture(scope="module")
def ranges(tiny_bundle, tiny_checkpoint, images):
    checkpoint = read_checkpoint(tiny_checkpoint)
    encoder = load_segmentation_model(checkpoint).image_encoder
    names = product_names(tiny_bundle / ENCODER)
    used = find_calibration_images(images).used
    return calibrate(encoder, names, used, checkpoint.config.model.geometry)


@pytest.fixture(scope="module", params=["fp32", "bf16", "fp16"])
def quantized(request, tiny_bundle, spec, ranges, tmp_path_factory):
    """The rest's precision, and the path of a quantized encoder."""
    folder, rest = tmp_path_factory.mktemp("quantized"), request.param
    source = folder / "source.onnx"
    model = onnx.load(tiny_bundle / ENCODER)
    model.opset_import[0].version = precision.OPSETS[rest]
    onnx.save(model, source)
    quantize_graph(source, folder / "int8.onnx", spec, ranges, rest)
    if rest == "fp32":
        return rest, folder / "int8.onnx"
    type_graph(folder / "int8.onnx", folder / "typed.onnx", spec, rest)
    return rest, folder / "typed.onnx"


def run(path, image):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {"image": image})[0]


class TestGraph:
    def test_quantize_makes_learned_products_int8_only(self, quantized, tiny_checkpoint):
        import torch

        encoder = load_segmentation_model(read_checkpoint(tiny_checkpoint)).image_encoder
        linear = {n for n, m in encoder.named_modules() if isinstance(m, torch.nn.Linear)}
        graph = onnx.load(quantized[1]).graph
        makers = {name: node for node in graph.node for name in node.output}
        int8 = [
            node
            for node in graph.node
            if node.op_type == "MatMul"
            and all(makers[name].op_type == "DequantizeLinear" for name in node.input)
        ]
        assert {makers[node.input[1]].name.removesuffix(".weight") for node in int8} == linear
        count = len(linear)
        operators = [node.op_type for node in graph.node]
        assert operators.count("QuantizeLinear") == count
        assert operators.count("DequantizeLinear") == 2 * count
        assert operators.count("MatMul") > count  # attention stays

    def test_quantize_meets_tensorrt_requirements(self, quantized):
        """Symmetric; one scale an activation, one a column of a weight; scales of the rest's type.

        https://docs.nvidia.com/deeplearning/tensorrt/11.0.0/inference-library/work-quantized-types.html
        """
        rest, path = quantized
        graph = onnx.load(path).graph
        weights = {w.name: w for w in graph.initializer}
        wanted = {
            "fp32": TensorProto.FLOAT,
            "bf16": TensorProto.BFLOAT16,
            "fp16": TensorProto.FLOAT16,
        }[rest]
        for node in graph.node:
            if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
                continue
            scale, zero = (weights[name] for name in node.input[1:])
            assert scale.data_type == wanted
            assert zero.data_type == TensorProto.INT8
            assert not numpy_helper.to_array(zero).any()
            assert (numpy_helper.to_array(scale).astype(np.float32) > 0).all()
            axis = [a.i for a in node.attribute if a.name == "axis"]
            if node.input[0] in weights:
                stored = numpy_helper.to_array(weights[node.input[0]])
                assert axis == [1] and list(scale.dims) == [stored.shape[1]]
                assert stored.dtype == np.int8 and stored.min() >= -127
                assert (np.abs(stored.astype(int)).max(axis=0) == 127).mean() > 0.9
            else:
                assert not axis and not list(scale.dims)

    def test_quantize_weight_error_is_at_most_half_a_scale(self, quantized, tiny_checkpoint):
        _, path = quantized
        state = load_segmentation_model(read_checkpoint(tiny_checkpoint)).image_encoder.state_dict()
        weights = {w.name: numpy_helper.to_array(w) for w in onnx.load(path).graph.initializer}
        name = "blocks.0.attn.qkv.weight"
        suffix = {"fp32": "", "bf16": ".bfloat16", "fp16": ".float16"}[quantized[0]]
        scale = weights[f"{name}.scale{suffix}"].astype(np.float32)
        rounded = weights[f"{name}.int8"] * scale
        # The last step may be cut by what rounding its scale to a half type took away.
        room = scale * (0.5 + (0 if not suffix else 0.6))
        assert (np.abs(rounded.T - state[name].numpy()) <= room[:, None] * 1.001).all()

    def test_quantize_error_is_in_range_of_int8(self, quantized, tiny_bundle):
        rest, path = quantized
        image = np.random.default_rng(0).standard_normal((1, 3, 128, 128), dtype=np.float32)
        exact = run(tiny_bundle / ENCODER, image)
        if rest == "bf16":  # ONNX Runtime's CPU provider lacks its operators
            from coprs_deploy.export.precision import write_rounded_graph

            rounded = path.with_name("rounded.onnx")
            write_rounded_graph(path, rounded)
            path = rounded
        error = np.linalg.norm(run(path, image) - exact) / np.linalg.norm(exact)
        assert 1e-3 < error < 0.05

    def test_quantize_reduces_size_to_a_quarter(self, quantized, tiny_bundle):
        stored = {w.name: w for w in onnx.load(quantized[1]).graph.initializer}
        source = {w.name: w for w in onnx.load(tiny_bundle / ENCODER).graph.initializer}
        int8 = sum(numpy_helper.to_array(w).nbytes for n, w in stored.items() if "weight.int8" in n)
        before = sum(
            numpy_helper.to_array(w).nbytes
            for n, w in source.items()
            if n.startswith("val_") and len(w.dims) == 2
        )
        assert 4 * int8 == before
        assert not [
            n for n in source if n.startswith("val_") and len(source[n].dims) == 2 and n in stored
        ]

    def test_quantize_small_columns_keep_normal_float16_scale(
        self, tiny_bundle, spec, ranges, tmp_path
    ):
        model = onnx.load(tiny_bundle / ENCODER)
        product = next(
            n
            for n in model.graph.node
            if n.op_type == "Add" and "blocks.0.attn.qkv.bias" in n.input
        )
        maker = next(n for n in model.graph.node if n.output[0] in product.input)
        weight = next(w for w in model.graph.initializer if w.name == maker.input[1])
        values = numpy_helper.to_array(weight).copy()
        values[:, 0], values[:, 1] = 0, 1e-7
        weight.CopyFrom(numpy_helper.from_array(values, weight.name))
        onnx.save(model, tmp_path / "source.onnx")
        quantize_graph(tmp_path / "source.onnx", tmp_path / "int8.onnx", spec, ranges, "fp16")
        stored = {
            w.name: numpy_helper.to_array(w)
            for w in onnx.load(tmp_path / "int8.onnx").graph.initializer
        }
        scale = stored["blocks.0.attn.qkv.weight.scale"]
        assert scale.min() == np.float32(2**-14)
        assert not stored["blocks.0.attn.qkv.weight.int8"][:, :2].any()

    def test_quantize_large_weights_are_external(
        self, tiny_bundle, spec, ranges, tmp_path, monkeypatch
    ):
        monkeypatch.setattr(precision, "EXTERNAL_DATA_BYTES", 1000)
        quantize_graph(tiny_bundle / ENCODER, tmp_path / "int8.onnx", spec, ranges, "fp16")
        type_graph(tmp_path / "int8.onnx", tmp_path / "typed.onnx", spec, "fp16")
        assert {p.name for p in tmp_path.iterdir()} == {
            "int8.onnx",
            "int8.onnx.data",
            "typed.onnx",
            "typed.onnx.data",
        }
        image = np.zeros((1, 3, 128, 128), np.float32)
        assert np.isfinite(run(tmp_path / "typed.onnx", image)).all()


@pytest.fixture
def written_graphs(tiny_bundle, monkeypatch):
    """Take the graphs of the tiny bundle instead of tracing them again."""

    def copy_graph(module, spec, path, metadata, opset):
        model = onnx.load(tiny_bundle / f"{spec.name}.onnx")
        model.opset_import[0].version = opset
        onnx.save(model, path)

    monkeypatch.setattr(graph_writer, "export_onnx_graph", copy_graph)


class TestExport:
    def test_export_int8_records_calibration_images(
        self, tiny_checkpoint, tmp_path, images, written_graphs
    ):
        options = ExportOptions(
            precision="int8", calibration_images=images, cache_dir=tmp_path / "cache"
        )
        path = export_checkpoint(tiny_checkpoint, tmp_path / "bundle", options).bundle.path
        bundle = open_bundle(path)
        graphs = bundle.manifest.graphs
        assert {name: graph.precision for name, graph in graphs.items()} == {
            IMAGE_ENCODER: "int8",
            PRIOR: "fp32",
            MASK_DECODER: "fp32",
        }
        assert graphs[IMAGE_ENCODER].calibration == find_calibration_images(images).record()
        assert graphs[PRIOR].calibration is None
        records = {record.graph: record for record in bundle.manifest.equivalence}
        assert all(record.passed and record.inputs == 2 for record in records.values())
        assert records[IMAGE_ENCODER].relative_error > 1e-3
        assert records[PRIOR].relative_error < 1e-4
        with open_bundle_graph(bundle, IMAGE_ENCODER, RunnerOptions()) as runner:
            assert runner.spec.inputs[0].dtype == "float32"
        properties = {p.key: p.value for p in onnx.load(path / ENCODER).metadata_props}
        assert len(json.loads(properties["coprs_deploy.int8_products"])) % 4 == 0

    def test_export_int8_second_time_uses_cached_ranges(
        self, tiny_checkpoint, tmp_path, images, written_graphs, monkeypatch
    ):
        options = ExportOptions(
            precision="int8", calibration_images=images, cache_dir=tmp_path / "cache"
        )
        first = export_checkpoint(tiny_checkpoint, tmp_path / "one", options).bundle
        monkeypatch.setattr(graph_writer, "calibrate", None)
        again = export_checkpoint(tiny_checkpoint, tmp_path / "two", options).bundle
        assert first.manifest.files == again.manifest.files

    @pytest.mark.skipif(
        not describe_processor().has_int8_units, reason="this processor has no int8 units"
    )
    def test_export_int8_openvino_passes_same_tolerances(
        self, tiny_checkpoint, tmp_path, images, written_graphs
    ):
        bundles = {}
        for runtime in ("onnxruntime", "openvino"):
            options = ExportOptions(
                runtime, "int8", calibration_images=images, cache_dir=tmp_path / "cache"
            )
            bundles[runtime] = export_checkpoint(
                tiny_checkpoint, tmp_path / runtime, options
            ).bundle
        encoders = [bundle.path / ENCODER for bundle in bundles.values()]
        assert encoders[0].read_bytes() == encoders[1].read_bytes()
        image = np.random.default_rng(0).standard_normal((1, 3, 128, 128), dtype=np.float32)
        found = []
        for runtime in bundles:
            with open_bundle_graph(
                bundles["onnxruntime"], IMAGE_ENCODER, RunnerOptions(), runtime
            ) as runner:
                found.append(runner(image=image)["image_embedding"].numpy())
        # Sums of int8 are equal; a rounding of the rest may move a value by one of 127 steps.
        assert np.abs(found[0] - found[1]).max() < 0.01 * np.abs(found[0]).max()

    def test_export_int8_openvino_without_int8_units_is_refused(
        self, tiny_checkpoint, tmp_path, images, written_graphs, monkeypatch
    ):
        options = ExportOptions(
            precision="int8", calibration_images=images, cache_dir=tmp_path / "cache"
        )
        bundle = export_checkpoint(tiny_checkpoint, tmp_path / "bundle", options).bundle
        old = Processor("a processor", ("avx2", "fma"), 2)
        monkeypatch.setattr(openvino_runner, "describe_processor", lambda: old)
        steps = []
        for_openvino = replace(options, runtime="openvino")
        with pytest.raises(RuntimeUnavailableError, match="use the runtime onnxruntime"):
            export_checkpoint(tiny_checkpoint, tmp_path / "other", for_openvino, steps.append)
        assert steps == []
        with pytest.raises(RuntimeUnavailableError, match="use the runtime onnxruntime"):
            open_bundle_graph(bundle, IMAGE_ENCODER, RunnerOptions(), "openvino")
        open_bundle_graph(bundle, PRIOR, RunnerOptions(), "openvino").close()

    @pytest.mark.parametrize("runtime", ["onnxruntime", "tensorrt-rtx"])
    def test_export_int8_broken_block_is_refused_and_named(
        self, runtime, tiny_checkpoint, tmp_path, images, written_graphs, monkeypatch
    ):
        broken = "blocks.1.mlp.lin2"

        def calibrate_badly(*args):
            ranges = calibrate(*args)
            return ranges | {broken: ProductRange(1.0, 1e-3, 0.9)}

        if runtime == "tensorrt-rtx":
            pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
        monkeypatch.setattr(graph_writer, "calibrate", calibrate_badly)
        options = ExportOptions(
            runtime=runtime,
            precision="int8",
            calibration_images=images,
            cache_dir=tmp_path / "cache",
            compute_capabilities=("sm_89",) if runtime == "tensorrt-rtx" else (),
        )
        with pytest.raises(EquivalenceError, match="image_encoder: relative error") as caught:
            export_checkpoint(tiny_checkpoint, tmp_path / "bundle", options)
        lines = [line for line in str(caught.value).splitlines() if line.startswith("  block")]
        errors = [float(line.split()[2].rstrip("%;,")) for line in lines]
        depth = read_checkpoint(tiny_checkpoint).config.model.sam.encoder_depth
        assert len(errors) == depth
        assert errors[1] > 5 * errors[0]
        assert "input of mlp.lin2: 90.00%" in lines[1]
        assert "after the neck" in lines[-1]
        assert "What to try: more images in --calibration" in str(caught.value)
        assert [path.name for path in tmp_path.iterdir()] == ["cache"]

    def test_export_int8_missing_images_are_refused_first(self, tiny_checkpoint, tmp_path):
        options = ExportOptions(precision="int8", calibration_images=tmp_path / "none")
        steps = []
        with pytest.raises(ValueError, match="accepted: a directory of images"):
            export_checkpoint(tiny_checkpoint, tmp_path / "bundle", options, steps.append)
        assert steps == []

    @pytest.mark.parametrize(
        "options",
        [{"precision": "int8"}, {"calibration_images": "images"}],
        ids=["without", "alone"],
    )
    def test_export_options_int8_requires_calibration_images(self, options):
        with pytest.raises(ValueError, match="pass --calibration DIR with --precision int8"):
            ExportOptions(**options)
