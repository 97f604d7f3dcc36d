"""A TensorRT and a GPU that compute: streams run late, CUDA graphs replay what was captured.

An engine file names the graph that it stands for, and an execution context computes that graph with
numpy on the buffers that it was bound to, when its stream runs. Streams run only when a result is
read, one operation of each stream in turn, so that missing waits and shared buffers give wrong
results. What a real GPU reports as an error is an assertion here.
"""

import hashlib
import itertools
import threading
import weakref
from collections import deque
from contextlib import contextmanager
from types import SimpleNamespace

import msgspec
import numpy as np

from coprs_deploy.bundle import EngineRecord
from coprs_deploy.engines import RunnerOptions
from coprs_deploy.engines.cuda import Gpu
from coprs_deploy.engines.runner import HostTensor
from coprs_deploy.engines.trt.engine import TrtEngine
from coprs_deploy.engines.trt.runner import TrtRunner
from coprs_deploy.engines.trt.variants import TRT_VARIANTS
from coprs_deploy.specs import Geometry, OptimizationProfile, graph_specs

L4 = Gpu("NVIDIA L4", "sm_89")
GEOMETRY = Geometry(image_size=16, patch_size=4, out_chans=2)
PROFILE = OptimizationProfile(1, 2, 4)
SPECS = graph_specs(GEOMETRY, 3, targets=PROFILE, images=PROFILE)
SPEC = SPECS["prior"]


def image_encoder(image):
    cells = image.reshape(len(image), 3, 4, 4, 4, 4).mean(axis=(3, 5))
    return {"image_embedding": np.stack([cells[:, 0] - cells[:, 1], cells[:, 2]], axis=1)}


def prior(image_embedding, concentration):
    scores = np.einsum("chw,nd->nhw", image_embedding[0], np.cumsum(concentration, axis=1))
    return {"prior_logits": np.kron(scores, np.ones((4, 4)))[:, None]}


def mask_decoder(image_embedding, prior_logits, unpadded_size):
    height, width = unpadded_size
    logits = 2 * prior_logits + image_embedding.mean()
    logits[..., height:, :] = logits[..., width:] = -50
    return {"mask_logits": logits}


GRAPHS = {"image_encoder": image_encoder, "prior": prior, "mask_decoder": mask_decoder}


def reference(name, **inputs):
    """Outputs of a graph, as its engine must compute them."""
    return {key: value.astype(np.float32) for key, value in GRAPHS[name](**inputs).items()}


def random_inputs(spec, count, seed=0):
    generator = np.random.default_rng(seed)
    return {
        t.name: generator.standard_normal(t.shape_for(count), dtype=np.float32)
        if t.dtype == "float32"
        else np.array([12, 16])
        for t in spec.inputs
    }


def file_content(name):
    return f"engine of {name}".encode()


def record(name="prior", **changes):
    data = file_content(name)
    base = EngineRecord(
        variant="tensorrt",
        version="10.9.0",
        compute_capabilities=("sm_89",),
        gpu="NVIDIA L4",
        hardware_compatible=False,
        version_compatible=False,
        workspace_bytes=None,
        graph_sha256="a" * 64,
        sha256=hashlib.sha256(data).hexdigest(),
        size_bytes=len(data),
        build_seconds=1.0,
        network_layers=3,
    )
    return msgspec.structs.replace(base, **changes)


class FakeGpu:
    """Memory by address and streams by handle."""

    def __init__(self):
        self.memory = {}
        self.streams = {}
        self.launches = []
        self.depth = 0
        self.during_capture = self.on_fill = lambda: None
        self._addresses = itertools.count(4096, 4096)

    def allocate(self, shape, dtype):
        assert self.depth, "the device is not the current one"
        address = next(self._addresses)
        array = np.full(shape, -7, dtype)
        self.memory[address] = array
        return SimpleNamespace(array=array, shape=shape, data_ptr=lambda: address)

    def new_stream(self):
        stream = FakeStream(self)
        self.streams[stream.handle] = stream
        return stream

    def run_until(self, is_done):
        """Run one operation of each stream in turn, the newest stream first."""
        while not is_done():
            ran = [stream.run_next() for stream in reversed(self.streams.values())]
            assert any(ran), "deadlock"


