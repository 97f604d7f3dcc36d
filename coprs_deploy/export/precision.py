"""Precision of a graph: convert a float32 graph to bf16 or fp16, and emulate its roundings.

Graphs are strongly typed: every tensor of a file has its type. Weights and matrix products become
bfloat16 or float16, except for :data:`FLOAT32_PARTS`. Inputs and outputs keep their names and stay
float32, so that graphs of any precision can be combined. :func:`write_rounded_graph` writes a
float32 graph with the same roundings, which any CPU can run.

Why an own pass: ONNX Runtime's converter only supports float16, and NVIDIA ModelOpt requires older
releases of onnx and onnxruntime than this package is tested with. The pass works on paths and
converts one weight at a time, so that it supports graphs above 2 GB.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from coprs_deploy.errors import import_failure
from coprs_deploy.export.onnx_graph import (
    EXTERNAL_DATA_BYTES,
    INSTALL,
    METADATA_PREFIX,
    OPSET,
    SCOPES,
    check_onnx_graph,
)
from coprs_deploy.specs import MASK_DECODER, PRIOR, GraphSpec

if TYPE_CHECKING:
    import onnx_ir as ir


FP32 = "fp32"
BF16 = "bf16"
FP16 = "fp16"
INT8 = "int8"
PRECISIONS = (FP32, BF16, FP16, INT8)
"""Accepted values of ``precision``; int8 applies to the image encoder's large products."""

INT8_RESTS: Mapping[str, str] = {
    "onnxruntime": FP32,
    "openvino": FP32,
    "tensorrt": FP16,
    "tensorrt-rtx": FP16,
}
"""Precision of the rest of an int8 export by runtime. float16 rounds eight times finer than
bfloat16; an overflow stops the export. ONNX Runtime's CPU provider computes float16 in float32."""

INT8_PRODUCTS = f"{METADATA_PREFIX}int8_products"
"""Metadata key of the list of int8 products."""

OPSETS: Mapping[str, int] = {FP32: OPSET, BF16: 22, FP16: OPSET, INT8: OPSET}
"""Opset of each precision; convolutions accept bfloat16 from opset 22 on."""


@dataclass(frozen=True)
class Float32Part:
    """Nodes that compute in float32 in graphs of some precisions.

    They are all nodes of an operator in one graph, or in every graph if it is None; with
    ``onwards``, the last one and all nodes after it. With ``module``, they are the nodes of the
    modules of that name, of any operator.
    """

    graph: str | None
    operator: str = ""
    onwards: bool = False
    precisions: tuple[str, ...] = (BF16, FP16)
    module: str = ""

    def selects(self, node: ir.Node) -> bool:
        """Whether a node has the operator, or is inside the module."""
        if self.module:
            scopes = ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))
            return any(str(scope).split(".")[-1] == self.module for scope in scopes)
        return node.op_type == self.operator


FLOAT32_PARTS = (
    # The variance sums squares: float16 overflows from 256 on, bfloat16 loses the mean.
    Float32Part(None, "LayerNormalization"),
    # Scores, fusion and resizing are a thousandth of the work; the heat map is read as logits.
    Float32Part(PRIOR, "MatMul", onwards=True),
    # Prior logits arrive in float32 and are combined with the padding's -50 before rounding.
    Float32Part(MASK_DECODER, "Where"),
    # TensorRT for RTX 1.7 cannot build a transposed convolution in bfloat16.
    Float32Part(None, "ConvTranspose", precisions=(BF16,)),
    # Sums over all cells, as in public EfficientViT code: float16 overflows, and their ratio
    # cancels in bfloat16.
    Float32Part(None, module="linear_attention"),
    # Its scales are float32 in ONNX; EfficientViT resizes three small tensors.
    Float32Part(None, "Resize"),
    # The last product sums few terms of both signs, and the mask is the sign of the sum.
    Float32Part(MASK_DECODER, "MatMul", onwards=True),
)
"""Nodes that keep float32.

Softmax is not included: runtimes sum in float32 inside the node, and casts around it would prevent
the fusion of the attention.
"""


