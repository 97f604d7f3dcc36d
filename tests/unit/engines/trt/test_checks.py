"""Checks of an engine before it is loaded: version, GPU, hash, signature, record."""

import warnings

import pytest

from coprs_deploy.engines import RunnerOptions, open_graph, runtime_names
from coprs_deploy.engines.cuda import Gpu
from coprs_deploy.engines.trt import runner as trt_runner
from coprs_deploy.engines.trt.checks import (
    check_loadable,
    describe_engine,
    read_engine,
    signature_mismatch,
)
from coprs_deploy.engines.trt.runner import UnverifiedEngineWarning
from coprs_deploy.errors import (
    BundleError,
    BundleIntegrityError,
    EngineMismatchError,
    RuntimeUnavailableError,
)
from coprs_deploy.specs import TensorSpec
from tests.unit.engines.trt.engine_fakes import L4, SPEC, FakeDevice, record

CUDA = RunnerOptions(device="cuda", allow_engine_host_code=True)


def test_both_variants_are_runtimes():
    assert {"tensorrt", "tensorrt-rtx"} <= set(runtime_names())


@pytest.mark.parametrize(
    ("changes", "version", "gpu", "message"),
    [
        ({}, "10.9.1", L4, r"built by TensorRT 10\.9\.0, and 10\.9\.1 is installed.*export"),
        ({}, "10.9.0", Gpu("H100", "sm_90"), r"for sm_89, and this GPU \(H100\) is sm_90"),
        ({"hardware_compatible": True}, "10.9.0", Gpu("T4", "sm_75"), r"\(T4\) is sm_75"),
        (
            {"variant": "tensorrt-rtx", "compute_capabilities": ("sm_80",)},
            "10.9.0",
            L4,
            "--runtime tensorrt-rtx --precision PRECISION --compute-capabilities sm_80,sm_89 --ov",
        ),
        (
            {"variant": "tensorrt-rtx", "compute_capabilities": ("sm_80",)},
            "10.9.0",
            Gpu("H200", "sm_90"),
            "--runtime tensorrt --precision PRECISION --overwrite.*inspect BUNDLE",
        ),
        (
            {"workspace_bytes": 3 * 2**29, "hardware_compatible": True},
            "10.8.0",
            L4,
            r"--workspace 1\.5 --hardware-compatible --overwrite",
        ),
        ({"version_compatible": True}, "11.0.0", L4, "11.0.0 is installed"),
        ({"version_compatible": True}, "10.8.0", L4, "10.8.0 is installed"),
    ],
)
def test_a_mismatch_is_refused_with_the_export_command(changes, version, gpu, message, monkeypatch):
    class Library:
        class ComputeCapability:
            SM75 = SM80 = SM89 = None

    variants = trt_runner.TRT_VARIANTS
    monkeypatch.setattr(type(variants["tensorrt"]), "load", lambda self: Library)
    with pytest.raises(EngineMismatchError, match=message):
        check_loadable("prior.engine", record(**changes), version, gpu, CUDA)


def test_host_code_is_refused_unless_allowed():
    engine, refused = record(version_compatible=True), RunnerOptions(device="cuda")
    with pytest.raises(EngineMismatchError, match=r"carries host code.*allow_engine_host_code"):
        check_loadable("prior.engine", engine, "10.9.0", L4, refused)
    assert check_loadable("prior.engine", engine, "10.9.0", L4, CUDA) is None


@pytest.mark.parametrize(
    ("changes", "version", "gpu"),
    [
        ({}, "10.9.0", L4),
        ({"hardware_compatible": True}, "10.9.0", Gpu("H100", "sm_90")),
        ({"version_compatible": True}, "10.12.0", L4),
    ],
)
def test_a_matching_engine_is_accepted(changes, version, gpu):
    assert check_loadable("prior.engine", record(**changes), version, gpu, CUDA) is None


def test_read_engine_of_an_unchanged_file_returns_its_bytes(machine):
    assert read_engine(machine.path(), record()) == machine.path().read_bytes()


