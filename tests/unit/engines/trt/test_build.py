"""Engines that really compile, with TensorRT for RTX, on a machine without a GPU."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
from dataclasses import replace

import onnx
import pytest

from coprs_deploy.bundle import read_manifest
from coprs_deploy.checkpoint import load_segmentation_model, read_checkpoint
from coprs_deploy.engines.trt import build as build_module
from coprs_deploy.engines.trt import cache as cache_module
from coprs_deploy.engines.trt.build import BuildCallbacks, BuildSettings, build_engine_bytes
from coprs_deploy.engines.trt.cache import (
    EngineCache,
    build_engine,
    check_build_resources,
    resolve_target,
)
from coprs_deploy.engines.trt.checks import describe_engine
from coprs_deploy.engines.trt.variants import TENSORRT_RTX, parse_capabilities
from coprs_deploy.errors import EngineBuildError, MissingDependencyError, install_hint
from coprs_deploy.export.calibration import ProductRange
from coprs_deploy.export.onnx_graph import export_onnx_graph
from coprs_deploy.export.precision import OPSETS, rest_precision, type_graph
from coprs_deploy.export.quantization import product_names, quantize_graph
from coprs_deploy.specs import GRAPH_NAMES, OptimizationProfile, graph_specs

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
def test_build_engine_of_every_graph_and_precision_compiles_for_three_gpus(
    name, precision, tiny_bundle, specs, tmp_path
):
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
    out = tmp_path / f"{name}.engine"
    engine = build_engine(
        graph,
        out,
        spec=specs[name],
        precision=precision,
        target=resolve_target(RTX),
        cache=EngineCache(tmp_path / "cache"),
    )
    assert engine.compute_capabilities == GPUS
    assert engine.size_bytes == out.stat().st_size > 100_000
    assert engine.version == TENSORRT_RTX.load().__version__
    assert engine.network_layers > 10
    assert engine.verified_on is None and engine.layers is None and engine.gpu is None
    description = describe_engine(out.read_bytes())
    assert description.tensors == (*specs[name].inputs, *specs[name].outputs)
    assert description.compute_capabilities == GPUS
    half = {"bf16": "bfloat16", "fp16": "float16", "int8": "float16"}.get(precision)
    assert half is None or description.types[half] > 0
    if half is not None and name == "image_encoder":
        assert description.types[half] > description.types["float32"]


PROFILE = OptimizationProfile(1, 2, 4)


@pytest.mark.slow
@pytest.mark.parametrize("name", GRAPH_NAMES)
def test_build_of_a_dynamic_graph_sets_min_opt_and_max_shapes(
    name, tiny_checkpoint, tmp_path, monkeypatch
):
    """The tensors that the engine describes, and the profile that the library received."""
    profiles = []

    def add_profile(build, builder):
        profiles.append(make_profile(build, builder))
        return profiles[-1]

    make_profile = build_module._Build._profile
    monkeypatch.setattr(build_module._Build, "_profile", add_profile)
    model = load_segmentation_model(read_checkpoint(tiny_checkpoint))
    geometry = read_checkpoint(tiny_checkpoint).config.model.geometry
    spec = graph_specs(geometry, 64, targets=PROFILE, images=PROFILE)[name]
    graph = tmp_path / f"{name}.onnx"
    export_onnx_graph(model.graph_modules()[name], spec, graph, {})
    description = describe_engine(build_engine_bytes(graph, spec, RTX).data)
    tensors = (*spec.inputs, *spec.outputs)
    assert [(t.name, t.dtype) for t in description.tensors] == [(t.name, t.dtype) for t in tensors]
    for found, expected in zip(description.tensors, tensors, strict=True):
        shape = tuple(-1 if isinstance(size, str) else size for size in expected.shape)
        assert found.shape == shape
    dynamic = [t for t in spec.inputs if any(isinstance(size, str) for size in t.shape)]
    assert dynamic
    (profile,) = profiles
    for tensor in dynamic:
        shapes = [tuple(shape) for shape in profile.get_shape(tensor.name)]
        assert shapes == [(count, *tensor.shape[1:]) for count in (1, 2, 4)]


def test_an_engine_that_differs_from_the_request_is_refused(prior, specs, monkeypatch):
    description = describe_engine(build_engine_bytes(prior, specs["prior"], RTX).data)
    for wrong, message in (
        (
            replace(description, compute_capabilities=("sm_80",)),
            "is for sm_80, not for the requested sm_80, sm_89, sm_120",
        ),
        (replace(description, tensors=description.tensors[1:]), "the engine has .*, the manifest"),
    ):
        monkeypatch.setattr(build_module, "describe_engine", lambda data, wrong=wrong: wrong)
        with pytest.raises(EngineBuildError, match=message):
            build_engine_bytes(prior, specs["prior"], RTX)


def test_the_second_build_comes_from_the_cache(prior, specs, tmp_path, monkeypatch):
    lines = []
    settings = {
        "spec": specs["prior"],
        "precision": "fp32",
        "target": resolve_target(RTX),
        "cache": EngineCache(tmp_path / "cache"),
        "callbacks": BuildCallbacks(on_note=lines.append),
    }
    first = build_engine(prior, tmp_path / "one", **settings)
    monkeypatch.setattr(cache_module, "build_engine_bytes", None)
    again = build_engine(prior, tmp_path / "two", **settings)
    assert first == again
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert "from the cache" in lines[1] and "from the cache" not in lines[0]


def test_a_static_graph_with_a_dynamic_spec_is_refused(prior):
    geometry = read_manifest(prior.parent).geometry
    with pytest.raises(EngineBuildError, match=r"network with the inputs .*not .*targets"):
        build_engine_bytes(prior, graph_specs(geometry, 64, PROFILE)["prior"], RTX)


@pytest.mark.parametrize("name", GRAPH_NAMES)
def test_a_graph_with_another_spec_is_refused(name, tiny_bundle, specs):
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
def test_a_file_that_is_no_graph_is_refused(content, specs, tmp_path):
    path = tmp_path / "graph.onnx"
    path.write_bytes(content)
    with pytest.raises(EngineBuildError, match=r"graph\.onnx"):
        build_engine_bytes(path, specs["prior"], RTX)


def test_a_builder_error_names_what_to_try(prior, specs):
    turing = BuildSettings("tensorrt-rtx", ("sm_75",))
    with pytest.raises(EngineBuildError, match=r"cannot build .*What to try: remove sm_75"):
        build_engine_bytes(prior, specs["prior"], turing)


def test_a_failed_build_holds_no_builder_and_the_next_one_ends(prior, specs):
    turing = BuildSettings("tensorrt-rtx", ("sm_75",))
    with pytest.raises(EngineBuildError) as failed:  # keeps the traceback and its frames
        build_engine_bytes(prior, specs["prior"], turing)
    held = [name for frame in failed.traceback for name in frame.locals]
    assert "cancelled" in held
    assert not {"builder", "network", "config"} & set(held)
    assert build_engine_bytes(prior, specs["prior"], RTX).network_layers > 0


def test_an_error_in_the_progress_callback_ends_the_build(prior, specs):
    def fail(text):
        raise RuntimeError("callback")

    with pytest.raises(RuntimeError, match="callback"):
        build_engine_bytes(prior, specs["prior"], RTX, on_progress=fail)


def test_build_engine_bytes_reports_the_steps_of_the_library(prior, specs):
    steps = []
    build_engine_bytes(prior, specs["prior"], RTX, on_progress=steps.append)
    assert any("Optimizing graph" in step for step in steps)
    assert any(step.endswith("/30") for step in steps)


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
        build_engine_bytes(graph, spec, RTX, on_progress=interrupt)
    assert build_engine_bytes(graph, spec, RTX).network_layers > 0


def test_ctrl_c_during_a_build_stops_it(prior, specs):
    """A real signal during a build, in a process of its own, which then builds again."""
    process = multiprocessing.get_context("spawn").Process(
        target=interrupted_build, args=(prior, specs["prior"])
    )
    process.start()
    process.join()
    assert process.exitcode == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variant": "trt"}, "variant is 'trt'; accepted: tensorrt, tensorrt-rtx"),
        ({"variant": "tensorrt", "workspace_bytes": 10}, "accepted: 1 MiB"),
        (
            {"variant": "tensorrt-rtx", "version_compatible": True},
            "--version-compatible is for Ten",
        ),
        ({"variant": "tensorrt-rtx", "hardware_compatible": True}, "--hardware-compatible is for"),
    ],
)
def test_build_settings_that_contradict_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        BuildSettings(**settings)


def test_resolve_target_with_unsupported_capabilities_raises():
    with pytest.raises(ValueError, match=r"contains 'sm_90'; TensorRT for RTX .* builds for sm_75"):
        resolve_target(BuildSettings("tensorrt-rtx", ("sm_90",)))


def test_resolve_target_without_capabilities_and_gpu_raises(monkeypatch):
    monkeypatch.setattr(cache_module, "current_gpu", lambda: None)
    with pytest.raises(
        ValueError, match="compute_capabilities is empty, and PyTorch finds no GPU; pass --comp"
    ):
        resolve_target(BuildSettings("tensorrt-rtx"))


def test_resolve_target_without_the_library_names_the_pip_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingDependencyError, match=re.escape(install_hint("tensorrt"))):
        resolve_target(BuildSettings("tensorrt"))


@pytest.mark.parametrize(
    ("text", "found"),
    [(None, ()), ("", ()), ("sm_89", ("sm_89",)), ("sm_120, sm_80", ("sm_80", "sm_120"))],
)
def test_parse_capabilities_sorts_a_list(text, found):
    assert parse_capabilities(text) == found


@pytest.mark.parametrize("text", ["89", "sm_9", "sm_89,sm_89", "sm_89;sm_80"])
def test_parse_capabilities_of_another_form_raises(text):
    with pytest.raises(ValueError, match="compute_capabilities contains"):
        parse_capabilities(text)


def test_check_build_resources_with_a_full_disk_raises(prior, tmp_path, monkeypatch):
    cache = EngineCache(tmp_path / "cache")
    assert "GB of memory" in check_build_resources([prior], tmp_path, cache)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(EngineBuildError, match=r"need about .* GB of disk"):
        check_build_resources([prior], tmp_path, cache)


BUILD = """
import sys
from pathlib import Path
from coprs_deploy.bundle import read_manifest
from coprs_deploy.engines.trt.build import BuildCallbacks, BuildSettings
from coprs_deploy.engines.trt.cache import EngineCache, build_engine, resolve_target
bundle, cache, out, gpu = sys.argv[1:]
build_engine(
    Path(bundle) / "prior.onnx",
    Path(out),
    spec=read_manifest(bundle).graphs["prior"].spec,
    precision="fp32",
    target=resolve_target(BuildSettings("tensorrt-rtx", (gpu,))),
    cache=EngineCache(Path(cache)),
    callbacks=BuildCallbacks(on_note=print),
)
"""


@pytest.mark.slow
def test_concurrent_processes_build_each_engine_once(tiny_bundle, tmp_path):
    """Two builds of one engine, of which one waits, and one build of another engine."""
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
    output = {name: build.communicate(timeout=300)[0] for name, build in builds.items()}
    assert [build.returncode for build in builds.values()] == [0, 0, 0]
    assert ["from the cache" in output["one"], "from the cache" in output["two"]].count(True) == 1
    assert "from the cache" not in output["other"]
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    for name, gpu in gpus.items():
        assert describe_engine((tmp_path / name).read_bytes()).compute_capabilities == (gpu,)
    assert len(EngineCache(cache).entries()) == 2
