"""What people would use instead: PyTorch eager and compiled, and segment-anything's own encoder.

All with the same weights as the graphs. The encoder of segment-anything is also exported as it is,
by ``torch.onnx.export`` with its defaults, and run by the default session of a runtime.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from coprs_deploy.benchmarks.arrays import OUTPUT_FILE, read_inputs, write_arrays
from coprs_deploy.benchmarks.case import Subject
from coprs_deploy.benchmarks.graph_subjects import CHAIN, RunnerSubject
from coprs_deploy.checkpoint import (
    SEGMENTATION_FILE,
    Checkpoint,
    load_segmentation_model,
    read_checkpoint,
)
from coprs_deploy.engines import Runner, RunnerOptions
from coprs_deploy.engines.torch_runner import TorchRunner, TorchTensor
from coprs_deploy.specs import IMAGE_ENCODER, GraphSpec, graph_specs

if TYPE_CHECKING:
    import torch

TORCH_TYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


class TypedRunner(TorchRunner):
    """A module in another precision; inputs are brought to it and outputs back, as in a graph."""

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
        given: dict[str, Any] = dict(super()._run(inputs))
        return {n: TorchTensor(v.tensor.float()) for n, v in given.items()}


def open_module(
    checkpoint: str,
    graph: str,
    inputs: str,
    *,
    precision: str,
    device: str = "cpu",
    compiled: bool = False,
) -> Subject:
    """Open one stage of a checkpoint, or all three, as this package's PyTorch modules."""
    source = read_checkpoint(checkpoint)
    stages = load_segmentation_model(source).graph_modules()
    modules = stages if graph == CHAIN else {graph: stages[graph]}
    return _torch_subject(
        modules, source, inputs, precision=precision, device=device, compiled=compiled
    )


def open_segment_anything(
    checkpoint: str, inputs: str, *, precision: str, device: str = "cpu", compiled: bool = False
) -> Subject:
    """Open segment-anything's own image encoder with a checkpoint's weights."""
    source = read_checkpoint(checkpoint)
    modules = {IMAGE_ENCODER: segment_anything_encoder(checkpoint)}
    return _torch_subject(
        modules, source, inputs, precision=precision, device=device, compiled=compiled
    )


def _torch_subject(
    modules: Mapping[str, torch.nn.Module],
    source: Checkpoint,
    inputs: str,
    *,
    precision: str,
    device: str,
    compiled: bool,
) -> Subject:
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    config = source.config.model
    specs = graph_specs(config.geometry, config.policy_width)
    options = RunnerOptions(device=device)
    runners: dict[str, Runner] = {}
    for name, module in modules.items():
        ready: Any = torch.compile(module) if compiled else module
        runners[name] = TypedRunner(ready, specs[name], options, precision)
    return RunnerSubject(runners, inputs, device)


def segment_anything_encoder(checkpoint: str) -> torch.nn.Module:
    """Build segment-anything's encoder in a checkpoint's size and fill it with its weights.

    Raises:
        ImportError: segment-anything is not installed.
    """
    import torch
    from safetensors.torch import load_file

    source = read_checkpoint(checkpoint)
    sam = source.config.model.sam
    geometry = sam.geometry
    encoder: torch.nn.Module = _image_encoder_class()(
        depth=sam.encoder_depth,
        embed_dim=sam.encoder_width,
        img_size=geometry.image_size,
        mlp_ratio=sam.mlp_ratio,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
        num_heads=sam.encoder_heads,
        patch_size=geometry.patch_size,
        qkv_bias=True,
        use_rel_pos=sam.relative_positions,
        global_attn_indexes=sam.global_attention_blocks,
        window_size=sam.window_size,
        out_chans=geometry.embedding_channels,
    )
    prefix = f"{IMAGE_ENCODER}."
    stored = load_file(source.path / SEGMENTATION_FILE)
    weights = {
        name.removeprefix(prefix): tensor.to(torch.float32)
        for name, tensor in stored.items()
        if name.startswith(prefix)
    }
    encoder.load_state_dict(weights)
    return encoder.requires_grad_(False).eval()


def _image_encoder_class() -> Any:
    """Import the encoder alone: the package itself imports torchvision, which may not be here."""
    spec = importlib.util.find_spec("segment_anything")
    if spec is None or spec.submodule_search_locations is None:
        raise ImportError("segment-anything is not installed; pip install segment-anything")
    package = types.ModuleType("segment_anything")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules.setdefault("segment_anything", package)
    return importlib.import_module("segment_anything.modeling").ImageEncoderViT


def export_segment_anything(checkpoint: str, out: str) -> dict[str, Any]:
    """Export that encoder as it is, with the exporter's defaults; the weights stand beside it."""
    import torch

    source = read_checkpoint(checkpoint)
    size = source.config.model.geometry.image_size
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    torch.onnx.export(
        segment_anything_encoder(checkpoint),
        (torch.zeros(1, 3, size, size),),
        out,
        input_names=["image"],
        output_names=["image_embedding"],
        dynamo=True,
        external_data=True,
        verbose=False,
    )
    return {}


def open_exported_onnxruntime(path: str, inputs: str, device: str = "cpu") -> Subject:
    """Open an exported encoder in a default session of ONNX Runtime, on CUDA without TF32."""
    import onnxruntime

    provider: str | tuple[str, dict[str, str]] = "CPUExecutionProvider"
    if device.startswith("cuda"):
        provider = ("CUDAExecutionProvider", {"use_tf32": "0"})
        onnxruntime.preload_dlls()  # the CUDA libraries that PyTorch's wheels brought
    session = onnxruntime.InferenceSession(path, providers=[provider])
    wanted = provider if isinstance(provider, str) else provider[0]
    if session.get_providers()[0] != wanted:
        raise RuntimeError(f"ONNX Runtime chose {session.get_providers()[0]}, not {wanted}")
    return _CallSubject(lambda image: session.run(None, {"image": image})[0], inputs)


def open_exported_openvino(path: str, inputs: str, precision: str) -> Subject:
    """Open an exported encoder in OpenVINO, compiled for the CPU.

    Its default is bf16 where the processor has units for it, and fp32 elsewhere.
    """
    from coprs_deploy.engines.openvino_runner import openvino_core

    hint = {"fp32": "f32", "bf16": "bf16"}[precision]
    compiled = openvino_core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": hint})
    request = compiled.create_infer_request()
    return _CallSubject(lambda image: request.infer({"image": image})[0], inputs)


class _CallSubject(Subject):
    """A function from the image to the embedding, host arrays in and out."""

    def __init__(self, call: Any, inputs: str) -> None:
        self._call = call
        self._inputs = inputs
        self._image = next(read_inputs(inputs))["image"]

    def run(self) -> Mapping[str, float]:
        """Encode the first image."""
        self._call(self._image)
        return {}

    def finish(self, folder: Path) -> Mapping[str, Any]:
        """Leave the embedding of every image."""
        found = {
            f"{index}.image_embedding": np.array(self._call(sample["image"]))
            for index, sample in enumerate(read_inputs(self._inputs))
        }
        write_arrays(folder / OUTPUT_FILE, found)
        return {}
