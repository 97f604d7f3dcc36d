"""Engines that really compile, with TensorRT for RTX, on a machine without a GPU."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace

import onnx
import pytest

from coprs_deploy.bundle import read_manifest
from coprs_deploy.checkpoint import load_segmentation_model, read_checkpoint
from coprs_deploy.engines.cache import BuildCache
from coprs_deploy.engines.trt import build, cache
from coprs_deploy.engines.trt.build import BuildSettings, build_engine_bytes, check_signature
from coprs_deploy.engines.trt.cache import build_engine, check_build_resources, resolve_target
from coprs_deploy.engines.trt.checks import describe_engine
from coprs_deploy.engines.trt.variants import TENSORRT_RTX, parse_capabilities
from coprs_deploy.errors import EngineBuildError, MissingDependencyError
from coprs_deploy.export.calibration import ProductRange
from coprs_deploy.export.onnx_graph import export_onnx_graph
from coprs_deploy.export.precision import OPSETS, rest_precision, type_graph
from coprs_deploy.export.quantization import product_names, quantize_graph
from coprs_deploy.specs import GRAPH_NAMES, Geometry, OptimizationProfile, TensorSpec, graph_specs

GPUS = ("sm_80", "sm_89", "sm_120")
RTX = BuildSettings("tensorrt-rtx", GPUS)

pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")


@pytest.fixture(scope="module")
def specs(tiny_bundle):
    return {name: graph.spec for name, graph in read_manifest(tiny_bundle).graphs.items()}


@pytest.fixture
def prior(tiny_bundle):
    return tiny_bundle / "prior.onnx"


@pytest.mark.parametrize(
    ("name", "precision"),
    [(name, precision) for name in GRAPH_NAMES for precision in ("fp32", "bf16", "fp16")]
    + [("image_encoder", "int8")],
)
def test_every_graph_compiles_for_three_gpus(name, precision, tiny_bundle, specs, tmp_path):
    graph = tmp_path / f"{name}.onnx"
    model = onnx.load(tiny_bundle / f"{name}.onnx")
    model.opset_import[0].version = OPSETS[precision]
    onnx.save(model, graph)
    if precision != "fp32":
        source = graph.rename(tmp_path / "float32.onnx")
        rest = rest_precision("tensorrt-rtx", precision)
        if precision == "int8":
            ranges = {product: ProductRange(8.0, 8.0, 0.0) for product in product_names(source)}
            quantize_graph(source, tmp_path / "int8.onnx", specs[name], ranges, rest)
            source = tmp_path / "int8.onnx"
        type_graph(source, graph, specs[name], rest)
    cache, out = BuildCache(tmp_path / "cache"), tmp_path / f"{name}.engine"
    engine = build_engine(
        graph,
        out,
        spec=specs[name],
        precision=precision,
        target=resolve_target(RTX),
        cache=cache,
    )
    assert engine.compute_capabilities == GPUS
    assert engine.size_bytes == out.stat().st_size > 100_000
    assert engine.version == TENSORRT_RTX.load().__version__
    assert engine.network_layers > 10
    assert engine.verified_on is None and engine.layers is None and engine.gpu is None
    text = describe_engine(out.read_bytes())
    assert text.tensors == (*specs[name].inputs, *specs[name].outputs)
    assert text.capabilities == GPUS
    half = {"bf16": "bfloat16", "fp16": "float16", "int8": "float16"}.get(precision)
    assert half is None or text.types[half] > 0
    if half is not None and name == "image_encoder":
        assert text.types[half] > text.types["float32"]


RANGE = OptimizationProfile(1, 2, 4)


@pytest.mark.parametrize("name", GRAPH_NAMES)
def test_an_engine_for_a_range_of_targets_or_images(name, tiny_checkpoint, tmp_path, monkeypatch):
    """What the plan says of its tensors, and the profile that the library was given."""
    profiles = []

    def add_profile(build, builder):
        profiles.append(make_profile(build, builder))
        return profiles[-1]

    make_profile = build._Build._profile
    monkeypatch.setattr(build._Build, "_profile", add_profile)
    model = load_segmentation_model(read_checkpoint(tiny_checkpoint))
    geometry = read_checkpoint(tiny_checkpoint).config.model.geometry
    spec = graph_specs(geometry, 64, targets=RANGE, images=RANGE)[name]
    graph = tmp_path / f"{name}.onnx"
    export_onnx_graph(model.stages()[name], spec, graph, {})
    text = describe_engine(build_engine_bytes(graph, spec, RTX).plan)
    tensors = (*spec.inputs, *spec.outputs)
    assert [(t.name, t.dtype) for t in text.tensors] == [(t.name, t.dtype) for t in tensors]
    for found, wanted in zip(text.tensors, tensors, strict=True):
        assert found.shape == tuple(-1 if isinstance(size, str) else size for size in wanted.shape)
    ranged = [t for t in spec.inputs if any(isinstance(size, str) for size in t.shape)]
    assert ranged
    (profile,) = profiles
    for tensor in ranged:
        shapes = [tuple(shape) for shape in profile.get_shape(tensor.name)]
        assert shapes == [(count, *tensor.shape[1:]) for count in (1, 2, 4)]


def test_an_engine_that_is_not_what_was_asked_for_is_refused(prior, specs, monkeypatch):
    text = describe_engine(build_engine_bytes(prior, specs["prior"], RTX).plan)
    for wrong, message in (
        (replace(text, capabilities=("sm_80",)), "is for sm_80, and sm_80, sm_89, sm_120 was"),
        (replace(text, tensors=text.tensors[1:]), "the engine has .*, the manifest says"),
    ):
        monkeypatch.setattr(build, "describe_engine", lambda plan, wrong=wrong: wrong)
        with pytest.raises(EngineBuildError, match=message):
            build_engine_bytes(prior, specs["prior"], RTX)


@pytest.mark.parametrize("plan", [b"", b"nonsense" * 100, b"\n  inputs={ }\n"])
def test_a_plan_without_a_description_has_none(plan):
    assert describe_engine(plan) is None


def test_the_second_build_comes_from_the_cache(prior, specs, tmp_path, monkeypatch):
    cache, lines = BuildCache(tmp_path / "cache"), []
    watch = cache.BuildCallbacks(note=lines.append)
    given = {"spec": specs["prior"], "precision": "fp32", "target": resolve_target(RTX)}
    first = build_engine(prior, tmp_path / "one", cache=cache, watch=watch, **given)
    monkeypatch.setattr(cache, "build_engine_bytes", None)
    again = build_engine(prior, tmp_path / "two", cache=cache, watch=watch, **given)
    assert first == again
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert "from the cache" in lines[1] and "from the cache" not in lines[0]


def test_a_static_graph_is_refused_for_a_range_of_targets(prior, tmp_path):
    spec = graph_specs(read_manifest(prior.parent).geometry, 64, OptimizationProfile(1, 2, 4))[
        "prior"
    ]
    with pytest.raises(EngineBuildError, match=r"network with the inputs .*not .*targets"):
        build_engine_bytes(prior, spec, RTX)


@pytest.mark.parametrize("name", GRAPH_NAMES)
def test_a_graph_of_another_stage_is_refused(name, tiny_bundle, specs):
    other = "prior" if name != "prior" else "mask_decoder"
    with pytest.raises(EngineBuildError, match="export it again"):
        build_engine_bytes(tiny_bundle / f"{other}.onnx", specs[name], RTX)


def test_a_parser_error_names_node_and_operator(prior, specs, tmp_path):
    model = onnx.load(prior)
    model.graph.node[2].op_type = "NoSuchOperator"
    broken = tmp_path / "broken.onnx"
    onnx.save(model, broken)
    node = model.graph.node[2].name
    with pytest.raises(EngineBuildError, match=rf"node '{node}' \(NoSuchOperator\): .*Try"):
        build_engine_bytes(broken, specs["prior"], RTX)


@pytest.mark.parametrize("content", [b"", b"nonsense" * 100])
def test_another_file_is_refused(content, specs, tmp_path):
    path = tmp_path / "graph.onnx"
    path.write_bytes(content)
    with pytest.raises(EngineBuildError, match=r"graph\.onnx"):
        build_engine_bytes(path, specs["prior"], RTX)


def test_a_builder_error_says_what_to_try(prior, specs):
    turing = BuildSettings("tensorrt-rtx", ("sm_75",))
    with pytest.raises(EngineBuildError, match=r"cannot build .*What to try: leave sm_75 out"):
        build_engine_bytes(prior, specs["prior"], turing)


def test_an_error_of_the_listener_ends_the_build(prior, specs):
    def fail(text):
        raise RuntimeError("listener")

    with pytest.raises(RuntimeError, match="listener"):
        build_engine_bytes(prior, specs["prior"], RTX, on_phase=fail)


def test_progress_is_reported(prior, specs):
    said = []
    build_engine_bytes(prior, specs["prior"], RTX, on_phase=said.append)
    assert any("Optimizing graph" in text for text in said)
    assert any(text.endswith("/30") for text in said)


def interrupted_build(graph, spec):
    taken = threading.Event()

    def take(*arguments):
        taken.set()
        signal.default_int_handler(*arguments)

    def interrupt(text):
        if not taken.is_set():
            os.kill(os.getpid(), signal.SIGINT)
            assert taken.wait(60)  # the build must not be over before

    signal.signal(signal.SIGINT, take)

    with pytest.raises(KeyboardInterrupt):
        build_engine_bytes(graph, spec, RTX, on_phase=interrupt)
    assert build_engine_bytes(graph, spec, RTX).network_layers > 0


def test_ctrl_c_stops_a_build_at_its_next_step(prior, specs):
    """A real signal while the library is at work, in a process of its own, which lives on."""
    process = multiprocessing.get_context("spawn").Process(
        target=interrupted_build, args=(prior, specs["prior"])
    )
    process.start()
    process.join()
    assert process.exitcode == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variant": "trt"}, "flavor is 'trt'; accepted: tensorrt, tensorrt-rtx"),
        ({"variant": "tensorrt", "workspace_bytes": 10}, "accepted: 1 MiB"),
        ({"variant": "tensorrt-rtx", "version_compatible": True}, "--version-compatible is of Ten"),
        ({"variant": "tensorrt-rtx", "hardware_compatible": True}, "--hardware-compatible is of"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        BuildSettings(**settings)


def test_gpus_that_the_library_does_not_know_are_refused():
    with pytest.raises(ValueError, match=r"names 'sm_90'; TensorRT for RTX .* builds for sm_75"):
        resolve_target(BuildSettings("tensorrt-rtx", ("sm_90",)))


def test_no_gpu_named_and_none_here(monkeypatch):
    monkeypatch.setattr(cache, "current_gpu", lambda: None)
    with pytest.raises(ValueError, match="gpu is not named, and there is none here; pass --gpu"):
        resolve_target(BuildSettings("tensorrt-rtx"))


def test_a_library_that_is_not_here_is_named_with_its_pip_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "coprs-deploy\[tensorrt\]"'):
        resolve_target(BuildSettings("tensorrt"))


@pytest.mark.parametrize(
    ("text", "found"),
    [(None, ()), ("", ()), ("sm_89", ("sm_89",)), ("sm_120, sm_80", ("sm_80", "sm_120"))],
)
def test_gpus_are_read(text, found):
    assert parse_capabilities(text) == found


@pytest.mark.parametrize("text", ["89", "sm_9", "sm_89,sm_89", "sm_89;sm_80"])
def test_other_text_is_no_list_of_gpus(text):
    with pytest.raises(ValueError, match="gpu names"):
        parse_capabilities(text)


def test_a_full_disk_is_said_before_the_build(prior, tmp_path, monkeypatch):
    cache = BuildCache(tmp_path / "cache")
    assert "GB of memory" in check_build_resources([prior], tmp_path, cache)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(EngineBuildError, match=r"need about .* GB of disk"):
        check_build_resources([prior], tmp_path, cache)


def test_a_signature_is_compared_whatever_the_order():
    spec = graph_specs(Geometry(), 64)["prior"]
    tensors = [*spec.outputs, *spec.inputs]
    assert check_signature(spec, tensors) is None
    wrong = [TensorSpec("prior_logits", "float16", spec.outputs[0].shape), *spec.inputs]
    assert "prior_logits: float16" in check_signature(spec, wrong)


BUILD = """
import sys
from pathlib import Path
from coprs_deploy.bundle import read_manifest
from coprs_deploy.engines.build_cache import BuildCache
from coprs_deploy.engines.engine_builder import BuildWatch, build_engine, resolve_target
from coprs_deploy.engines.plan_builder import BuildSettings
bundle, cache, out, gpu = sys.argv[1:]
build_engine(
    Path(bundle) / "prior.onnx",
    Path(out),
    spec=read_manifest(bundle).graphs["prior"].spec,
    precision="fp32",
    target=resolve_target(BuildSettings("tensorrt-rtx", (gpu,))),
    cache=BuildCache(Path(cache)),
    watch=BuildWatch(note=print),
)
"""


@pytest.mark.slow
def test_processes_that_build_at_once_share_a_cache(tiny_bundle, tmp_path):
    """Real builds: two of one engine, of which one waits, and one of another engine beside them."""
    cache = tmp_path / "cache"
    gpus = {"one": "sm_89", "two": "sm_89", "other": "sm_80"}
    builds = {
        name: subprocess.Popen(
            [sys.executable, "-c", BUILD, tiny_bundle, cache, tmp_path / name, gpu],
            stdout=subprocess.PIPE,
            text=True,
        )
        for name, gpu in gpus.items()
    }
    said = {name: build.communicate(timeout=300)[0] for name, build in builds.items()}
    assert [build.returncode for build in builds.values()] == [0, 0, 0]
    assert ["from the cache" in said["one"], "from the cache" in said["two"]].count(True) == 1
    assert "from the cache" not in said["other"]
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    for name, gpu in gpus.items():
        assert describe_engine((tmp_path / name).read_bytes()).capabilities == (gpu,)
    assert len(BuildCache(cache).entries()) == 2
