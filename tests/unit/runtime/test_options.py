"""Refusals of runtime options."""

import numpy as np
import pytest

from coprs_deploy.runtime import CoPRS, RuntimeOptions


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, "device is 'tpu'; accepted: 'cpu', 'cuda' or 'cuda:N'"),
        ({"policy": "gpt"}, "policy is 'gpt'; accepted: auto, openvino, transformers, vllm"),
        (
            {"retune": True, "policy": "vllm"},
            "retune is True, runtime is None and policy is 'vllm'; accepted: retune with the",
        ),
        ({"max_cached_images": -1}, "max_cached_images is -1; it must be at least 0"),
        ({"max_queue_size": -1}, "max_queue_size is -1; it must be at least 0"),
        ({"timeout_s": 0}, "timeout_s is 0; it must be above 0"),
        ({"timeout_s": float("nan")}, "timeout_s is nan; accepted: a finite number"),
        ({"timeout_s": float("inf")}, "timeout_s is inf; accepted: a finite number"),
        ({"timeout_s": 1e300}, r"timeout_s is 1e\+300; it must be above 0 and at most 9223372036"),
        ({"timeout_s": "3"}, "timeout_s is '3'; accepted: a finite number"),
        ({"max_queue_size": 1.5}, "max_queue_size is 1.5; accepted: a whole number"),
        ({"max_cached_images": None}, "max_cached_images is None; accepted: a whole number"),
        ({"max_cached_images": True}, "max_cached_images is True; accepted: a whole number"),
        ({"num_threads": "2"}, "num_threads is '2'; accepted: a whole number"),
        ({"num_threads": float("nan")}, "num_threads is nan; accepted: a whole number"),
        ({"num_threads": 10**6}, "num_threads is 1000000; it must be at least 1 and at most 1024"),
        ({"max_queue_size": -(10**400)}, "max_queue_size is -100.*; it must be at least 0"),
        ({"device": None}, "device is None; accepted: 'cpu', 'cuda' or 'cuda:N'"),
        ({"device": "cuda:²"}, "device is 'cuda:²'; accepted: 'cpu', 'cuda' or 'cuda:N'"),
        ({"policy_device": "tpu"}, "policy_device is 'tpu'; accepted: 'cpu', 'cuda' or 'cuda:N'"),
        ({"policy_device": 0}, "policy_device is 0; accepted: 'cpu', 'cuda' or 'cuda:N'"),
        ({"policy_dtype": "bf16"}, "policy_dtype is 'bf16'; accepted: float32, bfloat16, float16"),
        ({"policy": 3}, "policy is 3; accepted: auto, openvino, transformers, vllm"),
        ({"runtime": 3}, "runtime is 3; accepted: str, None"),
        ({"retune": "yes"}, "retune is 'yes'; accepted: bool"),
        ({"cuda_graphs": 1}, "cuda_graphs is 1; accepted: bool"),
        ({"allow_engine_host_code": None}, "allow_engine_host_code is None; accepted: bool"),
        ({"inference_precision": 16}, "inference_precision is 16; accepted: fp32, bf16"),
        ({"cache_dir": "cache"}, "cache_dir is 'cache'; accepted: Path, None"),
        ({"vllm": {"max_num_seqs": 3}}, "vllm is {'max_num_seqs': 3}; accepted: VllmSettings"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RuntimeOptions(**options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bundle": 3}, "bundle is 3; accepted: str, Path, None"),
        ({"progress": True}, "progress is True; accepted: Callable"),
        ({"options": {"device": "cpu"}}, "options is {'device': 'cpu'}; accepted: RuntimeOptions"),
    ],
)
def test_load_argument_of_another_type_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        CoPRS.load(**arguments)


def test_options_numbers_of_numpy_are_accepted():
    options = RuntimeOptions(num_threads=np.int64(2), timeout_s=np.float32(0.5))
    assert (options.num_threads, options.timeout_s) == (2, 0.5)


def test_load_unknown_policy_is_refused(tiny_bundle):
    with pytest.raises(
        ValueError, match="policy is 'gpt'; accepted: auto, openvino, transformers, vllm"
    ):
        CoPRS.load(tiny_bundle, policy="gpt")
