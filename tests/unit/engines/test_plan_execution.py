"""Engines as they are loaded and run: the checks for real, the library and the GPU played.

What a GPU computes is not tested here; which calls are made, in which order, on what, is.
"""

import hashlib
from contextlib import contextmanager
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest

from coprs_deploy.bundle import EngineRecord
from coprs_deploy.engines import RunnerOptions, open_graph, runtime_names
from coprs_deploy.engines import plan_execution as execution
from coprs_deploy.engines.build_cache import BuildCache
from coprs_deploy.engines.cuda_device import Gpu
from coprs_deploy.engines.plan_checks import check_loadable, read_plan
from coprs_deploy.engines.plan_execution import PlanRunner
from coprs_deploy.engines.runner import Runner
from coprs_deploy.errors import (
    BundleError,
    BundleIntegrityError,
    CoPRSError,
    EngineMismatchError,
    RuntimeUnavailableError,
)
from coprs_deploy.specs import CountProfile, Geometry, graph_specs

PLAN = b"a plan"
CUDA = RunnerOptions(device="cuda")
L4 = Gpu("NVIDIA L4", "sm_89")
ENGINE = EngineRecord(
    flavor="tensorrt",
    version="10.9.0",
    compute_capabilities=("sm_89",),
    gpu="NVIDIA L4",
    hardware_compatible=False,
    version_compatible=False,
    workspace_bytes=None,
    graph_sha256="a" * 64,
    sha256=hashlib.sha256(PLAN).hexdigest(),
    size_bytes=len(PLAN),
    build_seconds=1.0,
    network_layers=3,
)
GEOMETRY = Geometry(image_size=128, patch_size=8, embedding_channels=64)
SPECS = graph_specs(GEOMETRY, 64, CountProfile(1, 2, 4))
SPEC = SPECS["prior"]


def engine(**changes):
    return msgspec.structs.replace(ENGINE, **changes)


class FakeLibrary:
    """TensorRT as far as a runner uses it; every call is written down."""

    __version__ = "10.9.0"
    LayerInformationFormat = SimpleNamespace(ONELINE="oneline")

    class ILogger:
        ERROR, INTERNAL_ERROR = 1, 0

    def __init__(self, spec=SPEC, dtype="FLOAT", accepts=True):
        self.calls, self.spec, self.dtype, self.accepts = [], spec, dtype, accepts
        self.runs = True

    def Runtime(self, logger):
        def deserialize(plan):
            self.calls.append(("deserialize", plan))
            return FakeEngine(self) if self.accepts else None

        return SimpleNamespace(deserialize_cuda_engine=deserialize)


class FakeEngine:
    device_memory_size_v2 = 1234
    num_layers = 1

    def __init__(self, library):
        self.library = library
        self.tensors = {t.name: t for t in (*library.spec.inputs, *library.spec.outputs)}
        self.num_io_tensors = len(self.tensors)

    def get_tensor_name(self, index):
        return list(self.tensors)[index]

    def get_tensor_dtype(self, name):
        is_int = self.tensors[name].dtype == "int64"
        return SimpleNamespace(name="INT64" if is_int else self.library.dtype)

    def get_tensor_shape(self, name):
        return [-1 if isinstance(size, str) else size for size in self.tensors[name].shape]

    def create_engine_inspector(self):
        return SimpleNamespace(get_layer_information=lambda i, form: f"layer {i}\n")

    def create_execution_context(self):
        calls = self.library.calls
        calls.append(("context",))
        return SimpleNamespace(
            set_input_shape=lambda n, s: calls.append(("shape", n, s)) or True,
            set_tensor_address=lambda n, a: calls.append(("address", n, a)) or True,
            execute_async_v3=lambda stream: calls.append(("execute", stream)) or self.library.runs,
        )


class FakeDevice:
    """A GPU whose memory is numpy arrays."""

    gpu = L4
    index = 0
    stream_handle = 7

    def __init__(self, calls):
        self.calls = calls

    def empty(self, shape, dtype):
        array = np.zeros(shape, dtype)
        return SimpleNamespace(array=array, data_ptr=lambda: array.ctypes.data)

    def fill(self, name, buffer, value):
        assert buffer.array.shape == value.shape and buffer.array.dtype == value.dtype
        self.calls.append(("fill", name))

    def copy_out(self, buffer):
        self.calls.append(("copy out",))
        return buffer.array.copy()

    def capture(self, work):
        self.calls.append(("capture",))
        work()
        return lambda: self.calls.append(("replay",))

    def synchronize(self):
        self.calls.append(("synchronize",))

    def sibling(self):
        return FakeDevice(self.calls)

    @contextmanager
    def current(self):
        self.calls.append(("enter",))
        yield
        self.calls.append(("leave",))


@pytest.fixture
def library(monkeypatch):
    return play(monkeypatch, FakeLibrary())


def play(monkeypatch, library):
    flavor = SimpleNamespace(
        name="tensorrt", title="TensorRT", builds_without_gpu=False, load=lambda: library
    )
    monkeypatch.setitem(execution.FLAVORS, "tensorrt", flavor)
    return library