class FakeStream:
    _handles = itertools.count(7)

    def __init__(self, gpu):
        self.gpu, self.handle = gpu, next(self._handles)
        self.pending = deque()
        self.captured = None

    def enqueue(self, operation, waits_for=lambda: True):
        if self.captured is not None:
            self.captured.append(operation)
        else:
            self.pending.append((operation, waits_for))

    def run_next(self):
        if not self.pending or not self.pending[0][1]():
            return False
        operation, _ = self.pending.popleft()
        operation()
        return True


class FakeTensor:
    """An output that exists when its stream has run so far."""

    def __init__(self, gpu, shape, dtype):
        self.gpu, self.shape, self.dtype = gpu, shape, dtype
        self.array = None

    @property
    def is_ready(self):
        return self.array is not None

    def numpy(self):
        self.gpu.run_until(lambda: self.is_ready)
        return self.array.copy()

    def rows(self):
        return HostTensor(self.numpy()).rows()


class FakeDevice:
    """What ``CudaDevice`` is to the runners, on a :class:`FakeGpu`."""

    def __init__(self, fake_gpu, index=0, gpu=L4):
        self.fake, self.index, self.gpu = fake_gpu, index, gpu
        self.stream = fake_gpu.new_stream()
        self.stream_handle = self.stream.handle
        self._threads = set()

    def sibling(self):
        return FakeDevice(self.fake, self.index, self.gpu)

    @contextmanager
    def current(self):
        self.fake.depth += 1
        self._threads.add(threading.get_ident())
        try:
            yield
            assert len(self._threads) == 1, "two threads use one stream at once"
        finally:
            self._threads.discard(threading.get_ident())
            self.fake.depth -= 1

    def empty(self, shape, dtype):
        return self.fake.allocate(shape, dtype)

    def fill(self, name, buffer, value):
        assert self.fake.depth, "the device is not the current one"
        self.fake.on_fill()
        assert (buffer.array.shape, str(buffer.array.dtype)) == (value.shape, str(value.dtype))
        if isinstance(value, FakeTensor):
            self.stream.enqueue(
                lambda: np.copyto(buffer.array, value.array), lambda: value.is_ready
            )
        else:
            array = (value if isinstance(value, np.ndarray) else value.numpy()).copy()
            self.stream.enqueue(lambda: np.copyto(buffer.array, array))

    def copy_out(self, buffer):
        assert self.fake.depth, "the device is not the current one"
        tensor = FakeTensor(self.fake, buffer.array.shape, str(buffer.array.dtype))
        self.stream.enqueue(lambda: setattr(tensor, "array", buffer.array.copy()))
        return tensor

    def capture(self, work):
        assert self.fake.depth, "the device is not the current one"
        self.synchronize()
        self.stream.captured = []
        try:
            work()
            self.fake.during_capture()
        finally:
            captured, self.stream.captured = self.stream.captured, None

        def replay():
            self.fake.launches.append("replay")
            for operation in captured:
                self.stream.enqueue(operation)

        return replay

    def synchronize(self):
        self.fake.run_until(lambda: not self.stream.pending)


class FakeLibrary:
    """TensorRT as far as a runner uses it."""

    LayerInformationFormat = SimpleNamespace(ONELINE="oneline")

    class ILogger:
        ERROR, INTERNAL_ERROR = 1, 0

    def __init__(self, gpu, version="10.9.0"):
        self.gpu, self.__version__ = gpu, version
        self.num_deserialized = 0
        self.num_compiled = 0
        self.changed_dtypes = {}
        self.accepts_files = self.accepts_runs = self.has_memory = True

    def Runtime(self, logger):
        return SimpleNamespace(deserialize_cuda_engine=lambda data: self._deserialize(data, logger))

    def _deserialize(self, data, logger):
        assert self.gpu.depth, "the device is not the current one"
        self.num_deserialized += 1
        if not self.accepts_files:
            logger.log(self.ILogger.ERROR, "magic tag does not match")
            return None
        name = data.decode().removeprefix("engine of ")
        return FakeEngine(self, SPECS[name])


class FakeEngine:
    device_memory_size_v2 = 1234
    num_layers = 1

    def __init__(self, library, spec):
        self.library, self.spec = library, spec
        self.tensors = {t.name: t for t in (*spec.inputs, *spec.outputs)}
        self.num_io_tensors = len(self.tensors)

    def get_tensor_name(self, index):
        return list(self.tensors)[index]

    def get_tensor_dtype(self, name):
        names = {"float32": "FLOAT", "int64": "INT64"}
        dtype = names[self.tensors[name].dtype]
        return SimpleNamespace(name=self.library.changed_dtypes.get(name, dtype))

    def get_tensor_shape(self, name):
        return [-1 if isinstance(size, str) else size for size in self.tensors[name].shape]

    def create_engine_inspector(self):
        return SimpleNamespace(get_layer_information=lambda i, form: f"layer {i}\n")

    def create_runtime_config(self):
        return FakeRuntimeConfig()

    def create_execution_context(self, config=None):
        assert self.library.gpu.depth, "the device is not the current one"
        return FakeContext(self, config) if self.library.has_memory else None


