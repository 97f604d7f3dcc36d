"""Errors of an int8 image encoder against float32, by transformer block or by product."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
from numpy.typing import NDArray

from coprs_deploy.engines import RunnerOptions, open_graph
from coprs_deploy.engines.runner import Array
from coprs_deploy.export.calibration import Ranges
from coprs_deploy.export.equivalence import relative_error
from coprs_deploy.export.onnx_graph import SCOPES, module_of
from coprs_deploy.specs import GraphSpec, TensorSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from coprs_deploy.models.image_encoder import ImageEncoder
    from coprs_deploy.models.sam_encoder import SamImageEncoder

NUM_SHOWN = 8
"""Number of products listed, those with the largest error first."""


def describe_int8_errors(
    encoder: ImageEncoder,
    candidate: Path,
    spec: GraphSpec,
    image: NDArray[np.float32],
    ranges: Ranges,
) -> str:
    """Describe where an int8 image encoder loses accuracy.

    SAM's is compared block by block, see :func:`describe_block_errors`; for others, the products
    whose inputs have the largest rounding errors are listed.
    """
    from coprs_deploy.models.sam_encoder import SamImageEncoder

    if isinstance(encoder, SamImageEncoder):
        return describe_block_errors(encoder, candidate, spec, image, ranges)
    worst = sorted(ranges, key=lambda name: ranges[name].error, reverse=True)[:NUM_SHOWN]
    lines = [f"  {name}: {ranges[name].error:.2%}" for name in worst]
    return "\n".join(["Largest rounding errors of the inputs of products:", *lines])


def describe_block_errors(
    encoder: SamImageEncoder,
    candidate: Path,
    spec: GraphSpec,
    image: NDArray[np.float32],
    ranges: Ranges,
) -> str:
    """Compare the output of each block with float32, one line per block.

    A block's error includes those of the blocks before it. The last block is measured after the
    neck, as the error of the embedding. Each line names the matrix product of the block whose input
    has the largest rounding error. ``candidate`` is a graph for ONNX Runtime with float32 tensors
    between its blocks, ``image`` is (1, 3, S, S).
    """
    wanted = _run_reference(encoder, image)
    path = candidate.with_name(f"{candidate.stem}.blocks.onnx")
    outputs = _tap_blocks(candidate, path, [values.shape for values in wanted[:-1]])
    ordered = [*outputs, *spec.outputs]
    tapped = msgspec.structs.replace(spec, outputs=(*spec.outputs, *outputs))
    try:
        with open_graph("onnxruntime", path, tapped, RunnerOptions()) as runner:
            found = runner(image=image)
    finally:
        path.unlink(missing_ok=True)
    lines = ["Relative error of each block's output against float32, blocks before it included:"]
    for number, (tensor, expected) in enumerate(zip(ordered, wanted, strict=True)):
        error = relative_error(found[tensor.name].numpy(), expected, order=2)
        prefix, neck = f"blocks.{number}.", ", after the neck" if tensor in spec.outputs else ""
        product = max((n for n in ranges if n.startswith(prefix)), key=lambda n: ranges[n].error)
        lines.append(
            f"  block {number}: {error:.2%}{neck}; rounding error of the input of "
            f"{product.removeprefix(prefix)}: {ranges[product].error:.2%}"
        )
    return "\n".join(lines)


def _tap_blocks(source: Path, target: Path, shapes: Sequence[tuple[int, ...]]) -> list[TensorSpec]:
    """Add the input of each next block's first norm as an output; weights stay in place."""
    import onnx

    model = onnx.load(source, load_external_data=False)
    norms = {}
    for node in model.graph.node:
        if node.op_type == "LayerNormalization":
            scopes = {entry.key: entry.value for entry in node.metadata_props}.get(SCOPES)
            norms[module_of(scopes)] = node
    outputs = []
    for number, shape in enumerate(shapes):
        name, value = f"block_{number}", norms[f"blocks.{number + 1}.norm1"].input[0]
        model.graph.node.append(onnx.helper.make_node("Identity", [value], [name], name=name))
        info = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        model.graph.output.append(info)
        outputs.append(TensorSpec(name, "float32", shape))
    onnx.save(model, target)
    return outputs


def _run_reference(encoder: SamImageEncoder, image: NDArray[np.float32]) -> list[Array]:
    """Return the input of each block but the first, and the embedding."""
    import torch

    seen: list[Array] = []

    def record(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0].numpy())

    hooks = [block.register_forward_pre_hook(record) for block in encoder.blocks[1:]]
    try:
        with torch.inference_mode():
            embedding = encoder(torch.from_numpy(image)).numpy()
    finally:
        for hook in hooks:
            hook.remove()
    return [*seen, embedding]
