"""Peers as workloads, with the same weights: PyTorch modules and segment-anything's own encoder.

segment-anything's encoder is also exported with the defaults of ``torch.onnx.export`` and run by
the default session of ONNX Runtime and OpenVINO.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from coprs_deploy.bench.case import OUTPUT_FILE, Workload, read_inputs, write_arrays
from coprs_deploy.bench.graph_workloads import ALL_GRAPHS, RunnerWorkload
from coprs_deploy.checkpoint import load_segmentation_model, read_checkpoint
from coprs_deploy.conversion.peer_encoder import segment_anything_encoder
from coprs_deploy.engines import RunnerOptions
from coprs_deploy.engines.torch_runner import TorchRunner, TorchTensor
from coprs_deploy.specs import IMAGE_ENCODER, GraphSpec, graph_specs

if TYPE_CHECKING:
    import torch

TORCH_TYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


class _TypedRunner(TorchRunner):
    """A module in another precision; inputs are cast to it and outputs back, as in a graph."""

    def __init__(
        self, module: torch.nn.Module, spec: GraphSpec, options: RunnerOptions, precision: str
    ) -> None:
        import torch

        self._dtype = getattr(torch, TORCH_TYPES[precision])
        super().__init__(module.to(self._dtype), spec, options)

    def _tensor(self, value: Any) -> torch.Tensor:
        tensor = super()._tensor(value)
        return tensor.to(self._dtype) if tensor.is_floating_point() else tensor

    def _run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        outputs: dict[str, Any] = dict(super()._run(inputs))
        return {name: TorchTensor(value.tensor.float()) for name, value in outputs.items()}


def open_module(
    checkpoint: str,
    graph: str,
    inputs: str,
    *,
    precision: str,
    device: str,
    compiled: bool = False,
    segment_anything: bool = False,
) -> Workload:
    """Open a graph, or all three, as PyTorch modules; or segment-anything's own image encoder."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    source, options = read_checkpoint(checkpoint), RunnerOptions(device=device)
    modules: Mapping[str, Any]
    if segment_anything:
        modules = {IMAGE_ENCODER: segment_anything_encoder(source)}
    else:
        modules = load_segmentation_model(source).graph_modules()
    specs = graph_specs(source.config.model.geometry, source.config.model.policy_hidden_size)
    runners = {}
    for name in modules if graph == ALL_GRAPHS else [graph]:
        module: Any = torch.compile(modules[name]) if compiled else modules[name]
        runners[name] = _TypedRunner(module, specs[name], options, precision)
    return RunnerWorkload(runners, inputs, device)


def open_exported_onnxruntime(path: str, inputs: str, device: str, precision: str) -> Workload:
    """Open an exported encoder in a default session of ONNX Runtime, on CUDA without TF32."""
    import onnxruntime

    name = "CUDAExecutionProvider" if device.startswith("cuda") else "CPUExecutionProvider"
    provider: Any = name
    if device.startswith("cuda"):
        provider = (name, {"use_tf32": "0"})
        onnxruntime.preload_dlls()  # the CUDA libraries of PyTorch's wheels
    session = onnxruntime.InferenceSession(path, providers=[provider])
    if session.get_providers()[0] != name:
        raise RuntimeError(f"ONNX Runtime chose {session.get_providers()[0]}, not {name}")
    return _CallWorkload(lambda image: session.run(None, {"image": image})[0], inputs)


def open_exported_openvino(path: str, inputs: str, device: str, precision: str) -> Workload:
    """Open an exported encoder in OpenVINO; bf16 is its default on processors with such units."""
    from coprs_deploy.engines.openvino_runner import openvino_core

    hint = {"INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[precision]}
    request = openvino_core().compile_model(path, device.upper(), hint).create_infer_request()
    return _CallWorkload(lambda image: request.infer({"image": image})[0], inputs)


class _CallWorkload(Workload):
    """A function from the image to the embedding, host arrays in and out."""

    def __init__(self, call: Any, inputs: str) -> None:
        self._call, self._inputs = call, inputs
        self._image = next(read_inputs(inputs))["image"]

    def run(self) -> Mapping[str, float]:
        self._call(self._image)
        return {}

    def finish(self, folder: Path) -> Mapping[str, Any]:
        images = [sample["image"] for sample in read_inputs(self._inputs)]
        found = {f"{i}.image_embedding": np.array(self._call(x)) for i, x in enumerate(images)}
        write_arrays(folder / OUTPUT_FILE, found)
        return {}