def rest_precision(runtime: str, precision: str) -> str:
    """Return the precision outside the int8 products; others apply to the whole graph."""
    return INT8_RESTS[runtime] if precision == INT8 else precision


def low_type(precision: str) -> ir.DataType:
    """Return the element type of a precision's weights."""
    import onnx_ir as ir

    types = {FP32: ir.DataType.FLOAT, BF16: ir.DataType.BFLOAT16, FP16: ir.DataType.FLOAT16}
    return types[precision]


def type_graph(source: Path, target: Path, spec: GraphSpec, precision: str) -> None:
    """Write a float32 graph in bf16 or fp16, and check the file.

    The source has the opset in :data:`OPSETS`; its products may be int8. Inputs and outputs do not
    change. Large weights go to ``<target>.data``.

    Raises:
        MissingDependencyError: the exporter's packages are not installed.
        EquivalenceError: the written graph is not valid or has another signature.
    """
    assert precision in (BF16, FP16) and source != target
    model = load_graph(source)
    kept = float32_nodes(model.graph, spec.name, precision)
    _Typing(model.graph, low_type(precision)).apply(kept)
    names = [node.name or "" for node in model.graph if node in kept]
    if INT8_PRODUCTS not in model.metadata_props:
        model.metadata_props[f"{METADATA_PREFIX}precision"] = precision
    model.metadata_props[f"{METADATA_PREFIX}float32_nodes"] = json.dumps(names)
    save_graph(model, target)
    check_onnx_graph(target, spec)


def float32_nodes(graph: ir.Graph, name: str, precision: str) -> set[ir.Node]:
    """Return the nodes of a graph that :data:`FLOAT32_PARTS` selects."""
    nodes = list(graph)
    kept: set[ir.Node] = set()
    for part in FLOAT32_PARTS:
        if part.graph not in (None, name) or precision not in part.precisions:
            continue
        named = [i for i, node in enumerate(nodes) if part.selects(node)]
        if not named and part.graph is None:
            continue
        assert named, f"{name} has no {part.operator}; FLOAT32_PARTS is out of date"
        chosen = nodes[named[-1] :] if part.onwards else [nodes[i] for i in named]
        kept.update(chosen)
    return kept


def load_graph(path: Path) -> ir.Model:
    """Load a graph without its external weights.

    Raises:
        MissingDependencyError: the exporter's packages are not installed.
    """
    try:
        import onnx_ir as ir
    except ImportError as error:
        raise import_failure(error, "onnx_ir", INSTALL, title="onnx-ir") from error
    return ir.load(path)


def save_graph(model: ir.Model, path: Path) -> None:
    """Save a graph; weights too large for protobuf go to a file beside it."""
    import onnx_ir as ir

    values = model.graph.initializers.values()
    size = sum(value.const_value.nbytes for value in values if value.const_value is not None)
    is_large = size > EXTERNAL_DATA_BYTES
    if not is_large:  # else the file would refer to the external data of the source
        ir.external_data.load_to_model(model)
    ir.save(model, path, external_data=f"{path.name}.data" if is_large else None)


def convert_tensor(tensor: ir.TensorProtocol, dtype: ir.DataType) -> ir.LazyTensor:
    """Convert a weight lazily, so that only one is in memory at a time."""
    import onnx_ir as ir

    shape = ir.Shape(tensor.numpy().shape)

    def convert() -> ir.TensorProtocol:
        with np.errstate(over="ignore"):  # the equivalence check refuses infinite weights
            return ir.tensor(tensor.numpy().astype(dtype.numpy()), name=tensor.name)

    return ir.LazyTensor(convert, dtype, shape, name=tensor.name)


def _cast(value: ir.Value, dtype: ir.DataType, name: str, output: str) -> ir.Node:
    """Make a cast of a value with the names of node and output; the caller inserts it."""
    import onnx_ir as ir

    node = ir.node("Cast", [value], {"to": dtype.value}, name=name)
    (result,) = node.outputs
    result.name, result.shape, result.type = output, value.shape, ir.TensorType(dtype)
    return node


