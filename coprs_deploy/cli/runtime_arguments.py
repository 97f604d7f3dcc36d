"""Arguments of the verbs that serve requests, and the runtime options made from them."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from coprs_deploy.cli.parser import add_plan_code_flag, add_runtime_arguments

if TYPE_CHECKING:
    from coprs_deploy.runtime import RuntimeOptions


def add_request_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that select runtime, device and policy."""
    add_runtime_arguments(parser)
    parser.add_argument(
        "--device", default="cpu", help="device of the graphs: cpu, cuda, cuda:N (default cpu)"
    )
    parser.add_argument(
        "--policy",
        choices=("transformers", "vllm"),
        default="transformers",
        help="library that runs the policy (default transformers)",
    )
    parser.add_argument(
        "--vllm",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="setting of the vLLM engine, as in max_num_seqs=8; repeatable",
    )
    parser.add_argument("--policy-device", help="device of the policy (default: --device)")
    parser.add_argument(
        "--policy-dtype",
        help="dtype of the policy: float32, bfloat16 or float16 (default: as stored)",
    )
    parser.add_argument("--num-threads", type=int, help="CPU threads per graph operator")
    parser.add_argument("--no-cuda-graphs", action="store_true", help="disable CUDA graph capture")
    add_plan_code_flag(parser)


def runtime_options(
    arguments: argparse.Namespace, *, max_queue_size: int = 256, timeout_s: float | None = None
) -> RuntimeOptions:
    """Build the runtime options.

    Args:
        arguments: parsed arguments.
        max_queue_size: number of requests that may wait behind those that the policy serves.
        timeout_s: time limit of a request in seconds; None disables it.

    Raises:
        ValueError: an argument is not accepted.
    """
    from coprs_deploy.policy.vllm_policy.settings import read_settings
    from coprs_deploy.runtime import RuntimeOptions

    return RuntimeOptions(
        runtime=arguments.runtime,
        retune=arguments.retune,
        inference_precision=arguments.inference_precision,
        device=arguments.device,
        policy=arguments.policy,
        vllm=read_settings(arguments.vllm),
        policy_device=arguments.policy_device,
        policy_dtype=arguments.policy_dtype,
        num_threads=arguments.num_threads,
        allow_engine_host_code=arguments.allow_engine_host_code,
        cuda_graphs=not arguments.no_cuda_graphs,
        max_queue_size=max_queue_size,
        timeout_s=timeout_s,
    )
