"""Arguments of the verbs that answer questions, and the options that they stand for."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from coprs_deploy.cli.parser import add_plan_code_flag, add_runtime_arguments

if TYPE_CHECKING:
    from coprs_deploy.runtime import RuntimeOptions


def add_answering_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what says where graphs and policy run, and how."""
    add_runtime_arguments(parser)
    parser.add_argument("--device", default="cpu", help="of the graphs: cpu, cuda, cuda:N")
    parser.add_argument(
        "--policy",
        choices=("transformers", "vllm"),
        default="transformers",
        help="which library writes the reasoning (default transformers)",
    )
    parser.add_argument(
        "--vllm",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting of the vLLM engine, as in max_num_seqs=8; may be given several times",
    )
    parser.add_argument("--policy-device", help="of the policy (default: as --device)")
    parser.add_argument("--policy-dtype", help="float32, bfloat16 or float16 (default: as stored)")
    parser.add_argument("--threads", type=int, help="CPU threads of one graph operator")
    parser.add_argument(
        "--no-cuda-graphs", action="store_true", help="launch an engine's kernels one by one"
    )
    add_plan_code_flag(parser)


def runtime_options(
    arguments: argparse.Namespace, *, max_queue_size: int = 256, timeout_s: float | None = None
) -> RuntimeOptions:
    """Read them.

    Args:
        arguments: as parsed.
        max_queue_size: how many answers may wait beyond those that are decoded together.
        timeout_s: seconds within which an answer must be ready; None waits for ever.

    Raises:
        ValueError: one is not accepted.
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
        num_threads=arguments.threads,
        allow_engine_host_code=arguments.allow_engine_host_code,
        cuda_graphs=not arguments.no_cuda_graphs,
        max_queue_size=max_queue_size,
        timeout_s=timeout_s,
    )