@pytest.fixture
def plan(tmp_path):
    path = tmp_path / "prior.engine"
    path.write_bytes(PLAN)
    return path


def open_runner(library, plan, options=CUDA, record=ENGINE):
    cache = BuildCache(plan.parent / "cache")
    device = FakeDevice(library.calls)
    return PlanRunner(plan, SPEC, options, engine=record, device=device, cache=cache)


def inputs_of(count):
    shapes = {
        t.name: tuple(count if isinstance(s, str) else s for s in t.shape) for t in SPEC.inputs
    }
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


def names(library):
    """The calls, but for those that change the current device."""
    return [call[0] for call in library.calls if call[0] not in ("enter", "leave")]


class TestChecks:
    def test_both_flavors_are_runtimes(self):
        assert {"tensorrt", "tensorrt-rtx"} <= set(runtime_names())

    @pytest.mark.parametrize(
        ("changes", "version", "gpu", "message"),
        [
            ({}, "10.9.1", L4, r"built by TensorRT 10\.9\.0, and 10\.9\.1 is installed.*export"),
            ({}, "10.9.0", Gpu("H100", "sm_90"), r"for sm_89, and this GPU \(H100\) is sm_90"),
            ({"hardware_compatible": True}, "10.9.0", Gpu("T4", "sm_75"), r"\(T4\) is sm_75"),
            ({"version_compatible": True}, "10.9.0", L4, "carries code.*allow_plan_code"),
            (
                {"flavor": "tensorrt-rtx", "compute_capabilities": ("sm_80",)},
                "10.9.0",
                L4,
                "--runtime tensorrt-rtx --precision PRECISION --gpu sm_80,sm_89 --overwrite",
            ),
            (
                {"flavor": "tensorrt-rtx", "compute_capabilities": ("sm_80",)},
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
        options = RunnerOptions(device="cuda", allow_plan_code=True)
        check_loadable("prior.engine", engine(**changes), version, gpu, options)

    @pytest.mark.parametrize("version", ["11.0.0", "10.8.0"])
    def test_version_compatible_reaches_later_minor_versions_only(self, version):
        options = RunnerOptions(device="cuda", allow_plan_code=True)
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
            read_plan(plan, ENGINE)

    def test_only_an_engine_that_was_verified_on_this_gpu_is_loaded_without_a_word(
        self, library, plan, monkeypatch
    ):
        monkeypatch.setattr(
            execution, "CudaDevice", lambda index, high_priority: FakeDevice(library.calls)
        )
        flavor = execution.FLAVORS["tensorrt"]
        for verified_on, warning in (
            (None, r"never compared with PyTorch on a GPU: .*coprs-deploy verify"),
            ("NVIDIA A100", "never compared .* on this NVIDIA L4, only on NVIDIA A100"),
        ):
            with pytest.warns(execution.UnverifiedEngineWarning, match=warning):
                execution.open_plan(flavor, plan, SPEC, CUDA, engine(verified_on=verified_on))
        execution.open_plan(flavor, plan, SPEC, CUDA, engine(verified_on="NVIDIA L4"))

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


class TestCalls:
    def test_the_first_call_runs_and_captures_and_later_ones_replay(self, library, plan):
        with open_runner(library, plan) as runner:
            library.calls.clear()
            runner(**inputs_of(2))
            first = names(library)
            library.calls.clear()
            runner(**inputs_of(2))
            again = names(library)
        fills = ["fill"] * len(SPEC.inputs)
        assert first == [
            "context",
            *["shape", "address"] * len(SPEC.inputs),
            "address",
            *fills,
            "execute",
            "capture",
            "execute",
            "copy out",
        ]
        assert again == [*fills, "replay", "copy out"]

    def test_without_capture_every_call_executes_on_the_own_stream(self, library, plan):
        options = RunnerOptions(device="cuda", cuda_graphs=False)
        with open_runner(library, plan, options) as runner:
            for _ in range(2):
                runner(**inputs_of(1))
        assert [call for call in library.calls if call[0] == "execute"] == [("execute", 7)] * 2
        assert "capture" not in names(library)

    def test_each_number_of_targets_has_its_own_context(self, library, plan):
        with open_runner(library, plan) as runner:
            for count in (1, 2, 1, 2):
                assert runner(**inputs_of(count))["prior_logits"].shape == (count, 1, 64, 64)
        assert names(library).count("context") == 2
        assert names(library).count("replay") == 2

    @pytest.mark.parametrize("count", [0, 5])
    def test_more_targets_than_the_engine_takes_are_refused(self, library, plan, count):
        with (
            open_runner(library, plan) as runner,
            pytest.raises(ValueError, match=f"given {count} targets; .* 1 to 4"),
        ):
            runner(**inputs_of(count))

    def test_a_failed_run_raises(self, library, plan):
        library.runs = False
        with (
            open_runner(library, plan) as runner,
            pytest.raises(RuntimeUnavailableError, match="could not run prior"),
        ):
            runner(**inputs_of(1))

    def test_closing_waits_for_the_gpu_once(self, library, plan):
        runner = open_runner(library, plan)
        runner.close()
        runner.close()
        assert names(library).count("synchronize") == 1

    def test_all_work_is_done_with_its_device_as_the_current_one(self, library, plan):
        with open_runner(library, plan) as runner:
            runner(**inputs_of(1))
        depth = 0
        for call in library.calls:
            depth += {"enter": 1, "leave": -1}.get(call[0], 0)
            assert depth == 1 or call[0] == "leave", call

    def test_kernels_that_cannot_be_kept_are_a_warning(self, library, plan):
        runner = open_runner(library, plan)
        runner._plan._compiled = SimpleNamespace(serialize=lambda: b"kernels")
        (plan.parent / "cache").write_text("a file stands in the way")
        with pytest.warns(UserWarning, match=r"will be compiled again.*COPRS_DEPLOY_CACHE"):
            runner.close()
        assert not runner._plan.is_open

    def test_it_says_what_it_is(self, library, plan):
        with open_runner(library, plan) as runner:
            assert runner.description == "tensorrt 10.9.0 on NVIDIA L4, never verified"
            assert runner.layers == ("layer 0",)
            assert runner.device_memory_bytes == 1234


class TestJoined:
    """Prior and mask decoder as one call."""

    @pytest.fixture
    def pair(self, library, plan):
        runners = []
        for name in ("prior", "mask_decoder"):
            library.spec = SPECS[name]
            device, cache = FakeDevice(library.calls), BuildCache(plan.parent / "cache")
            runners.append(
                PlanRunner(plan, SPECS[name], CUDA, engine=ENGINE, device=device, cache=cache)
            )
        library.calls.clear()
        yield runners
        for runner in runners:
            runner.close()

    @staticmethod
    def inputs(spec, count):
        return {t.name: np.zeros(t.shape_for(count), t.dtype) for t in spec.inputs}

    def test_it_takes_what_neither_gives_and_gives_what_both_give(self, pair):
        with pair[0].joined_with(pair[1]) as joined:
            assert [t.name for t in joined.spec.inputs] == [
                "image_embedding",
                "concentration",
                "unpadded_size",
            ]
            assert [t.name for t in joined.spec.outputs] == ["prior_logits", "mask_logits"]
            assert joined.spec.targets == SPEC.targets

    def test_both_run_on_one_stream_and_are_captured_as_one(self, library, pair):
        with pair[0].joined_with(pair[1]) as joined:
            for expected in (
                ["execute", "execute", "capture", "execute", "execute"],
                ["replay"],
            ):
                library.calls.clear()
                outputs = joined(**self.inputs(joined.spec, 2))
                made = [n for n in names(library) if n in ("execute", "capture", "replay")]
                assert made == expected
                assert names(library).count("fill") == 3
                assert names(library).count("copy out") == 2
        assert {name: array.shape for name, array in outputs.items()} == {
            "prior_logits": (2, 1, 64, 64),
            "mask_logits": (2, 1, 64, 64),
        }

    def test_the_prior_is_read_where_it_was_written(self, library, pair):
        with pair[0].joined_with(pair[1]) as joined:
            joined(**self.inputs(joined.spec, 1))
        addresses = [call[1:] for call in library.calls if call[0] == "address"]
        for name in ("prior_logits", "image_embedding"):
            found = [address for tensor, address in addresses if tensor == name]
            assert len(found) == 2 and len(set(found)) == 1

    def test_more_targets_than_the_engines_take_are_refused(self, pair):
        with (
            pair[0].joined_with(pair[1]) as joined,
            pytest.raises(ValueError, match="prior and mask_decoder was given 5 targets"),
        ):
            joined(**self.inputs(joined.spec, 5))

    def test_it_shares_no_stream_and_no_buffer_with_the_runners(self, library, pair):
        # The prior is asked alone by one thread while another asks for both.
        with pair[0].joined_with(pair[1]) as joined:
            assert joined._device not in (pair[0]._device, pair[1]._device)
            library.calls.clear()
            joined(**self.inputs(joined.spec, 1))
            pair[0](**self.inputs(pair[0].spec, 1))
        addresses = [call[2] for call in library.calls if call[:2] == ("address", "prior_logits")]
        assert len(addresses) == 3 and len(set(addresses)) == 2

    def test_nothing_runs_after_closing(self, library, pair):
        joined = pair[0].joined_with(pair[1])
        joined.close()
        library.calls.clear()
        with pytest.raises(CoPRSError, match="prior and mask_decoder was closed"):
            joined(**self.inputs(joined.spec, 1))
        assert names(library) == []

    def test_it_leaves_the_runners_usable(self, pair):
        with pair[0].joined_with(pair[1]):
            pass
        assert pair[0](**self.inputs(pair[0].spec, 1))

    def test_graphs_elsewhere_are_not_joined(self, pair):
        pair[1]._device.index = 1
        assert pair[0].joined_with(pair[1]) is None
        other = OnnxLike(SPECS["mask_decoder"], "another runtime")
        assert pair[0].joined_with(other) is None
        assert other.joined_with(pair[1]) is None


class OnnxLike(Runner):
    def _run(self, inputs):
        raise NotImplementedError

    def close(self):
        raise NotImplementedError
