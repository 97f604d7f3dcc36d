"""Operations and bytes of graphs, against hand counts and against PyTorch's own counter."""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from coprs_deploy import demo
from coprs_deploy.benchmarks.graph_subjects import CHAIN
from coprs_deploy.benchmarks.onnx_work import GraphWork, count_work
from coprs_deploy.benchmarks.suites.engines import graph_work
from coprs_deploy.checkpoint import load_segmentation_model, read_checkpoint
from coprs_deploy.specs import GRAPH_NAMES, graph_specs


def save(path, nodes, inputs, outputs, weights):
    def value(name, shape):
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    graph = helper.make_graph(
        nodes,
        "graph",
        [value(*item) for item in inputs.items()],
        [value(*item) for item in outputs.items()],
        [numpy_helper.from_array(w.astype(np.float32), name) for name, w in weights.items()],
    )
    onnx.save(helper.make_model(graph), path)
    return path


def test_a_product_and_an_activation_are_counted_by_hand(tmp_path):
    path = save(
        tmp_path / "g.onnx",
        [helper.make_node("MatMul", ["a", "w"], ["b"]), helper.make_node("Relu", ["b"], ["c"])],
        {"a": ["targets", 3]},
        {"c": ["targets", 5]},
        {"w": np.zeros((3, 5))},
    )
    model = onnx.load(path)
    model.graph.value_info.append(
        helper.make_tensor_value_info("b", TensorProto.FLOAT, ["targets", 5])
    )
    onnx.save(model, path)
    work = count_work(path, targets=4)
    assert work.product_flops == 2 * 4 * 3 * 5
    assert work.other_flops == 4 * 5
    assert work.weight_bytes == 4 * 3 * 5
    assert work.tensor_bytes == 4 * (4 * 3 + 4 * 5)


@pytest.mark.parametrize(
    ("operator", "weight", "shape_in", "shape_out", "attributes", "flops"),
    [
        ("Conv", (8, 2, 3, 3), [1, 4, 6, 6], [1, 8, 4, 4], {"group": 2}, 2 * 8 * 16 * 2 * 9),
        ("ConvTranspose", (4, 5, 2, 2), [1, 4, 3, 3], [1, 5, 6, 6], {"strides": [2, 2]}, 1440),
        ("Gemm", (3, 5), [2, 3], [2, 5], {}, 2 * 2 * 3 * 5),
        ("Einsum", (3, 5), [2, 7, 3], [2, 7, 5], {"equation": "btc,cd->btd"}, 2 * 2 * 7 * 3 * 5),
    ],
)
def test_products_of_every_kind(tmp_path, operator, weight, shape_in, shape_out, attributes, flops):
    inputs = ["x", "w", "c"] if operator == "Gemm" else ["x", "w"]
    weights = {"w": np.zeros(weight)} | ({"c": np.zeros(5)} if operator == "Gemm" else {})
    node = helper.make_node(operator, inputs, ["y"], **attributes)
    path = save(tmp_path / "g.onnx", [node], {"x": shape_in}, {"y": shape_out}, weights)
    assert count_work(path).product_flops == flops


@pytest.mark.parametrize("name", GRAPH_NAMES)
def test_products_of_the_shipped_graphs_are_those_that_pytorch_counts(name):
    source = read_checkpoint(demo.CHECKPOINT)
    stage = load_segmentation_model(source).graph_modules()[name]
    spec = graph_specs(source.config.model.geometry, source.config.model.policy_width)[name]
    inputs = [torch.ones(t.shape, dtype=getattr(torch, t.dtype)) for t in spec.inputs]
    # PyTorch counts attention only where it is written out as products.
    with (
        FlopCounterMode(display=False) as counter,
        torch.inference_mode(),
        sdpa_kernel(SDPBackend.MATH),
    ):
        stage(*inputs)
    found = count_work(demo.BUNDLE / f"{name}.onnx").product_flops
    assert math.isclose(found, counter.get_total_flops(), rel_tol=0.02)


@pytest.mark.parametrize(
    ("precision", "moved"), [("fp32", 440), ("bf16", 240), ("fp16", 240), ("int8", 140)]
)
def test_a_row_reads_its_weights_in_its_own_precision(precision, moved):
    workshop = SimpleNamespace(
        bundle=lambda *_: SimpleNamespace(problem="", path=Path("bundle")),
        work=lambda path: GraphWork(1e6, 1e3, weight_bytes=400, tensor_bytes=40),
    )
    work = graph_work(workshop, None, "prior", precision)
    assert (work.flops, work.bytes) == (1_001_000, moved)
    whole = graph_work(workshop, None, CHAIN, precision)
    assert (whole.flops, whole.bytes) == (3 * 1_001_000, 3 * moved)
