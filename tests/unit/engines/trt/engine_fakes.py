"""TensorRT, its engines and a GPU, played: which calls are made, in which order, on what."""

import hashlib
from contextlib import contextmanager
from types import SimpleNamespace

import msgspec
import numpy as np

from coprs_deploy.bundle import EngineRecord
from coprs_deploy.engines import RunnerOptions
from coprs_deploy.engines.cache import BuildCache
from coprs_deploy.engines.cuda import Gpu
from coprs_deploy.engines.trt import runner as execution
from coprs_deploy.engines.trt.runner import TrtRunner
from coprs_deploy.specs import Geometry, OptimizationProfile, graph_specs

PLAN = b"a plan"
CUDA = RunnerOptions(device="cuda")
L4 = Gpu("NVIDIA L4", "sm_89")
ENGINE = EngineRecord(
    variant="tensorrt",
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
GEOMETRY = Geometry(image_size=128, patch_size=8, out_chans=64)
SPECS = graph_specs(GEOMETRY, 64, OptimizationProfile(1, 2, 4))
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


def play(monkeypatch, library):
    variant = SimpleNamespace(
        name="tensorrt", title="TensorRT", builds_without_gpu=False, load=lambda: library
    )
    monkeypatch.setitem(execution.TRT_VARIANTS, "tensorrt", variant)
    return library


def open_runner(library, plan, options=CUDA, record=ENGINE):
    cache = BuildCache(plan.parent / "cache")
    device = FakeDevice(library.calls)
    return TrtRunner(plan, SPEC, options, engine=record, device=device, cache=cache)


def inputs_of(count):
    shapes = {
        t.name: tuple(count if isinstance(s, str) else s for s in t.shape) for t in SPEC.inputs
    }
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


def names(library):
    """The calls, but for those that change the current device."""
    return [call[0] for call in library.calls if call[0] not in ("enter", "leave")]
