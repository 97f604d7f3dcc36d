"""Settings of the vLLM engine: what is accepted, and what memory the engine is given."""

import dataclasses
from types import SimpleNamespace

import pytest

from coprs_deploy.errors import RuntimeUnavailableError
from coprs_deploy.policy.vllm_policy.settings import (
    _KINDS,
    GIB,
    SPARE_SHARE,
    FreeMemory,
    VllmSettings,
    free_memory,
    kv_bytes_per_token,
    memory_arguments,
    read_settings,
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs is 0; it must be at least 1"),
        ({"mm_processor_cache_gb": -1}, "mm_processor_cache_gb is -1; it must be at least 0"),
        ({"gpu_memory_utilization": 0}, "gpu_memory_utilization is 0; accepted: above 0"),
        ({"gpu_memory_utilization": 1.1}, "gpu_memory_utilization is 1.1; accepted: above 0"),
    ],
)
def test_values_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        VllmSettings(**changes)


def test_every_setting_can_be_given_as_text():
    assert list(_KINDS) == [field.name for field in dataclasses.fields(VllmSettings)]
    given = ["max_num_seqs=3", "enable_prefix_caching=false", "gpu_memory_utilization=0.5"]
    assert read_settings(given) == VllmSettings(
        max_num_seqs=3, enable_prefix_caching=False, gpu_memory_utilization=0.5
    )
    assert read_settings([]) == VllmSettings()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_seqs=3", "'max_seqs=3' is unknown; accepted: name=value with max_num_seqs"),
        ("max_num_seqs", "'max_num_seqs' is unknown"),
        ("max_num_seqs=many", "max_num_seqs is 'many'; accepted: a whole number"),
        ("enforce_eager=1", "enforce_eager is '1'; accepted: true or false"),
    ],
)
def test_text_that_is_no_setting_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        read_settings([text])


def test_a_cpu_runs_eagerly_with_blocks_that_its_kernels_take():
    cpu, gpu = (VllmSettings().engine_arguments(device) for device in ("cpu", "cuda"))
    assert (cpu["enforce_eager"], cpu["block_size"]) == (True, 32)
    assert gpu["enforce_eager"] is False
    assert "block_size" not in gpu
    assert VllmSettings(enforce_eager=False).engine_arguments("cpu")["enforce_eager"] is False


class TestMemory:
    def test_on_a_gpu_the_share_reaches_up_to_what_the_graphs_leave(self):
        memory = FreeMemory(free=60 * GIB, total=80 * GIB)
        found = memory_arguments(VllmSettings(), "cuda", memory, needed_kv_bytes=GIB)
        assert found == {"gpu_memory_utilization": pytest.approx(0.75 - SPARE_SHARE)}

    def test_a_share_that_was_asked_for_is_kept(self):
        settings = VllmSettings(gpu_memory_utilization=0.3, kv_cache_memory_bytes=GIB)
        found = memory_arguments(settings, "cuda", FreeMemory(60 * GIB, 80 * GIB), 0)
        assert found == {"gpu_memory_utilization": 0.3, "kv_cache_memory_bytes": GIB}

    def test_a_gpu_that_is_full_is_refused(self):
        with pytest.raises(RuntimeUnavailableError, match=r"2.0 of 80.0 GiB are free"):
            memory_arguments(VllmSettings(), "cuda", FreeMemory(2 * GIB, 80 * GIB), 0)

    @pytest.mark.parametrize(("needed", "given"), [(GIB, GIB), (20 * GIB, 4 * GIB)])
    def test_a_cpu_gives_what_the_longest_answers_need_up_to_half_of_what_is_free(
        self, needed, given
    ):
        memory = FreeMemory(free=8 * GIB, total=16 * GIB)
        found = memory_arguments(VllmSettings(), "cpu", memory, needed)
        assert found == {"kv_cache_memory_bytes": given}

    def test_the_host_says_what_is_free(self):
        memory = free_memory("cpu")
        assert 0 < memory.free <= memory.total

    def test_a_gpu_that_is_not_there_is_refused(self):
        import torch

        if torch.cuda.is_available():
            pytest.skip("this machine has a GPU")
        with pytest.raises(RuntimeUnavailableError, match=r"torch .* sees no GPU"):
            free_memory("cuda:0")

    def test_keys_and_values_of_a_token_follow_from_the_architecture(self):
        text = SimpleNamespace(
            num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=2, hidden_size=2048
        )
        assert kv_bytes_per_token(text, 2) == 2 * 36 * 2 * 128 * 2
