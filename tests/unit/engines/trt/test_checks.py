"""What an engine must be before it is loaded: the checks for real, library and GPU played."""

import pytest

from coprs_deploy.engines import RunnerOptions, open_graph, runtime_names
from coprs_deploy.engines.cuda import Gpu
from coprs_deploy.engines.trt import runner as execution
from coprs_deploy.engines.trt.checks import check_loadable, read_engine
from coprs_deploy.errors import (
    BundleError,
    BundleIntegrityError,
    EngineMismatchError,
    RuntimeUnavailableError,
)
from tests.unit.engines.trt.engine_fakes import (
    CUDA,
    ENGINE,
    L4,
    PLAN,
    SPEC,
    FakeDevice,
    FakeLibrary,
    engine,
    open_runner,
    play,
)


class TestChecks:
    def test_both_flavors_are_runtimes(self):
        assert {"tensorrt", "tensorrt-rtx"} <= set(runtime_names())

    @pytest.mark.parametrize(
        ("changes", "version", "gpu", "message"),
        [
            ({}, "10.9.1", L4, r"built by TensorRT 10\.9\.0, and 10\.9\.1 is installed.*export"),
            ({}, "10.9.0", Gpu("H100", "sm_90"), r"for sm_89, and this GPU \(H100\) is sm_90"),
            ({"hardware_compatible": True}, "10.9.0", Gpu("T4", "sm_75"), r"\(T4\) is sm_75"),
            ({"version_compatible": True}, "10.9.0", L4, "carries code.*allow_engine_host_code"),
            (
                {"variant": "tensorrt-rtx", "compute_capabilities": ("sm_80",)},
                "10.9.0",
                L4,
                "--runtime tensorrt-rtx --precision PRECISION --gpu sm_80,sm_89 --overwrite",
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
        ],
    )
    def test_what_does_not_fit_is_refused_with_the_command(self, changes, version, gpu, message):
        with pytest.raises(EngineMismatchError, match=message):
            check_loadable("prior.engine", engine(**changes), version, gpu, CUDA)

    @pytest.mark.parametrize(
        ("changes", "version", "gpu"),
        [
            ({}, "10.9.0", L4),
            ({"hardware_compatible": True}, "10.9.0", Gpu("H100", "sm_90")),
            ({"version_compatible": True}, "10.12.0", L4),
        ],
    )
    def test_what_fits_is_let_through(self, changes, version, gpu):
        options = RunnerOptions(device="cuda", allow_engine_host_code=True)
        check_loadable("prior.engine", engine(**changes), version, gpu, options)

    @pytest.mark.parametrize("version", ["11.0.0", "10.8.0"])
    def test_version_compatible_reaches_later_minor_versions_only(self, version):
        options = RunnerOptions(device="cuda", allow_engine_host_code=True)
        with pytest.raises(EngineMismatchError, match="is installed"):
            check_loadable("p", engine(version_compatible=True), version, L4, options)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (PLAN[:-1], "5 bytes, not 6: it was cut short"),
            (b"A plan", "was changed"),
            (b"", "0 by"),
        ],
    )
    def test_a_plan_that_was_touched_is_never_deserialized(self, library, plan, content, message):
        plan.write_bytes(content)
        with pytest.raises(BundleIntegrityError, match=message):
            open_runner(library, plan)
        assert library.calls == []

    def test_a_plan_that_is_gone(self, plan):
        plan.unlink()
        with pytest.raises(BundleError, match="cannot be read"):
            read_engine(plan, ENGINE)

    def test_only_an_engine_that_was_verified_on_this_gpu_is_loaded_without_a_word(
        self, library, plan, monkeypatch
    ):
        monkeypatch.setattr(
            execution, "CudaDevice", lambda index, high_priority: FakeDevice(library.calls)
        )
        variant = execution.TRT_VARIANTS["tensorrt"]
        for verified_on, warning in (
            (None, r"never compared with PyTorch on a GPU: .*coprs-deploy verify"),
            ("NVIDIA A100", "never compared .* on this NVIDIA L4, only on NVIDIA A100"),
        ):
            with pytest.warns(execution.UnverifiedEngineWarning, match=warning):
                execution.open_engine(variant, plan, SPEC, CUDA, engine(verified_on=verified_on))
        execution.open_engine(variant, plan, SPEC, CUDA, engine(verified_on="NVIDIA L4"))

    def test_a_mismatch_is_found_before_the_plan_is_read(self, library, plan):
        plan.unlink()
        with pytest.raises(EngineMismatchError):
            open_runner(library, plan, record=engine(version="10.8.0"))

    @pytest.mark.parametrize("runtime", ["tensorrt", "tensorrt-rtx"])
    def test_opening_refuses_what_it_knows_nothing_about(self, runtime, plan):
        with pytest.raises(BundleError, match="nothing is known about the plan"):
            open_graph(runtime, plan, SPEC, CUDA)

    def test_opening_refuses_the_other_flavor(self, plan):
        with pytest.raises(
            EngineMismatchError, match="built by TensorRT, and TensorRT for RTX can"
        ):
            open_graph("tensorrt-rtx", plan, SPEC, CUDA, ENGINE)

    def test_opening_refuses_the_cpu(self, plan):
        with pytest.raises(RuntimeUnavailableError, match="pass --device cuda"):
            open_graph("tensorrt", plan, SPEC, RunnerOptions(), ENGINE)

    def test_an_engine_with_other_tensors_is_refused(self, monkeypatch, plan):
        library = play(monkeypatch, FakeLibrary(dtype="HALF"))
        with pytest.raises(BundleIntegrityError, match=r"the engine has .*float16.*manifest says"):
            open_runner(library, plan)

    def test_a_plan_that_the_library_refuses(self, monkeypatch, plan):
        library = play(monkeypatch, FakeLibrary(accepts=False))
        with pytest.raises(BundleError, match=r"refuses .*Build it again"):
            open_runner(library, plan)
