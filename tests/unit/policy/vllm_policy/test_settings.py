"""Settings of the vLLM engine: accepted values, command-line form, memory arguments."""

import dataclasses
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from coprs_deploy.errors import RuntimeUnavailableError
from coprs_deploy.policy.vllm_policy.settings import (
    GIB,
    GPU_RESERVE,
    MIN_CPU_KV_BYTES,
    DeviceMemory,
    VllmSettings,
    device_memory,
    kv_bytes_per_token,
    memory_arguments,
    read_settings,
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs is 0; it must be at least 1"),
        ({"mm_processor_cache_gb": -1}, "mm_processor_cache_gb is -1; it must be at least 0"),
        ({"max_num_seqs": "8"}, "max_num_seqs is '8'; accepted: a whole number"),
        ({"num_threads": 0.5}, "num_threads is 0.5; accepted: a whole number"),
        (
            {"mm_processor_cache_gb": float("nan")},
            "mm_processor_cache_gb is nan; accepted: a finite",
        ),
        ({"enforce_eager": "no"}, "enforce_eager is 'no'; accepted: bool, None"),
        ({"enable_prefix_caching": 1}, "enable_prefix_caching is 1; accepted: bool"),
        (
            {"gpu_memory_utilization": 0},
            "gpu_memory_utilization is 0; it must be above 0 and at most 1",
        ),
        (
            {"gpu_memory_utilization": 1.1},
            "gpu_memory_utilization is 1.1; it must be above 0 and at most 1",
        ),
    ],
)
def test_vllm_settings_value_out_of_range_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        VllmSettings(**changes)


def test_read_settings_every_field_has_a_text_form():
    texts = {"int": ("3", 3), "float": ("0.5", 0.5), "bool": ("false", False)}
    for field in dataclasses.fields(VllmSettings):
        text, value = texts[field.type.partition(" | ")[0]]
        assert read_settings([f"{field.name}={text}"]) == VllmSettings(**{field.name: value})


def test_read_settings_several_assignments_are_combined():
    assignments = ["max_num_seqs=3", "enable_prefix_caching=false", "gpu_memory_utilization=0.5"]
    assert read_settings(assignments) == VllmSettings(
        max_num_seqs=3, enable_prefix_caching=False, gpu_memory_utilization=0.5
    )
    assert read_settings([]) == VllmSettings()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_seqs=3", "'max_seqs=3' is unknown; accepted: name=value with max_num_seqs"),
        ("max_num_seqs", "'max_num_seqs' is unknown"),
        ("max_num_seqs=many", "max_num_seqs is 'many'; accepted: a whole number"),
        ("gpu_memory_utilization=x", "gpu_memory_utilization is 'x'; accepted: a number"),
        ("enforce_eager=1", "enforce_eager is '1'; accepted: true or false"),
    ],
)
def test_read_settings_invalid_text_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        read_settings([text])


def test_engine_arguments_cpu_is_eager_with_blocks_of_32():
    cpu, gpu = (VllmSettings().engine_arguments(device) for device in ("cpu", "cuda"))
    assert (cpu["enforce_eager"], cpu["block_size"]) == (True, 32)
    assert gpu["enforce_eager"] is False
    assert "block_size" not in gpu
    assert VllmSettings(enforce_eager=False).engine_arguments("cpu")["enforce_eager"] is False


class TestMemory:
    def test_memory_arguments_gpu_share_is_what_the_graphs_leave_free(self):
        memory = DeviceMemory(free=60 * GIB, total=80 * GIB)
        found = memory_arguments(VllmSettings(), "cuda", memory, needed_kv_bytes=GIB)
        assert found == {"gpu_memory_utilization": pytest.approx(0.75 - GPU_RESERVE)}

    def test_memory_arguments_gpu_explicit_share_is_kept(self):
        settings = VllmSettings(gpu_memory_utilization=0.3, kv_cache_memory_bytes=GIB)
        found = memory_arguments(settings, "cuda", DeviceMemory(60 * GIB, 80 * GIB), 0)
        assert found == {"gpu_memory_utilization": 0.3, "kv_cache_memory_bytes": GIB}

    def test_memory_arguments_full_gpu_is_refused(self):
        with pytest.raises(RuntimeUnavailableError, match=r"2.0 of 80.0 GiB are free"):
            memory_arguments(VllmSettings(), "cuda", DeviceMemory(2 * GIB, 80 * GIB), 0)

    @pytest.mark.parametrize(
        ("needed", "expected"),
        [(GIB, GIB), (20 * GIB, 4 * GIB), (1, MIN_CPU_KV_BYTES)],
    )
    def test_memory_arguments_cpu_is_the_need_up_to_half_of_the_free_memory(self, needed, expected):
        memory = DeviceMemory(free=8 * GIB, total=16 * GIB)
        found = memory_arguments(VllmSettings(), "cpu", memory, needed)
        assert found == {"kv_cache_memory_bytes": expected}

    def test_device_memory_cpu_is_that_of_the_host(self):
        memory = device_memory("cpu")
        assert 0 < memory.free <= memory.total

    def test_device_memory_missing_gpu_is_refused(self):
        import torch

        if torch.cuda.is_available():
            pytest.skip("this machine has a GPU")
        with pytest.raises(RuntimeUnavailableError, match=r"torch .* finds no GPU"):
            device_memory("cuda:0")

    def test_kv_bytes_per_token_follows_from_the_config(self):
        text = SimpleNamespace(
            num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=2, hidden_size=2048
        )
        assert kv_bytes_per_token(text, 2) == 2 * 36 * 2 * 128 * 2


def test_settings_import_loads_no_heavy_library():
    program = (
        "import json, sys\nimport coprs_deploy.policy.vllm_policy.settings\n"
        "print(json.dumps([name for name in sys.modules if '.' not in name]))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert {"torch", "transformers", "vllm"}.isdisjoint(json.loads(run.stdout))
