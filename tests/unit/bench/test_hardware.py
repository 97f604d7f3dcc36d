"""Computed memory against measured values, and the cells of the tables."""

import json

import pytest

from coprs_deploy.bench.hardware import (
    GPU_FORMATS,
    GPUS,
    JETSONS,
    OPENVINO_FORMATS,
    encoder_bytes,
    gpu_graph_bytes,
    gpu_policy_bytes,
    named_sizes,
    openvino_policy_bytes,
    read_bytes,
)
from coprs_deploy.bench.hardware_tables import cpu_memory_table, cpu_speed_table, device_cell
from coprs_deploy.bench.report import read_report
from coprs_deploy.model_config import SAM_SIZES
from tests import ROOT

GB = 1e9
REPORTS = ROOT / "benchmarks/reports"
H100 = REPORTS / "vit-b-nvidia-h100-80gb-hbm3-2026-11-26.json"
REAL_SIZES = sorted(REPORTS.glob("real-size-policy-*.json"))

OPENVINO_3B = {
    "fp32, bf16": (7.51, 9.28, 16.39),
    "int8": (3.76, 4.51, 8.13),
    "int4": (2.42, 3.36, 5.70),
}
"""Weight files, private and peak memory in GB of a random Qwen2.5-VL 3B, measured with OpenVINO
2026.4.1, 617 tokens, the policy's graphs alone; int4 with four bits in the first layer too."""


@pytest.mark.parametrize(
    ("policy", "parameters"),
    [
        ("3b", 3_754_622_976),
        ("7b", 8_292_166_656),
        ("llava-7b", 7_063_427_072),
        ("llava-13b", 13_351_494_656),
    ],
)
def test_named_sizes_count_the_parameters_of_the_public_models(policy, parameters):
    assert named_sizes(policy).policy == parameters


@pytest.mark.parametrize("precision", OPENVINO_FORMATS)
def test_openvino_memory_is_near_the_measured_one(precision):
    computed = openvino_policy_bytes(named_sizes("3b"), OPENVINO_FORMATS[precision])
    files, private, peak = OPENVINO_3B[precision]
    assert computed["files"] / GB == pytest.approx(files, rel=0.02)
    assert computed["private"] / GB == pytest.approx(private, rel=0.1)
    assert computed["peak"] / GB == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("path", REAL_SIZES, ids=lambda path: path.stem)
def test_openvino_memory_is_near_that_of_the_committed_report(path):
    report = json.loads(path.read_text("utf-8"))
    compared = 0
    for name, case in report["cases"].items():
        size, runtime, precision, *limits = name.split()
        if runtime != "openvino" or precision not in OPENVINO_FORMATS or limits or "error" in case:
            continue
        computed = openvino_policy_bytes(named_sizes(size), OPENVINO_FORMATS[precision])
        assert computed["private"] == pytest.approx(case["private_bytes"], rel=0.1), name
        assert computed["peak"] == pytest.approx(case["peak_bytes"], rel=0.1), name
        compared += 1
    assert compared >= 2


@pytest.mark.parametrize(("precision", "size"), [("fp16", 2), ("fp32", 4)])
def test_encoder_memory_is_near_the_measured_one_on_a_gpu(precision, size):
    cases = [case for group in read_report(H100).groups for case in group.cases]
    wanted = ("onnxruntime", precision)
    (case,) = (c for c in cases if (c.labels["runtime"], c.labels["precision"]) == wanted)
    weights = size * named_sizes("3b", "vit_b").image_encoder
    computed = weights + encoder_bytes(SAM_SIZES["vit_b"], size)
    assert computed == pytest.approx(case.memory.device, rel=0.1)


def test_gpu_memory_of_a_policy_adds_its_parts():
    sizes = named_sizes("3b")
    parts = gpu_policy_bytes(sizes, GPU_FORMATS["bf16"])
    assert parts["weights"] == 2 * sizes.policy
    assert parts["cache"] == 2 * 36 * 256 * 2 * 3300  # keys and values, layers, width, bytes
    smaller = gpu_policy_bytes(sizes, GPU_FORMATS["w4a16"])["weights"]
    assert parts["weights"] - smaller == pytest.approx((2 - 0.515625) * sizes.language.parameters)


def test_read_bytes_are_decoder_head_and_half_of_the_response():
    sizes = named_sizes("7b")
    weights = 2 * (sizes.language.parameters + sizes.output_embeddings)
    assert read_bytes(sizes, GPU_FORMATS["bf16"]) == weights + 2 * 28 * 512 * 2 * 2300


def test_usable_memory_leaves_a_share_and_the_system_of_a_jetson():
    assert GPUS[0].usable_bytes == pytest.approx(7.2 * GB)
    assert JETSONS[0].usable_bytes == pytest.approx(5.7 * GB)


def test_device_cell_names_the_largest_encoder_that_fits():
    sizes, form = named_sizes("7b"), GPU_FORMATS["bf16"]
    policy = sum(gpu_policy_bytes(sizes, form).values())
    totals = {s: policy + gpu_graph_bytes(named_sizes("7b", s), s) for s in ("vit_b", "vit_h")}
    read = read_bytes(sizes, form)
    devices = {f"{device.name} {device.memory_gb}": device for device in GPUS}
    cells = {name: device_cell(device, read, totals) for name, device in devices.items()}
    assert cells["RTX 4080 16"] == "no"
    assert cells["L4 24"] == "≤ 21, ViT-B"
    assert cells["A100 80"] == "≤ 143"


def test_cpu_tables_write_measured_cells_and_dashes_without_a_measurement():
    case = {"tokens_per_second": 7.43, "peak_bytes": 5_700_000_000, "private_bytes": 3_360_000_000}
    here = {"3b openvino int4": case, "7b openvino int8": {"error": "no memory"}}
    measured = {"2 cores, avx512": here, "2 cores, avx2": {}}
    cells = {
        tuple(line.split(" | ")[:2]): line.strip("| ").split(" | ")
        for line in (*cpu_memory_table(measured), *cpu_speed_table(measured))
    }
    speed = cells["| Qwen2.5-VL 3B", "int4"]
    assert (speed[2], speed[3], speed[-2:]) == ("1.82 GB", "≤ 28.1", ["7.4", "-"])
    assert cells["| Qwen2.5-VL 7B", "int8"][-2:] == ["-", "-"]
    memory = {tuple(line.split(" | ")[:2]): line for line in cpu_memory_table(measured)}
    assert memory["| Qwen2.5-VL 3B", "int4"].endswith("| 3.36 GB | - | 5.29 GB | 5.70 GB | - |")
    assert memory["| Qwen2.5-VL 7B", "int8"].endswith("| - | - | 15.91 GB | - | - |")
