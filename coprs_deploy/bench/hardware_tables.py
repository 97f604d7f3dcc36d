"""Tables of memory and decoding speed by policy, precision and device, for docs/hardware.md.

A column head says whether its cells are measured (m) or computed (c).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from coprs_deploy.bench.hardware import (
    CPU_MEMORIES,
    GPU_FORMATS,
    OPENVINO_FORMATS,
    Device,
    WeightFormat,
    gpu_graph_bytes,
    gpu_policy_bytes,
    named_sizes,
    openvino_policy_bytes,
    read_bytes,
)
from coprs_deploy.console import format_bytes, markdown_table

POLICIES = {
    "3b": "Qwen2.5-VL 3B",
    "7b": "Qwen2.5-VL 7B",
    "llava-7b": "LLaVA-1.5 7B",
    "llava-13b": "LLaVA-1.5 13B",
}
ENCODERS = {"vit_b": "ViT-B", "vit_l": "ViT-L", "vit_h": "ViT-H"}


def gpu_memory_table() -> list[str]:
    """Lay out what a policy needs on a GPU by part."""
    rows = []
    for policy, name in POLICIES.items():
        sizes = named_sizes(policy)
        for form, numbers in GPU_FORMATS.items():
            parts = gpu_policy_bytes(sizes, numbers)
            totals = [_gpu_total(policy, sam, numbers) for sam in ENCODERS]
            read = read_bytes(sizes, numbers)
            cells = (parts["weights"], parts["cache"], parts["activations"], read, *totals)
            rows.append((name, form, *map(format_bytes, cells)))
    heads = ["weights", "KV cache", "prefill", "read per token"]
    heads += [f"total with {encoder}" for encoder in ENCODERS.values()]
    return markdown_table(("policy", "format", *(f"{head} (c)" for head in heads)), rows)


def _gpu_total(policy: str, sam: str, numbers: WeightFormat) -> float:
    sizes = named_sizes(policy, sam)
    return sum(gpu_policy_bytes(sizes, numbers).values()) + gpu_graph_bytes(sizes, sam)


def device_table(devices: Sequence[Device]) -> list[str]:
    """Lay out where a policy fits, and the bound of its decoding speed, by device."""
    rows = []
    for policy, name in POLICIES.items():
        for form, numbers in GPU_FORMATS.items():
            read = read_bytes(named_sizes(policy), numbers)
            totals = {sam: _gpu_total(policy, sam, numbers) for sam in ("vit_b", "vit_h")}
            cells = [device_cell(device, read, totals) for device in devices]
            rows.append((name, form, *cells))
    heads = [f"{device.name}, {device.memory_gb:g} GB (c)" for device in devices]
    return markdown_table(("policy", "format", *heads), rows)


def device_cell(device: Device, read: float, totals: Mapping[str, float]) -> str:
    """Write the bound in tokens/s, and the encoder if only the smaller one fits.

    Args:
        device: where the model runs.
        read: bytes read per token.
        totals: memory of the model with ``vit_b`` and with ``vit_h``.
    """
    fitting = [sam for sam, total in totals.items() if total <= device.usable_bytes]
    if not fitting:
        return "no"
    limit = "" if "vit_h" in fitting else ", ViT-B"
    return f"≤ {device.bandwidth_gb * 1e9 / read:.0f}{limit}"


def cpu_memory_table(measured: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Lay out the memory of the policy's graphs on a CPU.

    Args:
        measured: for each machine, the cases of ``benchmarks/real_size_policy.py`` by name; cells
            without one are dashes.
    """
    rows = []
    for policy, name in POLICIES.items():
        for form, numbers in OPENVINO_FORMATS.items():
            memory = openvino_policy_bytes(named_sizes(policy), numbers)
            cases = [_measured_case(cases, policy, form) for cases in measured.values()]
            cells: list[float | None] = [memory["files"]]
            for kind in ("private", "peak"):
                cells += [memory[kind], *(case.get(f"{kind}_bytes") for case in cases)]
            written = (format_bytes(cell) if cell else "-" for cell in cells)
            rows.append((name, form, *written))
    heads = ["files (c)"]
    for kind in ("private", "peak"):
        heads += [f"{kind} (c)", *(f"{kind}, {machine} (m)" for machine in measured)]
    return markdown_table(("policy", "precision", *heads), rows)


def cpu_speed_table(measured: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Lay out bounds of the decoding speed on a CPU, and what was measured (see above)."""
    rows = []
    for policy, name in POLICIES.items():
        for form, numbers in OPENVINO_FORMATS.items():
            read = read_bytes(named_sizes(policy), numbers)
            bounds = (f"≤ {1e9 * rate / read:.1f}" for rate in CPU_MEMORIES.values())
            cases = (_measured_case(cases, policy, form) for cases in measured.values())
            speeds = (case.get("tokens_per_second") for case in cases)
            cells = (f"{speed:.1f}" if speed else "-" for speed in speeds)
            rows.append((name, form, format_bytes(read), *bounds, *cells))
    heads = [f"{memory}, {rate:.0f} GB/s (c)" for memory, rate in CPU_MEMORIES.items()]
    heads = ["read per token (c)", *heads, *(f"{machine} (m)" for machine in measured)]
    return markdown_table(("policy", "precision", *heads), rows)


def _measured_case(measured: Mapping[str, Any], policy: str, form: str) -> Mapping[str, Any]:
    precision = form.rpartition(", ")[2]  # fp32 and bf16 keep the same 16-bit weights
    case: Mapping[str, Any] = measured.get(f"{policy} openvino {precision}", {})
    return case
