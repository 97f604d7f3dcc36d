"""Light image encoders in every precision and runtime: graphs, roundings, int8, overflow."""

import copy

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from coprs_deploy.checkpoint import load_segmentation_model, read_checkpoint
from coprs_deploy.engines import RunnerOptions, open_graph, openvino_runner
from coprs_deploy.engines.cache import Cache
from coprs_deploy.engines.trt.build import BuildSettings, build_engine_bytes
from coprs_deploy.errors import EquivalenceError, RuntimeUnavailableError
from coprs_deploy.export import ExportOptions, export_checkpoint
from coprs_deploy.export.calibration import find_calibration_images
from coprs_deploy.export.equivalence import cosine_similarity, relative_error, summarize
from coprs_deploy.export.graph_writer import write_graph, write_int8_graph
from coprs_deploy.export.precision import (
    BF16,
    FP16,
    FP32,
    OPSETS,
    float32_nodes,
    load_graph,
    type_graph,
    write_rounded_graph,
)
from coprs_deploy.export.samples import sample_inputs
from coprs_deploy.export.tolerances import TOLERANCES
from coprs_deploy.models.layers import LayerNorm2d
from coprs_deploy.specs import IMAGE_ENCODER, OptimizationProfile, graph_specs
from tests.unit.light_encoders import SAM, write_light_checkpoint


class Exported:
    """A tiny encoder, its float32 graph, an image and the embedding in PyTorch."""

    def __init__(self, family, checkpoint, folder):
        self.folder = folder
        source = write_light_checkpoint(folder / "checkpoint", checkpoint, family)
        model = source.config.model
        self.geometry = model.geometry
        images = OptimizationProfile(1, 1, 2)
        specs = graph_specs(model.geometry, model.policy_hidden_size, images=images)
        self.spec = specs[IMAGE_ENCODER]
        self.image = sample_inputs(model.geometry, 1)[0].prepared.image
        with torch.inference_mode():
            reference = load_segmentation_model(source).image_encoder
            self.expected = reference(torch.from_numpy(self.image)).numpy()
        self.model = load_segmentation_model(source)
        self.model.fold_batch_norms()
        self.graph = folder / "float32.onnx"
        write_graph(
            self.model.image_encoder, self.spec, self.graph, {}, precision=FP32, scratch=folder
        )

    def typed(self, precision):
        """Return the graph in a precision, converted from the float32 one."""
        path = self.folder / f"{precision}.onnx"
        if not path.exists():
            source = onnx.load(self.graph)
            source.opset_import[0].version = OPSETS[precision]
            onnx.save(source, self.folder / "opset.onnx")
            type_graph(self.folder / "opset.onnx", path, self.spec, precision)
        return path

    def run(self, path, runtime="onnxruntime", images=1):
        with open_graph(runtime, path, self.spec, RunnerOptions()) as runner:
            found = runner(image=np.repeat(self.image, images, axis=0))["image_embedding"]
            return np.array(found.numpy())

    def assert_within(self, found, runtime, precision):
        allowed = TOLERANCES[runtime, precision][IMAGE_ENCODER]
        assert relative_error(found, self.expected) <= allowed.relative_error
        assert cosine_similarity(found, self.expected) >= allowed.cosine


