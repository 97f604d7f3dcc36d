"""Processors that vLLM cannot run a quantized policy on."""

import json

import pytest

from coprs_deploy.errors import PolicyError
from coprs_deploy.machine import Processor
from coprs_deploy.policy.vllm_policy.quantized import check_processor

AVX2 = ("sse4_2", "avx2")
INT8_INPUTS = {"num_bits": 8, "type": "int"}


def compressed(num_bits, input_activations=None):
    group = {"weights": {"num_bits": num_bits}, "input_activations": input_activations}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}


@pytest.mark.parametrize(
    ("quantization", "units", "message"),
    [
        (compressed(4), AVX2, "4-bit weights, for which vLLM needs AVX-512"),
        ({"quant_method": "awq", "bits": 4}, AVX2, "4-bit weights"),
        ({"quant_method": "gptq", "bits": 4}, AVX2, "4-bit weights"),
        (
            compressed(8, INT8_INPUTS),
            AVX2,
            "int8 weights and inputs, for which vLLM needs AVX-VNNI",
        ),
        (compressed(8, INT8_INPUTS), (*AVX2, "avx512f"), "int8 weights and inputs"),
        (compressed(4), (*AVX2, "avx512f"), None),
        (compressed(8, INT8_INPUTS), (*AVX2, "avx_vnni"), None),
        (compressed(8, {"num_bits": 8, "type": "float"}), AVX2, None),
        (compressed(4), ("asimd",), None),
        (None, AVX2, None),
    ],
)
def test_check_processor(quantization, units, message, tmp_path):
    config = {} if quantization is None else {"quantization_config": quantization}
    (tmp_path / "config.json").write_text(json.dumps(config))
    processor = Processor(name="a processor", units=units, cores=2)
    if message is None:
        check_processor(tmp_path, processor)
        return
    with pytest.raises(PolicyError, match=message):
        check_processor(tmp_path, processor)


@pytest.mark.parametrize("text", ["", "[]", '{"quantization_config": {"quant_method": "awq"}}'])
def test_check_processor_unreadable_configuration_is_left_to_vllm(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    check_processor(tmp_path, Processor(name="a processor", units=AVX2, cores=2))
