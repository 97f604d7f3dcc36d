"""Options of the verbs that run a bundle, from the fields of :class:`RuntimeOptions`."""

from __future__ import annotations

import argparse
from typing import Any

from coprs_deploy.cli.options import Option, add_options, read_options
from coprs_deploy.policy.vllm_policy.settings import read_settings
from coprs_deploy.runtime.options import POLICIES, RuntimeOptions

GRAPHS = (
    Option("runtime"),
    Option("retune"),
    Option("inference_precision"),
    Option("device"),
    Option("num_threads", parse=int),
    Option("cuda_graphs", help="disable CUDA graph capture"),
    Option("allow_engine_host_code"),
)
"""Where and how the graphs run."""

POLICY = (
    Option("policy", choices=POLICIES),
    Option("policy_device"),
    Option("policy_dtype"),
)
"""Where and how the policy runs."""

QUEUE = (
    Option("max_queue_size", parse=int),
    Option("timeout_s", "--timeout", parse=float, metavar="SECONDS"),
)
"""How many requests wait, and for how long."""


def add_runtime_options(
    parser: argparse.ArgumentParser, options: tuple[Option, ...] = GRAPHS + POLICY
) -> None:
    """Add options for graphs and policy."""
    add_options(parser, RuntimeOptions, options)
    parser.add_argument(
        "--vllm",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="setting of the vLLM engine, such as max_num_seqs=8; may be repeated",
    )


def runtime_options(
    arguments: argparse.Namespace, options: tuple[Option, ...] = GRAPHS + POLICY, **others: Any
) -> RuntimeOptions:
    """Build the options record.

    Raises:
        ValueError: a value or a combination is not accepted.
    """
    settings = read_settings(arguments.vllm)
    return read_options(arguments, RuntimeOptions, options, vllm=settings, **others)