def test_read_engine_of_a_missing_file_raises(machine):
    machine.path().unlink()
    with pytest.raises(BundleError, match=r"cannot be read.*Rebuild it"):
        read_engine(machine.path(), record())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"engine of prio", "14 bytes, not 15: it was truncated"),
        (b"Engine of prior", "was changed"),
        (b"", "0 bytes"),
    ],
)
def test_a_changed_file_is_never_deserialized(machine, content, message):
    machine.path().write_bytes(content)
    with pytest.raises(BundleIntegrityError, match=message):
        machine.open()
    assert machine.library.num_deserialized == 0


def test_a_version_mismatch_is_found_before_the_file_is_read(machine):
    machine.path().unlink()
    with pytest.raises(EngineMismatchError, match=r"10\.9\.0 is installed"):
        machine.open(engine=record(version="10.8.0"))


def test_an_engine_with_other_tensors_is_refused(machine):
    machine.library.changed_dtypes["prior_logits"] = "HALF"
    with pytest.raises(BundleIntegrityError, match=r"the engine has .*float16.*manifest says"):
        machine.open()


def test_an_engine_that_the_library_refuses_is_an_error(machine):
    machine.library.accepts_files = False
    with pytest.raises(BundleError, match=r"refuses .*magic tag does not match. Rebuild it"):
        machine.open()


@pytest.mark.parametrize(
    ("verified_on", "warning"),
    [
        (None, r"never compared with PyTorch on a GPU: .*coprs-deploy verify"),
        ("NVIDIA A100", "never compared .* on this NVIDIA L4, only on NVIDIA A100"),
        ("NVIDIA L4", None),
    ],
)
def test_open_graph_of_an_unverified_engine_warns(machine, monkeypatch, verified_on, warning):
    monkeypatch.setattr(
        trt_runner, "CudaDevice", lambda index, high_priority: FakeDevice(machine.gpu)
    )
    engine = record(verified_on=verified_on)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        runner = open_graph("tensorrt", machine.path(), SPEC, machine.options(), engine)
    assert runner.gpu_name == "NVIDIA L4"
    assert [one.category for one in caught] == ([UnverifiedEngineWarning] if warning else [])
    if warning:
        with pytest.warns(UnverifiedEngineWarning, match=warning):
            open_graph("tensorrt", machine.path(), SPEC, machine.options(), engine)


@pytest.mark.parametrize("runtime", ["tensorrt", "tensorrt-rtx"])
def test_open_graph_without_a_record_is_refused(runtime, machine):
    with pytest.raises(BundleError, match="has no record"):
        open_graph(runtime, machine.path(), SPEC, CUDA)


def test_open_graph_with_the_other_variant_is_refused(machine):
    with pytest.raises(EngineMismatchError, match="built by TensorRT, and TensorRT for RTX can"):
        open_graph("tensorrt-rtx", machine.path(), SPEC, CUDA, record())


def test_open_graph_on_the_cpu_is_refused(machine):
    with pytest.raises(RuntimeUnavailableError, match=r"device is 'cpu'.*pass --device cuda"):
        open_graph("tensorrt", machine.path(), SPEC, RunnerOptions(), record())


def test_signature_mismatch_ignores_the_order():
    dynamic = [
        TensorSpec(t.name, t.dtype, tuple(-1 if isinstance(s, str) else s for s in t.shape))
        for t in (*SPEC.outputs, *SPEC.inputs)
    ]
    assert signature_mismatch(SPEC, dynamic) is None
    wrong = [TensorSpec("prior_logits", "float16", dynamic[0].shape), *dynamic[1:]]
    assert "prior_logits: float16" in signature_mismatch(SPEC, wrong)


@pytest.mark.parametrize("data", [b"", b"nonsense" * 100, b"\n  inputs={ }\n"])
def test_describe_engine_without_a_description_returns_none(data):
    assert describe_engine(data) is None
