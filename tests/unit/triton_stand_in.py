"""Stand-in for ``triton_python_backend_utils``: the part that the Python model uses.

Models of a repository run in ONNX Runtime. Names, types and shapes of all tensors are checked
against ``config.pbtxt``, which is parsed with Triton's own schema, as the server does.
"""

import importlib.metadata
import importlib.util
import types

import numpy as np
import onnxruntime
from google.protobuf import text_format

NUMPY_TYPES = {
    "TYPE_FP32": np.float32,
    "TYPE_INT64": np.int64,
    "TYPE_BOOL": np.bool_,
    "TYPE_STRING": np.object_,
}


def model_config_schema():
    """Load the generated module of ``model_config.proto`` alone; its package imports a client."""
    files = importlib.metadata.files("tritonclient")
    (file,) = (f for f in files if str(f) == "tritonclient/grpc/model_config_pb2.py")
    spec = importlib.util.spec_from_file_location("triton_model_config_pb2", file.locate())
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SCHEMA = model_config_schema()


def read_config(folder):
    """Parse the configuration of a model; unknown fields and values are errors."""
    text = (folder / "config.pbtxt").read_text(encoding="utf-8")
    return text_format.Parse(text, SCHEMA.ModelConfig())


def check_tensors(described, tensors):
    """Check names, types and shapes against the ``input`` or ``output`` of a configuration."""
    expected = {each.name: each for each in described}
    assert {tensor.name() for tensor in tensors} == expected.keys()
    for tensor in tensors:
        config, array = expected[tensor.name()], tensor.as_numpy()
        assert array.dtype == NUMPY_TYPES[SCHEMA.DataType.Name(config.data_type)], tensor.name()
        assert len(array.shape) == len(config.dims), tensor.name()
        assert all(d in (-1, n) for d, n in zip(config.dims, array.shape, strict=True)), config


class Tensor:
    def __init__(self, name, array):
        assert isinstance(array, np.ndarray)
        self._name, self._array = name, array

    def name(self):
        return self._name

    def as_numpy(self):
        return self._array


class TritonError:
    INVALID_ARG, INTERNAL = "invalid argument", "internal"

    def __init__(self, message, code=INTERNAL):
        self._message, self.code = message, code

    def message(self):
        return self._message


class InferenceResponse:
    def __init__(self, output_tensors, error=None):
        self._tensors, self._error = output_tensors, error

    def output_tensors(self):
        return self._tensors

    def has_error(self):
        return self._error is not None

    def error(self):
        return self._error


class Request:
    """A request to the Python model."""

    def __init__(self, **arrays):
        self.tensors = [Tensor(*pair) for pair in arrays.items()]


def stand_in(repository):
    """Return the module for a model repository, and the names of the models that it ran."""
    module = types.ModuleType("triton_python_backend_utils")
    calls = []

    class InferenceRequest:
        def __init__(self, model_name, requested_output_names, inputs, preferred_memory):
            assert preferred_memory == "cpu"
            self._folder, self._inputs = repository / model_name, inputs
            self._names = requested_output_names

        def exec(self):
            config = read_config(self._folder)
            assert config.backend == "onnxruntime"
            check_tensors(config.input, self._inputs)
            path = self._folder / "1" / config.default_model_filename
            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            feed = {tensor.name(): tensor.as_numpy() for tensor in self._inputs}
            calls.append(config.name)
            outputs = [
                Tensor(*p) for p in zip(self._names, session.run(self._names, feed), strict=True)
            ]
            check_tensors(config.output, outputs)
            return InferenceResponse(outputs)

    module.InferenceRequest = InferenceRequest
    module.InferenceResponse, module.Tensor, module.TritonError = (
        InferenceResponse,
        Tensor,
        TritonError,
    )
    module.TRITONSERVER_MEMORY_CPU, module.PreferredMemory = "cpu", lambda kind: kind
    module.get_input_tensor_by_name = lambda request, name: _named(request.tensors, name)
    module.get_output_tensor_by_name = lambda response, name: _named(
        response.output_tensors(), name
    )
    return module, calls


def _named(tensors, name):
    return next((tensor for tensor in tensors if tensor.name() == name), None)
