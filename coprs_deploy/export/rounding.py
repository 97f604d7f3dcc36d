"""A typed graph as a GPU computes it, run on any CPU: float32 inside a node, rounded between nodes.

ONNX Runtime's CPU provider computes float16 graphs in float32 and drops the roundings between two
nodes, so that a value above 65504 does not overflow; it refuses bfloat16, and OpenVINO on a
processor without such units computes that in float32 too. A check with either would let overflow
pass. Here every rounding is written out as a pair of casts, which are not dropped.
"""

from __future__ import annotations

from pathlib import Path

from coprs_deploy.export.precision import convert_tensor, save_graph

MOVES = frozenset(
    (
        "Concat",
        "Expand",
        "Flatten",
        "Gather",
        "Identity",
        "Pad",
        "Reshape",
        "Slice",
        "Split",
        "Squeeze",
        "Transpose",
        "Unsqueeze",
    )
)
"""Operators that move values: rounded values stay rounded."""


def write_rounded_graph(source: Path, target: Path) -> int:
    """Write the float32 graph that rounds wherever a typed graph does.

    Args:
        source: a graph that :func:`coprs_deploy.export.precision.type_graph` wrote.
        target: another path; large weights go to ``<target>.data`` beside it.

    Returns:
        How many tensors are rounded, weights not counted.
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
            down = ir.node("Cast", [value], {"to": half.value}, name=f"{value.name}.down")
            up = ir.node("Cast", [down.outputs[0]], {"to": float32.value}, name=f"{value.name}.up")
            down.outputs[0].type, up.outputs[0].type = ir.TensorType(half), ir.TensorType(float32)
            down.outputs[0].name, up.outputs[0].name = f"{value.name}.half", f"{value.name}.rounded"
            down.outputs[0].shape = up.outputs[0].shape = value.shape
            graph.insert_after(node, [down, up])
            for user, index in uses:
                user.replace_input_with(index, up.outputs[0])
            num_rounded += 1
    save_graph(model, target)
    return num_rounded
