"""int8 quantization of a graph: Q/DQ nodes around the encoder's large products.

Only products with a learned weight become int8: in SAM's encoder attention's qkv and projection,
and both layers of the MLP, nearly all of the work; in light encoders dense convolutions too.
Attention itself, SAM's patch embedding and neck, prior and mask decoder keep the precision of the
rest. The pairs meet TensorRT's requirements: zero points are 0, activations have one scale per
tensor, weights one per output channel, and scales have the type of the surrounding tensors.

Why an own pass: ONNX Runtime's static quantization keeps the activations of an image in memory
(more than 20 GB for ViT-B), and NVIDIA ModelOpt requires older releases of onnx and onnxruntime
than this package is tested with.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from coprs_deploy.export.calibration import INT8_LIMIT, Ranges
from coprs_deploy.export.onnx_graph import SCOPES, check_onnx_graph, module_of
from coprs_deploy.export.precision import (
    FP16,
    INT8_PRODUCTS,
    load_graph,
    low_type,
    save_graph,
)
from coprs_deploy.specs import GraphSpec

if TYPE_CHECKING:
    import onnx_ir as ir


MIN_CHANNELS = 16
"""Fewest channels of a quantized convolution's input: those on pixels are a small part of the work,
and all others depend on them. It also leaves out depthwise convolutions."""

_WEIGHT_DIMENSIONS = {"MatMul": 2, "Conv": 4}


def find_products(graph: ir.Graph, operators: Collection[str]) -> dict[str, ir.Node]:
    """Find the products with a learned weight: linear modules and dense convolutions.

    Args:
        graph: graph of an image encoder.
        operators: ``MatMul``, ``Conv`` or both.

    Returns:
        Nodes by the name of their module, such as ``blocks.0.attn.qkv``.
    """
    products: dict[str, ir.Node] = {}
    for node in graph:
        if node.op_type not in operators or node.inputs[1] is None:
            continue
        weight = node.inputs[1].const_value
        if weight is None or len(weight.shape) != _WEIGHT_DIMENSIONS[node.op_type]:
            continue
        if node.op_type == "Conv" and not _is_dense(node, weight):
            continue
        name = module_of(node.metadata_props.get(SCOPES))
        assert name and name not in products, f"{node.name} has no module of its own"
        products[name] = node
    return products


def _is_dense(node: ir.Node, weight: ir.TensorProtocol) -> bool:
    """Whether a convolution has one group and enough channels."""
    group = node.attributes.get("group")
    return (group is None or group.as_int() == 1) and weight.shape.numpy()[1] >= MIN_CHANNELS


def product_names(path: Path, operators: Collection[str] = ("MatMul",)) -> list[str]:
    """Return the names of the products of some operators that can be int8."""
    return list(find_products(load_graph(path).graph, operators))


def quantize_graph(source: Path, target: Path, spec: GraphSpec, ranges: Ranges, rest: str) -> None:
    """Write a float32 graph with int8 products, those that have a range, and check the file.

    Inputs and outputs do not change. Large weights go to ``<target>.data``. Scales are rounded to
    ``rest``, the precision that the rest of the graph gets afterwards.

    Raises:
        MissingDependencyError: the exporter's packages are not installed.
        EquivalenceError: the written graph is not valid or has another signature.
    """
    assert source != target
    model = load_graph(source)
    found = find_products(model.graph, tuple(_WEIGHT_DIMENSIONS))
    products = {name: node for name, node in found.items() if name in ranges}
    assert products.keys() == ranges.keys(), "the ranges belong to another graph"
    for name, node in products.items():
        _quantize_product(model.graph, node, name, ranges[name].limit, rest)
    model.metadata_props[INT8_PRODUCTS] = json.dumps(list(products))
    save_graph(model, target)
    check_onnx_graph(target, spec)


def _quantize_product(graph: ir.Graph, node: ir.Node, name: str, limit: float, rest: str) -> None:
    import onnx_ir as ir

    activation, weight = node.inputs[0], node.inputs[1]
    assert activation is not None and weight is not None and weight.const_value is not None
    tensor, shape = weight.const_value, ir.Shape(weight.const_value.numpy().shape)
    scale = _scales(np.array(limit), rest)
    axis = 1 if node.op_type == "MatMul" else 0  # of the output channels
    others = tuple(i for i in range(len(shape)) if i != axis)
    columns = _scales(np.abs(tensor.numpy()).max(axis=others), rest)

    def constant(suffix: str, values: NDArray[np.generic]) -> ir.Value:
        full = f"{name}.{suffix}"
        value = ir.Value(
            name=full,
            shape=ir.Shape(values.shape),
            type=ir.TensorType(ir.DataType.from_numpy(values.dtype)),
            const_value=ir.tensor(values, name=full),
        )
        graph.register_initializer(value)
        return value

    def insert(operator: str, inputs: list[ir.Value], suffix: str, dtype: ir.DataType) -> ir.Value:
        full = f"{name}.{suffix}"
        new = ir.node(operator, inputs, {} if suffix != "weight" else {"axis": axis}, name=full)
        (output,) = new.outputs
        output.name, output.shape, output.type = full, inputs[0].shape, ir.TensorType(dtype)
        graph.insert_before(node, new)
        return output

    zero = np.zeros((), np.int8)
    pair = [constant("input.scale", scale), constant("input.zero_point", zero)]
    int8 = insert("QuantizeLinear", [activation, *pair], "input.int8", ir.DataType.INT8)
    dequantized = insert("DequantizeLinear", [int8, *pair], "input", ir.DataType.FLOAT)
    node.replace_input_with(0, dequantized)

    def convert() -> ir.TensorProtocol:
        steps = np.rint(tensor.numpy() / np.expand_dims(columns, others))
        rounded = np.clip(steps, -INT8_LIMIT, INT8_LIMIT).astype(np.int8)
        return ir.tensor(rounded, name=f"{name}.weight.int8")

    stored = ir.Value(
        name=f"{name}.weight.int8",
        shape=shape,
        type=ir.TensorType(ir.DataType.INT8),
        # Converted on writing, so that only one weight is in memory at a time.
        const_value=ir.LazyTensor(convert, ir.DataType.INT8, shape, name=f"{name}.weight.int8"),
    )
    graph.register_initializer(stored)
    scales = [
        constant("weight.scale", columns),
        constant("weight.zero_point", np.zeros(columns.shape, np.int8)),
    ]
    node.replace_input_with(
        1, insert("DequantizeLinear", [stored, *scales], "weight", ir.DataType.FLOAT)
    )
    if not weight.uses():
        assert weight.name is not None
        del graph.initializers[weight.name]


def _scales(limits: NDArray[Any], rest: str) -> NDArray[np.float32]:
    """Return the scale of each limit as a normal number of the type of the rest."""
    dtype = low_type(rest).numpy()
    smallest = 2.0**-14 if rest == FP16 else 2.0**-126  # subnormal numbers are less precise
    return np.maximum(limits / INT8_LIMIT, smallest).astype(dtype).astype(np.float32)
