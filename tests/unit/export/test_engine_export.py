"""Export of engines: real builds without a GPU."""

import msgspec
import onnx
import pytest

from coprs_deploy import demo
from coprs_deploy.bundle import open_bundle, read_manifest
from coprs_deploy.cli.main import main
from coprs_deploy.engines import RunnerOptions, open_bundle_graph
from coprs_deploy.engines.trt.cache import EngineCache
from coprs_deploy.engines.trt.checks import describe_engine, signature_mismatch
from coprs_deploy.errors import BundleIntegrityError, EquivalenceError, RuntimeUnavailableError
from coprs_deploy.export import ExportOptions, export_checkpoint, exporter, graph_writer
from coprs_deploy.specs import GRAPH_NAMES, OptimizationProfile

pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
GPUS = ("sm_80", "sm_89", "sm_120")


@pytest.fixture
def written_graphs(tiny_bundle, monkeypatch):
    """Copy the graphs of the tiny bundle instead of tracing them again."""
    factors = {}

    def copy_graph(module, spec, path, metadata, opset):
        model = onnx.load(tiny_bundle / f"{spec.name}.onnx")
        model.opset_import[0].version = opset
        for weight in model.graph.initializer if spec.name in factors else ():
            values = onnx.numpy_helper.to_array(weight)
            if values.dtype == "float32":
                scaled = values * values.dtype.type(factors[spec.name])
                weight.CopyFrom(onnx.numpy_helper.from_array(scaled, weight.name))
        onnx.save(model, path)

    monkeypatch.setattr(graph_writer, "export_onnx_graph", copy_graph)
    return factors


def test_export_engines_are_described_in_manifest(
    tiny_checkpoint, tmp_path, written_graphs, capsys
):
    options = ExportOptions(
        runtime="tensorrt-rtx",
        precision="fp16",
        compute_capabilities=GPUS,
        cache_dir=tmp_path / "cache",
    )
    path = export_checkpoint(tiny_checkpoint, tmp_path / "bundle", options).bundle.path
    assert {p.name for p in tmp_path.iterdir()} == {"bundle", "cache"}
    bundle = open_bundle(path)
    assert {p.name for p in path.glob("*.*")} == {
        "manifest.json",
        *(f"{name}.engine" for name in GRAPH_NAMES),
    }
    for name, graph in bundle.manifest.graphs.items():
        assert (graph.runtime, graph.precision) == ("tensorrt-rtx", "fp16")
        assert graph.engine.compute_capabilities == GPUS
        assert graph.engine.verified_on is None
        assert graph.engine.size_bytes == bundle.graph_path(name).stat().st_size
    EngineCache(tmp_path / "cache").save_blob("timing", "10.9.0 on NVIDIA L4", bytes(2_000_000))
    assert main(["inspect", str(path), "--cache-dir", str(tmp_path / "cache")]) == 0
    shown = capsys.readouterr().out
    assert "kernel timings: 10.9.0 on NVIDIA L4, 2.0 MB" in shown
    assert "never verified on a GPU" in shown
    assert f"engine cache: {tmp_path / 'cache'}, 3 engines" in shown
    page = ["--report", str(tmp_path / "page.html")]
    assert main(["verify", str(path), "--against", str(tiny_checkpoint), *page]) == 2
    assert "backends are compared on bundles of onnxruntime" in capsys.readouterr().err
    with pytest.raises(RuntimeUnavailableError, match="pass --device cuda"):
        open_bundle_graph(bundle, "prior", RunnerOptions())
    engine = path / "prior.engine"
    engine.write_bytes(engine.read_bytes()[:-100])
    with pytest.raises(BundleIntegrityError, match="was truncated or changed"):
        open_bundle(path)
    assert msgspec.json.decode(msgspec.json.encode(read_manifest(path).to_json()))