class FakeRuntimeConfig:
    """The runtime configuration of TensorRT for RTX: a cache of compiled kernels."""

    def create_runtime_cache(self):
        return FakeKernelCache()

    def set_runtime_cache(self, kernel_cache):
        self.kernel_cache = kernel_cache


class FakeKernelCache:
    def __init__(self):
        self.kernels = set()

    def deserialize(self, data):
        if not data.startswith(b"kernels:"):
            return False
        self.kernels = set(data.removeprefix(b"kernels:").decode().split(","))
        return True

    def serialize(self):
        return b"kernels:" + ",".join(sorted(self.kernels)).encode()


class FakeContext:
    """Computes its graph; like TensorRT's, it must run once before it can be captured."""

    def __init__(self, engine, config):
        self.library, self.spec = engine.library, engine.spec
        self.config = config
        self.shapes, self.addresses = {}, {}
        self.has_run = False

    def set_input_shape(self, name, shape):
        (tensor,) = (t for t in self.spec.inputs if t.name == name)
        fits = tensor.accepts(tensor.dtype, shape)
        dynamic = [n for n, s in zip(shape, tensor.shape, strict=fits) if isinstance(s, str)]
        fits = fits and all(PROFILE.min <= n <= PROFILE.max for n in dynamic)
        if fits:
            self.shapes[name] = shape
        return fits

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return name in {t.name for t in (*self.spec.inputs, *self.spec.outputs)}

    def execute_async_v3(self, stream_handle):
        gpu = self.library.gpu
        assert gpu.depth, "the device is not the current one"
        stream = gpu.streams[stream_handle]
        if not self.library.accepts_runs or (stream.captured is not None and not self.has_run):
            return False
        if not self.has_run and self.config is not None:
            self._compile(str(self.shapes))
        self.has_run = True
        if stream.captured is None:
            gpu.launches.append(self.spec.name)
        stream.enqueue(self._operation())
        return True

    def _compile(self, kernel):
        kernel = hashlib.sha256(kernel.encode()).hexdigest()
        self.library.num_compiled += kernel not in self.config.kernel_cache.kernels
        self.config.kernel_cache.kernels.add(kernel)

    def _operation(self):
        alive, memory = weakref.ref(self), self.library.gpu.memory
        shapes, addresses, name = dict(self.shapes), dict(self.addresses), self.spec.name
        outputs = [t.name for t in self.spec.outputs]

        def run():
            assert alive() is not None, "the context was freed before its work ran"
            inputs = {key: memory[addresses[key]].copy() for key in shapes}
            assert all(inputs[key].shape == shape for key, shape in shapes.items())
            results = reference(name, **inputs)
            for key in outputs:
                np.copyto(memory[addresses[key]], results[key])

        return run


def install(monkeypatch, library, variant="tensorrt"):
    """Make a fake library the one of a variant."""
    monkeypatch.setitem(
        TRT_VARIANTS,
        variant,
        SimpleNamespace(
            name=variant,
            title=TRT_VARIANTS[variant].title,
            builds_without_gpu=TRT_VARIANTS[variant].builds_without_gpu,
            load=lambda: library,
        ),
    )


class FakeMachine:
    """A GPU, a library and a folder of engine files."""

    def __init__(self, folder):
        self.folder = folder
        self.gpu = FakeGpu()
        self.library = FakeLibrary(self.gpu)
        for name in GRAPHS:
            self.path(name).write_bytes(file_content(name))

    def path(self, name="prior"):
        return self.folder / f"{name}.engine"

    def options(self, **changes):
        return RunnerOptions(device="cuda", cache_dir=self.folder / "cache", **changes)

    def open(self, name="prior", engine=None, device=None, **options):
        options, device = self.options(**options), device or FakeDevice(self.gpu)
        engine = TrtEngine(self.path(name), SPECS[name], options, engine or record(name), device)
        return TrtRunner(engine, device, options.cuda_graphs)
