"""Error of each transformer block of an int8 image encoder against float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
from numpy.typing import NDArray

from coprs_deploy.engines.runner import Array, Runner
from coprs_deploy.export.calibration import Ranges
from coprs_deploy.export.equivalence import relative_error
from coprs_deploy.export.onnx_graph import SCOPES, module_of
from coprs_deploy.specs import GraphSpec, TensorSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from coprs_deploy.models.sam_encoder import SamImageEncoder


@dataclass(frozen=True)
class BlockError:
    """Error of one block's output, including the errors of all blocks before it.

    Attributes:
        block: block number.
        relative_error: norm of the difference over the norm of the float32 output.
        product: matrix product of the block whose input has the largest rounding error.
        input_error: relative rounding error of that input.
    """

    block: int
    relative_error: float
    product: str
    input_error: float


def block_errors(
    encoder: SamImageEncoder,
    candidate: Path,
    open_candidate: Callable[[Path, GraphSpec], Runner],
    spec: GraphSpec,
    *,
    images: Sequence[NDArray[np.float32]],
    ranges: Ranges,
) -> list[BlockError]:
    """Compare the output of each block with float32.

    The last block is measured after the neck, as the error of the embedding. Padding that joins
    between two blocks is included.

    Args:
        encoder: float32 reference.
        candidate: graph file with float32 tensors between its blocks.
        open_candidate: opens a copy of it with additional outputs.
        spec: inputs and outputs of the graph.
        images: (1, 3, S, S) inputs.
        ranges: calibration ranges of the candidate's matrix products.

    Returns:
        One error per block, worst case over the images; the last is that of the embedding.
    """
    path = candidate.with_name(f"{candidate.stem}.blocks.onnx")
    outputs = _tap_blocks(
        candidate, path, [values.shape for values in _run_reference(encoder, images[0])[:-1]]
    )
    tapped = msgspec.structs.replace(spec, outputs=(*spec.outputs, *outputs))
    names = [tensor.name for tensor in (*outputs, *spec.outputs)]
    worst = [0.0] * len(names)
    try:
        with open_candidate(path, tapped) as runner:
            for image in images:
                found = runner(image=image)
                for number, wanted in enumerate(_run_reference(encoder, image)):
                    error = relative_error(found[names[number]].numpy(), wanted, order=2)
                    worst[number] = max(worst[number], error)
    finally:
        path.unlink(missing_ok=True)
    return [
        BlockError(number, error, *_worst_product(ranges, number))
        for number, error in enumerate(worst)
    ]


def describe(errors: Sequence[BlockError]) -> str:
    """Format the errors, one line per block."""
    lines = [
        f"  block {error.block}: {error.relative_error:.2%}"
        f"{', after the neck' if error is errors[-1] else ''}; rounding error of the input of "
        f"{error.product}: {error.input_error:.2%}"
        for error in errors
    ]
    header = "Relative error of each block's output against float32, blocks before it included:"
    return "\n".join([header, *lines])


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


def _worst_product(ranges: Ranges, number: int) -> tuple[str, float]:
    prefix = f"blocks.{number}."
    inside: Mapping[str, float] = {
        name.removeprefix(prefix): found.error
        for name, found in ranges.items()
        if name.startswith(prefix)
    }
    name = max(inside, key=lambda key: inside[key])
    return name, inside[name]