class _Typing:
    """Sets the type of every node, with casts between different types."""

    def __init__(self, graph: ir.Graph, low: ir.DataType) -> None:
        import onnx_ir as ir

        self._ir = ir
        self._graph = graph
        self._low = low
        self._float32 = ir.DataType.FLOAT
        self._casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def apply(self, kept: set[ir.Node]) -> None:
        values = [value for node in self._graph for value in node.outputs]
        values += [*self._graph.inputs, *self._graph.initializers.values()]
        original = {value: value.dtype for value in values}
        for node in list(self._graph):
            assert node.op_type not in ("Cast", "Constant"), node
            wanted = self._float32 if node in kept else self._low
            for index, value in enumerate(node.inputs):
                if value is not None and original[value] == self._float32:
                    node.replace_input_with(index, self._as(value, wanted, node))
            for value in node.outputs:
                if original[value] == self._float32:
                    value.type = self._ir.TensorType(wanted)
        for name, value in list(self._graph.initializers.items()):
            if not value.uses() and not value.is_graph_output():
                del self._graph.initializers[name]
        self._keep_output_types(original)

    def _as(self, value: ir.Value, dtype: ir.DataType, before: ir.Node) -> ir.Value:
        """Return a value in a type: the value itself, a converted weight, or a cast."""
        if value.dtype == dtype:
            return value
        if (value, dtype) not in self._casts:
            suffix = dtype.name.lower()
            if value.const_value is not None:
                converted = self._ir.Value(
                    name=f"{value.name}.{suffix}",
                    shape=value.shape,
                    type=self._ir.TensorType(dtype),
                    const_value=convert_tensor(value.const_value, dtype),
                )
                self._graph.register_initializer(converted)
            else:
                node = _cast(value, dtype, f"{value.name}.to_{suffix}", f"{value.name}.{suffix}")
                self._graph.insert_before(before, node)
                converted = node.outputs[0]
            self._casts[value, dtype] = converted
        return self._casts[value, dtype]

    def _keep_output_types(self, original: dict[ir.Value, ir.DataType | None]) -> None:
        for index, value in enumerate(self._graph.outputs):
            wanted, name = original[value], value.name
            if value.dtype == wanted or wanted is None:
                continue
            assert name is not None
            value.name = f"{name}.{self._low.name.lower()}"
            node = _cast(value, wanted, f"{value.name}.to_{wanted.name.lower()}", name)
            self._graph.append(node)
            self._graph.outputs[index] = node.outputs[0]


MOVES = frozenset(
    {"Concat", "Expand", "Flatten", "Gather", "Identity", "Pad"}
    | {"Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"}
)
"""Operators that only move values: rounded values stay rounded."""


def write_rounded_graph(source: Path, target: Path) -> int:
    """Write the float32 graph that rounds wherever a graph of :func:`type_graph` does.

    Returns:
        Number of rounded tensors, without weights.
    """
    import onnx_ir as ir

    assert source != target
    model = ir.load(source)
    graph, float32 = model.graph, ir.DataType.FLOAT
    types = {v: v.dtype for node in graph for v in node.outputs}
    halves = (ir.DataType.BFLOAT16, ir.DataType.FLOAT16)
    for value in graph.initializers.values():
        if value.dtype in halves:
            assert value.const_value is not None
            value.const_value = convert_tensor(value.const_value, float32)
            value.type = ir.TensorType(float32)
    num_rounded = 0
    for node in list(graph):
        if node.op_type == "Cast":
            node.attributes["to"] = ir.AttrInt64("to", float32.value)
        for value in node.outputs:
            half = types[value]
            if half not in halves:
                continue
            value.type = ir.TensorType(float32)
            if node.op_type in MOVES:
                continue
            assert half is not None and not value.is_graph_output()
            uses = list(value.uses())
            down = _cast(value, half, f"{value.name}.down", f"{value.name}.half")
            up = _cast(down.outputs[0], float32, f"{value.name}.up", f"{value.name}.rounded")
            graph.insert_after(node, [down, up])
            for user, index in uses:
                user.replace_input_with(index, up.outputs[0])
            num_rounded += 1
    save_graph(model, target)
    return num_rounded