@pytest.mark.slow
@pytest.mark.parametrize(
    "precision",
    ["bf16", *(pytest.param(name, marks=pytest.mark.extended) for name in ("fp32", "fp16"))],
)
def test_export_demo_model_compiles_for_every_capability(precision, tmp_path):
    options = ExportOptions(
        runtime="tensorrt-rtx",
        precision=precision,
        compute_capabilities=GPUS,
        cache_dir=tmp_path / "cache",
    )
    bundle = export_checkpoint(demo.CHECKPOINT, tmp_path / "bundle", options).bundle
    for name, graph in bundle.manifest.graphs.items():
        assert graph.engine.compute_capabilities == GPUS
        assert graph.engine.network_layers > 10
        text = describe_engine(bundle.graph_path(name).read_bytes())
        assert text is not None and text.compute_capabilities == GPUS
        assert signature_mismatch(graph.spec, list(text.tensors)) is None
    end_to_end = bundle.manifest.equivalence[-1]
    assert end_to_end.passed
    assert (end_to_end.relative_error > 1e-4) == (precision != "fp32")


@pytest.mark.slow
@pytest.mark.parametrize("drop_padding", [pytest.param(False, marks=pytest.mark.extended), True])
def test_export_fixed_aspect_encoder_compiles(drop_padding, tiny_checkpoint, tmp_path):
    options = ExportOptions(
        runtime="tensorrt-rtx",
        precision="fp16",
        compute_capabilities=("sm_89",),
        aspect_ratio=(16, 9),
        drop_padding=drop_padding,
        images=OptimizationProfile(1, 2, 4),
        cache_dir=tmp_path / "cache",
    )
    bundle = export_checkpoint(tiny_checkpoint, tmp_path / "bundle", options).bundle
    graph = bundle.manifest.graphs["image_encoder"]
    text = describe_engine(bundle.graph_path("image_encoder").read_bytes())
    assert text is not None and signature_mismatch(graph.spec, list(text.tensors)) is None
    assert graph.spec.drops_padding == drop_padding


def test_export_overflowing_graph_stops_before_build(
    tiny_checkpoint, tmp_path, written_graphs, monkeypatch
):
    def build(*args, **kwargs):
        raise AssertionError("an engine was built")

    monkeypatch.setattr(exporter, "build_engine", build)
    written_graphs["mask_decoder"] = 1e6
    options = ExportOptions(
        runtime="tensorrt-rtx",
        precision="fp16",
        compute_capabilities=("sm_89",),
        cache_dir=tmp_path / "cache",
    )
    with pytest.raises(EquivalenceError, match="mask_decoder: relative error"):
        export_checkpoint(tiny_checkpoint, tmp_path / "bundle", options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_export_max_cache_size_removes_older_engines(tiny_checkpoint, tmp_path, written_graphs):
    def export(gpu, limit=None):
        options = ExportOptions(
            runtime="tensorrt-rtx",
            compute_capabilities=(gpu,),
            cache_dir=tmp_path / "cache",
            max_cache_bytes=limit,
            overwrite=True,
        )
        export_checkpoint(tiny_checkpoint, tmp_path / "bundle", options)
        return {
            entry.key.target.compute_capabilities
            for entry in EngineCache(tmp_path / "cache").entries()
        }

    assert export("sm_80") == {("sm_80",)}
    size = EngineCache(tmp_path / "cache").size_bytes()
    assert export("sm_89") == {("sm_80",), ("sm_89",)}
    assert export("sm_120", limit=int(1.3 * size)) == {("sm_120",)}


def test_export_unknown_capability_is_refused_before_reading(tmp_path):
    options = ExportOptions(runtime="tensorrt-rtx", compute_capabilities=("sm_90",))
    with pytest.raises(ValueError, match="compute_capabilities contains 'sm_90'"):
        export_checkpoint(tmp_path / "nothing", tmp_path / "bundle", options)


def test_onnxruntime_runs_fp16_bundle(tiny_checkpoint, tmp_path, written_graphs):
    steps = []
    options = ExportOptions(precision="fp16")
    report = export_checkpoint(tiny_checkpoint, tmp_path / "bundle", options, steps.append)
    assert "check rounded candidate prior" in steps and "check candidate prior" in steps
    assert all(0 < record.relative_error < 0.02 for record in report.bundle.manifest.equivalence)
    bundle = open_bundle(report.bundle.path)
    with open_bundle_graph(bundle, "prior", RunnerOptions()) as runner:
        assert runner.spec.inputs[0].dtype == "float32"
