"""Floating-point operations and least memory traffic of an ONNX graph, counted from its shapes.

A product of (m, k) and (k, n) counts 2 m k n; a convolution likewise. What works element by element
counts one operation an element, a softmax or a normalization the few that each element takes: next
to the products both are small. Counting is our own because it is these few lines; PyTorch's counter
agrees on the products (see the tests).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from coprs_deploy.errors import MissingDependencyError
from coprs_deploy.export.onnx_graph import INSTALL

if TYPE_CHECKING:
    import onnx_ir as ir

PER_ELEMENT = {
    "Softmax": 5,
    "LayerNormalization": 8,
    "Gelu": 8,
    "Erf": 6,
    "Tanh": 6,
    "Sigmoid": 4,
    "Resize": 7,
}
"""Operations an output element; every other operator that computes counts one."""

MOVES = frozenset(
    (
        "Cast",
        "Concat",
        "Constant",
        "ConstantOfShape",
        "DequantizeLinear",
        "Expand",
        "Flatten",
        "Gather",
        "Identity",
        "Pad",
        "QuantizeLinear",
        "Range",
        "Reshape",
        "Shape",
        "Slice",
        "Split",
        "Squeeze",
        "Tile",
        "Transpose",
        "Unsqueeze",
    )
)
"""Operators that compute nothing."""


@dataclass(frozen=True)
class GraphWork:
    """What one run of a graph takes.

    Attributes:
        product_flops: of matrix products and convolutions.
        other_flops: of everything else.
        weight_bytes: every weight once.
        tensor_bytes: inputs and outputs once.
    """

    product_flops: float
    other_flops: float
    weight_bytes: int
    tensor_bytes: int

    @property
    def flops(self) -> float:
        """All operations."""
        return self.product_flops + self.other_flops

    @property
    def bytes(self) -> int:
        """The least that must be moved."""
        return self.weight_bytes + self.tensor_bytes


def count_work(path: Path, targets: int = 1) -> GraphWork:
    """Count a graph file; large weights beside it are not read.

    Args:
        path: an ONNX file.
        targets: what the symbolic dimension ``targets`` stands for.

    Raises:
        MissingDependencyError: the exporter's packages are not installed.
        ValueError: the shape of a tensor is not known.
    """
    try:
        import onnx_ir as ir
    except ImportError as error:
        raise MissingDependencyError(f"onnx-ir is not installed; {INSTALL}") from error
    graph = ir.load(path).graph
    shapes = _Shapes(targets)
    product = other = 0.0
    for node in graph:
        count = PRODUCTS.get(node.op_type)
        if count is not None:
            product += count(node, shapes)
        elif node.op_type not in MOVES:
            size = max(math.prod(shapes(value)) for value in node.outputs if value.name)
            other += PER_ELEMENT.get(node.op_type, 1) * size
    weights = sum(v.const_value.nbytes for v in graph.initializers.values() if v.const_value)
    tensors = [*graph.inputs, *graph.outputs]
    tensor_bytes = sum(math.prod(shapes(v)) * (v.dtype.itemsize if v.dtype else 4) for v in tensors)
    return GraphWork(product, other, weights, int(tensor_bytes))


class _Shapes:
    """Shapes as numbers; the exporter writes all of them into the file."""

    def __init__(self, targets: int) -> None:
        self._targets = targets

    def __call__(self, value: ir.Value | None) -> tuple[int, ...]:
        assert value is not None
        if value.shape is None:
            raise ValueError(f"the shape of {value.name} is not in the graph file")
        return tuple(size if isinstance(size, int) else self._targets for size in value.shape)


def _matmul(node: ir.Node, shapes: _Shapes) -> float:
    return 2.0 * math.prod(shapes(node.outputs[0])) * shapes(node.inputs[0])[-1]


def _gemm(node: ir.Node, shapes: _Shapes) -> float:
    transposed = node.attributes.get("transA")
    inner = shapes(node.inputs[0])[0 if transposed is not None and transposed.as_int() else 1]
    return 2.0 * math.prod(shapes(node.outputs[0])) * inner


def _conv(node: ir.Node, shapes: _Shapes) -> float:
    """Each output element sums over one group's input channels and the kernel."""
    return 2.0 * math.prod(shapes(node.outputs[0])) * math.prod(shapes(node.inputs[1])[1:])


def _conv_transpose(node: ir.Node, shapes: _Shapes) -> float:
    """Each input element is spread over one group's output channels and the kernel."""
    return 2.0 * math.prod(shapes(node.inputs[0])) * math.prod(shapes(node.inputs[1])[1:])


def _einsum(node: ir.Node, shapes: _Shapes) -> float:
    """Every combination of the named indices is one product and one sum."""
    terms = node.attributes["equation"].as_string().replace(" ", "").partition("->")[0].split(",")
    sizes: dict[str, int] = {}
    for term, value in zip(terms, node.inputs, strict=True):
        if "." in term:
            raise ValueError(f"{node.name}: an ellipsis in an Einsum is not counted")
        sizes.update(zip(term, shapes(value), strict=True))
    return 2.0 * math.prod(sizes.values())


def _attention(node: ir.Node, shapes: _Shapes) -> float:
    """Two products: queries with keys, and their weights with values (4-D inputs)."""
    batch, heads, queries, width = shapes(node.inputs[0])
    _, _, keys, value_width = shapes(node.inputs[2])
    return 2.0 * batch * heads * queries * keys * (width + value_width)


PRODUCTS: dict[str, Callable[[ir.Node, _Shapes], float]] = {
    "MatMul": _matmul,
    "MatMulInteger": _matmul,
    "Gemm": _gemm,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Einsum": _einsum,
    "Attention": _attention,
}
