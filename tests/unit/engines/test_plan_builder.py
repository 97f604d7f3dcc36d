"""Engines that really compile, with TensorRT for RTX, on a machine without a GPU."""

import os
import signal
import sys
import threading
import time

import onnx
import pytest

from coprs_deploy.bundle import read_manifest
from coprs_deploy.engines import engine_builder
from coprs_deploy.engines.build_cache import BuildCache
from coprs_deploy.engines.engine_builder import build_engine, resolve_target, state_need
from coprs_deploy.engines.flavors import TENSORRT_RTX, parse_gpus
from coprs_deploy.engines.plan_builder import BuildSettings, build_plan, check_signature
from coprs_deploy.errors import EngineBuildError, MissingDependencyError
from coprs_deploy.export.precision import OPSETS, type_graph
from coprs_deploy.specs import GRAPH_NAMES, Geometry, TargetsProfile, TensorSpec, graph_specs

GPUS = ("sm_80", "sm_89", "sm_120")
RTX = BuildSettings("tensorrt-rtx", GPUS)

pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")


@pytest.fixture(scope="module")
def specs(tiny_bundle):
    return {name: graph.spec for name, graph in read_manifest(tiny_bundle).graphs.items()}


@pytest.fixture
def prior(tiny_bundle):
    return tiny_bundle / "prior.onnx"


@pytest.mark.parametrize("precision", OPSETS)
@pytest.mark.parametrize("name", GRAPH_NAMES)
def test_every_graph_compiles_for_three_gpus(name, precision, tiny_bundle, specs, tmp_path):
    graph = tmp_path / f"{name}.onnx"
    model = onnx.load(tiny_bundle / f"{name}.onnx")
    model.opset_import[0].version = OPSETS[precision]
    onnx.save(model, graph)
    if precision != "fp32":
        source = graph.rename(tmp_path / "float32.onnx")
        type_graph(source, graph, specs[name], precision)
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


def test_the_second_build_comes_from_the_cache(prior, specs, tmp_path, monkeypatch):
    cache, lines = BuildCache(tmp_path / "cache"), []
    watch = engine_builder.BuildWatch(note=lines.append)
    given = {"spec": specs["prior"], "precision": "fp32", "target": resolve_target(RTX)}
    first = build_engine(prior, tmp_path / "one", cache=cache, watch=watch, **given)
    monkeypatch.setattr(engine_builder, "build_plan", None)
    again = build_engine(prior, tmp_path / "two", cache=cache, watch=watch, **given)
    assert first == again
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert "from the cache" in lines[1] and "from the cache" not in lines[0]


def test_a_static_graph_is_refused_for_a_range_of_targets(prior, tmp_path):
    spec = graph_specs(read_manifest(prior.parent).geometry, 64, TargetsProfile(1, 2, 4))["prior"]
    with pytest.raises(EngineBuildError, match=r"network with the inputs .*not .*targets"):
        build_plan(prior, spec, RTX)


@pytest.mark.parametrize("name", GRAPH_NAMES)
def test_a_graph_of_another_stage_is_refused(name, tiny_bundle, specs):
    other = "prior" if name != "prior" else "mask_decoder"
    with pytest.raises(EngineBuildError, match="export it again"):
        build_plan(tiny_bundle / f"{other}.onnx", specs[name], RTX)


def test_a_parser_error_names_node_and_operator(prior, specs, tmp_path):
    model = onnx.load(prior)
    model.graph.node[2].op_type = "NoSuchOperator"
    broken = tmp_path / "broken.onnx"
    onnx.save(model, broken)
    node = model.graph.node[2].name
    with pytest.raises(EngineBuildError, match=rf"node '{node}' \(NoSuchOperator\): .*Try"):
        build_plan(broken, specs["prior"], RTX)


@pytest.mark.parametrize("content", [b"", b"nonsense" * 100])
def test_another_file_is_refused(content, specs, tmp_path):
    path = tmp_path / "graph.onnx"
    path.write_bytes(content)
    with pytest.raises(EngineBuildError, match=r"graph\.onnx"):
        build_plan(path, specs["prior"], RTX)


def test_a_builder_error_says_what_to_try(prior, specs):
    turing = BuildSettings("tensorrt-rtx", ("sm_75",))
    with pytest.raises(EngineBuildError, match=r"cannot build .*What to try: leave sm_75 out"):
        build_plan(prior, specs["prior"], turing)


def test_an_error_of_the_listener_ends_the_build(prior, specs):
    def fail(text):
        raise RuntimeError("listener")

    with pytest.raises(RuntimeError, match="listener"):
        build_plan(prior, specs["prior"], RTX, on_phase=fail)


def test_progress_is_reported(prior, specs):
    said = []
    build_plan(prior, specs["prior"], RTX, on_phase=said.append)
    assert any("Optimizing graph" in text for text in said)
    assert any(text.endswith("/30") for text in said)


def test_ctrl_c_stops_a_build_at_its_next_step(prior, specs):
    """A real signal while the library is at work; the process lives on."""
    sent = threading.Event()

    def interrupt(text):
        if not sent.is_set():
            sent.set()
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)  # so that the main thread takes the signal before the build is over

    with pytest.raises(KeyboardInterrupt):
        build_plan(prior, specs["prior"], RTX, on_phase=interrupt)
    assert build_plan(prior, specs["prior"], RTX).network_layers > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"flavor": "trt"}, "flavor is 'trt'; accepted: tensorrt, tensorrt-rtx"),
        ({"flavor": "tensorrt", "workspace_bytes": 10}, "accepted: 1 MiB"),
        ({"flavor": "tensorrt-rtx", "version_compatible": True}, "--version-compatible is of Ten"),
        ({"flavor": "tensorrt-rtx", "hardware_compatible": True}, "--hardware-compatible is of"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        BuildSettings(**settings)


def test_gpus_that_the_library_does_not_know_are_refused():
    with pytest.raises(ValueError, match=r"names 'sm_90'; TensorRT for RTX .* builds for sm_75"):
        resolve_target(BuildSettings("tensorrt-rtx", ("sm_90",)))


def test_no_gpu_named_and_none_here(monkeypatch):
    monkeypatch.setattr(engine_builder, "current_gpu", lambda: None)
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
    assert parse_gpus(text) == found


@pytest.mark.parametrize("text", ["89", "sm_9", "sm_89,sm_89", "sm_89;sm_80"])
def test_other_text_is_no_list_of_gpus(text):
    with pytest.raises(ValueError, match="gpu names"):
        parse_gpus(text)


def test_a_full_disk_is_said_before_the_build(prior, tmp_path, monkeypatch):
    cache = BuildCache(tmp_path / "cache")
    assert "GB of memory" in state_need([prior], tmp_path, cache)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(engine_builder.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(EngineBuildError, match=r"need about .* GB of disk"):
        state_need([prior], tmp_path, cache)


def test_a_signature_is_compared_whatever_the_order():
    spec = graph_specs(Geometry(), 64)["prior"]
    tensors = [*spec.outputs, *spec.inputs]
    assert check_signature(spec, tensors) is None
    wrong = [TensorSpec("prior_logits", "float16", spec.outputs[0].shape), *spec.inputs]
    assert "prior_logits: float16" in check_signature(spec, wrong)
