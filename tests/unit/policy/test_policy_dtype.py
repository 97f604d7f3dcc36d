"""Dtype of a policy by what is stored, requested, and fast on the processor."""

import json
import logging
import shutil

import pytest

from coprs_deploy.checkpoint import read_checkpoint
from coprs_deploy.machine import Processor
from coprs_deploy.policy import policy_dtype
from coprs_deploy.policy.policy_dtype import choose_dtype
from coprs_deploy.policy.transformers_policy import TransformersPolicy


@pytest.fixture
def machine(monkeypatch):
    """Set the instruction sets of the processor and the available memory."""

    def describe(*units, memory=10**12):
        processor = Processor("A Processor", units, 2)
        monkeypatch.setattr(policy_dtype, "describe_processor", lambda: processor)
        monkeypatch.setattr(policy_dtype, "available_memory_bytes", lambda: memory)

    return describe


@pytest.fixture
def stored(tmp_path):
    """Write a policy directory with 1,000 bytes of weights in a dtype."""

    def write(dtype, key="dtype", **config):
        (tmp_path / "config.json").write_text(json.dumps({key: dtype, **config}))
        (tmp_path / "model.safetensors").write_bytes(bytes(1000))
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("dtype", "units", "expected"),
    [
        ("bfloat16", ("avx512_vnni",), "float32 (stored in bfloat16, for which"),
        ("bfloat16", (), "float32 (stored in bfloat16, for which"),
        ("bfloat16", ("avx512_bf16",), "bfloat16 (as stored; the processor has avx512_bf16)"),
        ("bfloat16", ("amx_bf16", "avx512_bf16"), "bfloat16 (as stored; the processor has avx"),
        ("bfloat16", ("asimd", "bf16"), "bfloat16 (as stored; the processor has bf16)"),
        ("float16", ("amx_bf16",), "float32 (stored in float16, for which"),
        ("float16", ("avx512_fp16",), "float16 (as stored; the processor has avx512_fp16)"),
        ("float32", ("amx_bf16",), "float32 (as stored)"),
    ],
)
def test_choose_dtype_on_a_cpu_follows_the_processor(machine, stored, dtype, units, expected):
    machine(*units)
    assert str(choose_dtype(stored(dtype), "cpu")).startswith(expected)
    assert str(choose_dtype(stored(dtype, key="torch_dtype"), "cpu")).startswith(expected)


def test_choose_dtype_requested_dtype_wins(machine, stored):
    machine(memory=0)
    assert str(choose_dtype(stored("float32"), "cpu", "bfloat16")) == "bfloat16 (as requested)"
    assert choose_dtype(stored("bfloat16"), "cpu", "float32").dtype == "float32"


def test_choose_dtype_on_a_gpu_is_the_stored_one(machine, stored):
    machine()
    assert str(choose_dtype(stored("bfloat16"), "cuda:1")) == "bfloat16 (as stored)"


def test_choose_dtype_quantized_policy_is_left_alone(machine, stored):
    machine()
    assert choose_dtype(stored("bfloat16", quantization_config={}), "cpu").dtype == "auto"


@pytest.mark.parametrize("content", [None, "{", "[]", "{}"])
def test_choose_dtype_configuration_without_one_is_left_to_transformers(machine, tmp_path, content):
    machine()
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert choose_dtype(tmp_path, "cpu").dtype == "auto"


def test_choose_dtype_float32_beyond_the_memory_keeps_the_stored_one_with_a_warning(
    machine, stored, caplog
):
    with caplog.at_level(logging.WARNING):
        machine(memory=2300)
        assert choose_dtype(stored("bfloat16"), "cpu").dtype == "float32"
        assert not caplog.messages
        machine(memory=2200)
        chosen = choose_dtype(stored("bfloat16"), "cpu")
    assert str(chosen) == "bfloat16 (as stored; too little memory for float32)"
    (message,) = caplog.messages
    assert "runs in bfloat16, for which A Processor has no instructions" in message


def test_transformers_policy_without_instructions_for_its_dtype_runs_in_float32(
    machine, tiny_checkpoint, tmp_path
):
    prompt = read_checkpoint(tiny_checkpoint).config.prompt
    shutil.copytree(tiny_checkpoint / "policy", tmp_path / "policy")
    file = tmp_path / "policy" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"dtype": "bfloat16"}))
    for units, dtype in ((("avx512_bf16",), "bfloat16"), (("fma",), "float32")):
        machine(*units)
        with TransformersPolicy(file.parent, prompt, 784, 12_544) as policy:
            assert f"on cpu, {dtype} (" in policy.description
            assert str(policy._model.dtype) == f"torch.{dtype}"
