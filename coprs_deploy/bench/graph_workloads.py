"""Graphs through any runtime as workloads; PyTorch and segment-anything's encoder beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from coprs_deploy.bench.accuracy import GraphReference
from coprs_deploy.bench.case import Values, Workload, read_inputs
from coprs_deploy.bench.fixtures import ALL_GRAPHS
from coprs_deploy.bundle import Bundle, read_manifest
from coprs_deploy.checkpoint import load_segmentation_model, read_checkpoint
from coprs_deploy.conversion.peer_encoder import segment_anything_encoder
from coprs_deploy.engines import Runner, RunnerOptions, open_graph
from coprs_deploy.engines.torch_runner import TorchRunner
from coprs_deploy.specs import GRAPH_NAMES, IMAGE_ENCODER, MASK_DECODER, PRIOR, graph_specs

TORCH_TYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def open_bundle_graphs(
    bundle: Path,
    runtime: str,
    graph: str,
    inputs: GraphReference,
    *,
    device: str = "cpu",
    inference_precision: str = "fp32",
    repeat: int = 1,
) -> Workload:
    """Open graphs of a bundle: one, several (``prior+mask_decoder``) or all three.

    Image and concentration of an input are repeated ``repeat`` times in one call.
    """
    # Its files were checked when it was made or first opened; here the time to open is measured.
    opened = Bundle(bundle, read_manifest(bundle))
    options = RunnerOptions(device=device, inference_precision=inference_precision)
    runners = {}
    for name in GRAPH_NAMES if graph == ALL_GRAPHS else graph.split("+"):
        record, path = opened.manifest.graphs[name], opened.graph_path(name)
        runners[name] = open_graph(runtime, path, record.spec, options, record.engine)
    return _open_runners(runners, inputs, device, repeat)


def open_rounded_graphs(checkpoint: Path, folder: Path, inputs: GraphReference) -> Workload:
    """Open the three graphs of a precision with their roundings explicit, on the CPU."""
    config, options = read_checkpoint(checkpoint).config.model, RunnerOptions()
    specs = graph_specs(config.geometry, config.policy_hidden_size)
    paths = {name: folder / f"{name}.onnx" for name in GRAPH_NAMES}
    runners = {n: open_graph("onnxruntime", p, specs[n], options) for n, p in paths.items()}
    return _open_runners(runners, inputs)


def open_module(
    checkpoint: Path,
    graph: str,
    inputs: GraphReference,
    *,
    precision: str,
    device: str,
    compiled: bool = False,
    segment_anything: bool = False,
) -> Workload:
    """Open a graph, or all three, as PyTorch modules; or segment-anything's own image encoder.

    In another precision, inputs are cast to it and outputs back, as in a graph.
    """
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    source, options = read_checkpoint(checkpoint), RunnerOptions(device=device)
    config, dtype = source.config.model, getattr(torch, TORCH_TYPES[precision])

    def cast(_: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(each.to(dtype) if each.is_floating_point() else each for each in arguments)

    modules: Mapping[str, Any]
    if segment_anything:
        modules = {IMAGE_ENCODER: segment_anything_encoder(source)}
    else:
        modules = load_segmentation_model(source).graph_modules()
    specs, runners = graph_specs(config.geometry, config.policy_hidden_size), {}
    for name in modules if graph == ALL_GRAPHS else [graph]:
        module: Any = torch.compile(modules[name]) if compiled else modules[name]
        module.register_forward_pre_hook(cast)
        module.register_forward_hook(lambda _, arguments, output: output.float())
        runners[name] = TorchRunner(module.to(dtype), specs[name], options)
    return _open_runners(runners, inputs, device)


def open_exported_onnxruntime(
    path: Path, inputs: GraphReference, device: str, precision: str
) -> Workload:
    """Open an exported encoder in a default session of ONNX Runtime, on CUDA without TF32."""
    import onnxruntime

    name, options = "CPUExecutionProvider", dict[str, str]()
    if device.startswith("cuda"):
        name, options = "CUDAExecutionProvider", {"use_tf32": "0"}
        onnxruntime.preload_dlls()  # the CUDA libraries of PyTorch's wheels
    session = onnxruntime.InferenceSession(path, providers=[(name, options)])
    if session.get_providers()[0] != name:
        raise RuntimeError(f"ONNX Runtime chose {session.get_providers()[0]}, not {name}")

    def call(sample: Values) -> Values:
        return {"image_embedding": session.run(None, {"image": sample["image"]})[0]}

    return _GraphWorkload(call, inputs)


def open_exported_openvino(
    path: Path, inputs: GraphReference, device: str, precision: str
) -> Workload:
    """Open an exported encoder in OpenVINO; bf16 is its default on processors with such units."""
    from coprs_deploy.engines.openvino_runner import openvino_core

    hint = {"INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[precision]}
    request = openvino_core().compile_model(path, device.upper(), hint).create_infer_request()

    def call(sample: Values) -> Values:
        return {"image_embedding": request.infer({"image": sample["image"]})[0]}

    return _GraphWorkload(call, inputs)


def _open_runners(
    runners: Mapping[str, Runner], inputs: GraphReference, device: str = "cpu", repeat: int = 1
) -> Workload:
    """Open runners in a row: each is fed with the inputs and the outputs of those before it."""
    row, owned = list(runners.values()), list(runners.values())
    if PRIOR in runners and MASK_DECODER in runners:
        fused = runners[PRIOR].fused_with(runners[MASK_DECODER])
        if fused is not None:  # as a request runs them
            row[-2:] = [fused]
            owned.insert(0, fused)

    def call(sample: Values) -> Mapping[str, Any]:
        known: dict[str, Any] = dict(sample)
        outputs: dict[str, Any] = {}
        for runner in row:
            outputs |= runner(**{tensor.name: known[tensor.name] for tensor in runner.spec.inputs})
            known |= outputs
        if device.startswith("cuda"):  # a run ends when the device has finished
            import torch

            torch.cuda.synchronize()
        return outputs

    return _GraphWorkload(call, inputs, repeat, owned)


@dataclass
class _GraphWorkload(Workload):
    """A function of graph inputs, measured with the first of them."""

    call: Callable[[Values], Mapping[str, Any]]
    inputs: GraphReference
    repeat: int = 1
    owned: Sequence[Runner] = ()

    def __post_init__(self) -> None:
        self._first = self._repeated(next(read_inputs(self.inputs.folder)))

    def _repeated(self, sample: Values) -> Values:
        if self.repeat == 1:
            return sample
        names = ("image", "concentration")
        return sample | {n: np.repeat(sample[n][:1], self.repeat, axis=0) for n in names}

    def run(self) -> Mapping[str, float]:
        self.call(self._first)
        return {}

    def _outputs(self, sample: Values) -> Values:
        """Return the outputs of a sample on the host; of a repeated one, the last."""
        outputs = self.call(self._repeated(sample)).items()
        found = {name: v if isinstance(v, np.ndarray) else v.numpy() for name, v in outputs}
        last = slice(-1, None) if self.repeat > 1 else slice(None)
        return {name: value[last].astype(np.float32) for name, value in found.items()}

    def finish(self) -> Mapping[str, Any]:
        return {"accuracy": self.inputs.accuracy(self._outputs)}

    def close(self) -> None:
        for runner in self.owned:
            runner.close()
