"""What vLLM's CPU backend needs of an x86 processor to multiply with quantized weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from coprs_deploy.errors import PolicyError
from coprs_deploy.machine import Processor, describe_processor


def check_processor(policy: Path, processor: Processor | None = None) -> None:
    """Refuse a quantized policy that vLLM cannot run, or not exactly, on a processor.

    vLLM 0.32 has no kernel for 4-bit weights without AVX-512, and its engine ends with the first
    request. Without int8 units, its int8 products add two at a time in 16 bits, which overflows:
    the demo model's hidden states are then off by more than a tenth.

    Args:
        policy: policy directory; one without quantization is accepted, as is one that cannot be
            read, whose error is vLLM's.
        processor: the processor; None for that of this machine. Those that are not x86 are
            accepted.

    Raises:
        PolicyError: the processor lacks the instructions.
    """
    processor = processor or describe_processor()
    if "sse4_2" not in processor.units:
        return
    for weight_bits, has_int8_inputs in _products(policy):
        if weight_bits == 4 and "avx512f" not in processor.units:
            _refuse(policy, "4-bit weights", processor, "AVX-512", "fp8")
        if has_int8_inputs and not processor.has_int8_units:
            _refuse(policy, "int8 weights and inputs", processor, "AVX-VNNI or AVX512-VNNI", "fp8")


def _products(policy: Path) -> Iterator[tuple[int, bool]]:
    """Yield the bits of the weights, and whether the inputs are int8, for each group of layers."""
    try:
        config: Any = json.loads((policy / "config.json").read_text(encoding="utf-8"))
        quantization = config["quantization_config"]
        if quantization["quant_method"] in ("awq", "gptq"):
            yield int(quantization["bits"]), False
        for group in quantization.get("config_groups", {}).values():
            inputs = group.get("input_activations") or {}
            has_int8_inputs = (inputs.get("type"), inputs.get("num_bits")) == ("int", 8)
            yield int(group["weights"]["num_bits"]), has_int8_inputs
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return


def _refuse(policy: Path, product: str, processor: Processor, needed: str, other: str) -> None:
    raise PolicyError(
        f"the policy in {policy} has {product}, for which vLLM needs {needed} on a CPU, and "
        f"{processor.name} has none; use a GPU, another scheme ({other}), or the checkpoint that "
        "it was made from with `export --policy-runtime openvino`"
    )