@pytest.fixture(scope="module", params=SAM)
def exported(request, tiny_checkpoint, tmp_path_factory):
    return Exported(request.param, tiny_checkpoint, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibration")
    for number in range(8):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((120, 80)).save(folder / f"{number}.png")
    return folder


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_float32_graph_equals_pytorch_alone_and_in_a_batch(exported, runtime):
    exported.assert_within(exported.run(exported.graph, runtime), runtime, FP32)
    batch = exported.run(exported.graph, runtime, images=2)
    exported.assert_within(batch[1:], runtime, FP32)


def test_graph_has_no_batch_normalization(exported):
    operators = {node.op_type for node in onnx.load(exported.graph).graph.node}
    assert "Conv" in operators
    assert "BatchNormalization" not in operators


@pytest.mark.parametrize("precision", [FP16, BF16])
def test_graph_with_roundings_written_out_is_within_tolerance(exported, precision):
    rounded = exported.folder / f"{precision}-rounded.onnx"
    write_rounded_graph(exported.typed(precision), rounded)
    exported.assert_within(exported.run(rounded), "tensorrt-rtx", precision)


def test_typed_graph_keeps_linear_attention_and_resize_in_float32(exported):
    graph = load_graph(exported.graph).graph
    kept = {node.op_type for node in float32_nodes(graph, IMAGE_ENCODER, FP16)}
    if exported.folder.name.startswith("efficientvit"):
        assert {"Resize", "Relu", "MatMul", "Div", "LayerNormalization"} <= kept
    else:
        assert kept <= {"LayerNormalization"}


def test_int8_graph_quantizes_dense_products_within_tolerance(exported, images):
    encoder, path = exported.model.image_encoder, exported.folder / "int8.onnx"
    ranges = write_int8_graph(
        encoder,
        exported.spec,
        path,
        {},
        rest=FP32,
        scratch=exported.folder,
        images=find_calibration_images(images),
        geometry=exported.geometry,
        cache=Cache(exported.folder / "cache"),
        on_step=lambda step: None,
        on_progress=lambda text: None,
    )
    dense = {
        name
        for name, module in encoder.named_modules()
        if isinstance(module, torch.nn.Linear)
        or (isinstance(module, torch.nn.Conv2d) and module.groups == 1 and module.in_channels >= 16)
    }
    assert ranges.keys() == dense
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    assert kinds.count("QuantizeLinear") == len(dense)
    exported.assert_within(exported.run(path), "onnxruntime", "int8")
    try:
        openvino_runner.require_int8_units()
    except RuntimeUnavailableError:  # this processor's int8 products are not exact
        return
    exported.assert_within(exported.run(path, "openvino"), "openvino", "int8")


@pytest.mark.tensorrt
@pytest.mark.slow
def test_engine_is_built_without_gpu(exported):
    pytest.importorskip("tensorrt_rtx")
    settings = BuildSettings("tensorrt-rtx", ("sm_89",))
    for precision in (FP16, BF16):
        built = build_engine_bytes(exported.typed(precision), exported.spec, settings)
        assert len(memoryview(built.data)) > 10_000


def normalize_in_single_operations(self, x):
    """Compute LayerNorm2d as in segment-anything, whose sum of squares overflows float16."""
    mean = x.mean(1, keepdim=True)
    variance = (x - mean).pow(2).mean(1, keepdim=True)
    x = (x - mean) / torch.sqrt(variance + self.eps)
    return self.weight[:, None, None] * x + self.bias[:, None, None]


class TestHalfPrecisionOverflow:
    """MobileSAM is publicly reported wrong in TensorRT's float16 (NanoSAM's README)."""

    SCALES = (500.0, 1e6)
    """Factors of the channels before the neck's first normalization, which cancels them. The first
    overflows a float16 sum of squares, as in that normalization written as single operations; the
    second overflows float16 itself."""

    @pytest.fixture(scope="class")
    @classmethod
    def graphs(cls, tiny_checkpoint, tmp_path_factory):
        folder = tmp_path_factory.mktemp("overflow")
        exported = Exported("tiny_vit", tiny_checkpoint, folder)
        paths = {}
        for scale in cls.SCALES:
            graph = onnx.load(exported.graph)
            weights = {tensor.name: tensor for tensor in graph.graph.initializer}
            weight = weights["neck.0.weight"]
            values = onnx.numpy_helper.to_array(weight) * np.float32(scale)
            weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
            paths[scale] = folder / f"{scale}.onnx"
            onnx.save(graph, paths[scale])
        return exported, paths

    def rounded(self, exported, source, name):
        typed, rounded = (exported.folder / f"{name}-{kind}.onnx" for kind in ("typed", "rounded"))
        type_graph(source, typed, exported.spec, FP16)
        write_rounded_graph(typed, rounded)
        return exported.run(rounded)

    def test_float32_is_right_at_any_scale(self, graphs):
        exported, paths = graphs
        for path in paths.values():
            exported.assert_within(exported.run(path), "onnxruntime", FP32)

    def test_large_channels_are_right_as_the_normalization_stays_float32(self, graphs, monkeypatch):
        exported, paths = graphs
        found = self.rounded(exported, paths[500.0], "kept")
        exported.assert_within(found, "tensorrt-rtx", FP16)

    def test_normalization_in_single_half_operations_fails_the_check(self, graphs, monkeypatch):
        """The reported error: MobileSAM exports the neck's normalization as single operations."""
        exported, paths = graphs
        tolerance = TOLERANCES["tensorrt-rtx", FP16][IMAGE_ENCODER]
        expected = [exported.expected]
        kept = self.rounded(exported, paths[500.0], "kept")
        assert summarize(IMAGE_ENCODER, [kept], expected, tolerance).passed
        monkeypatch.setattr(LayerNorm2d, "forward", normalize_in_single_operations)
        encoder, folder = copy.deepcopy(exported.model.image_encoder), exported.folder
        with torch.no_grad():
            encoder.neck[0].weight *= 500  # which the normalization cancels
        source = folder / "single.onnx"
        write_graph(encoder, exported.spec, source, {}, precision=FP32, scratch=folder)
        exported.assert_within(exported.run(source), "onnxruntime", FP32)  # in float32 it is right
        with np.errstate(all="ignore"):
            wrong = self.rounded(exported, source, "single")
            record = summarize(IMAGE_ENCODER, [wrong], expected, tolerance)
        assert not record.passed

    def test_overflow_of_float16_shows_in_the_rounded_graph(self, graphs):
        exported, paths = graphs
        with np.errstate(all="ignore"):
            assert not np.isfinite(self.rounded(exported, paths[1e6], "overflow")).all()


@pytest.mark.slow
class TestExport:
    def test_overflowing_encoder_is_refused_and_nothing_is_written(self, tiny_checkpoint, tmp_path):
        def overflow(tensors):
            tensors["image_encoder.neck.0.weight"] *= 1e6

        source = write_light_checkpoint(
            tmp_path / "light", tiny_checkpoint, "tiny_vit", change=overflow
        )
        options = ExportOptions(
            runtime="tensorrt-rtx", precision=FP16, compute_capabilities=("sm_89",)
        )
        pytest.importorskip("tensorrt_rtx")
        with pytest.raises(EquivalenceError, match=r"image_encoder: relative error (inf|nan)"):
            export_checkpoint(source, tmp_path / "bundle", options)
        assert not (tmp_path / "bundle").exists()

    def test_fixed_aspect_ratio_without_padding_is_exported(self, tiny_checkpoint, tmp_path):
        source = write_light_checkpoint(tmp_path / "light", tiny_checkpoint, "efficientvit")
        options = ExportOptions(aspect_ratio=(16, 9), drop_padding=True)
        bundle = export_checkpoint(source, tmp_path / "bundle", options).bundle
        records = {record.graph: record for record in bundle.manifest.equivalence}
        assert records[IMAGE_ENCODER].passed
        assert "without_padding" in records
        assert bundle.manifest.image_encoder == "EfficientViT-SAM of other sizes"
        assert read_checkpoint(source.path).config.model.sam == SAM["efficientvit"]
