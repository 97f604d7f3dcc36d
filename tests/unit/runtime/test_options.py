"""Refusals of runtime options."""

import pytest

from coprs_deploy.runtime import CoPRS, RuntimeOptions


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, "device is 'tpu'; accepted: 'cpu', 'cuda' or 'cuda:N'"),
        ({"policy": "gpt"}, "policy is 'gpt'; accepted: transformers, vllm"),
        ({"retune": True}, "retune is True and runtime is None; accepted: retune with the runtime"),
        ({"max_cached_images": -1}, "max_cached_images is -1; it must be at least 0"),
        ({"max_queue_size": -1}, "max_queue_size is -1; it must be at least 0"),
        ({"timeout_s": 0}, "timeout_s is 0; it must be above 0"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RuntimeOptions(**options)


def test_load_unknown_policy_is_refused(tiny_bundle):
    with pytest.raises(ValueError, match="policy is 'gpt'; accepted: transformers, vllm"):
        CoPRS.load(tiny_bundle, policy="gpt")
