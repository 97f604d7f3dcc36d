"""Options of the verbs that run a bundle, from the fields of :class:`RuntimeOptions`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from coprs_deploy.cli.options import Option, add_options, read_options

if TYPE_CHECKING:
    from coprs_deploy.runtime import RuntimeOptions

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
    Option("policy", choices=("transformers", "vllm")),
    Option("policy_device"),
    Option("policy_dtype"),
    Option(
        "vllm",
        metavar="NAME=VALUE",
        repeat=True,
        help="setting of the vLLM engine, such as max_num_seqs=8; may be repeated",
    ),
)
"""Where and how the policy runs."""

QUEUE = (
    Option("max_queue_size", parse=int),
    Option("timeout_s", "--timeout", parse=float, metavar="SECONDS"),
)
"""How many requests wait, and for how long."""


def add_runtime_options(parser: argparse.ArgumentParser, options: tuple[Option, ...]) -> None:
    """Add options of :class:`RuntimeOptions`."""
    from coprs_deploy.runtime.options import RuntimeOptions

    add_options(parser, RuntimeOptions, options)


def runtime_options(arguments: argparse.Namespace, options: tuple[Option, ...]) -> RuntimeOptions:
    """Build the options record from the options that were added.

    Raises:
        ValueError: a value or a combination is not accepted.
    """
    from coprs_deploy.policy.vllm_policy.settings import read_settings
    from coprs_deploy.runtime.options import RuntimeOptions

    if hasattr(arguments, "vllm"):
        arguments.vllm = read_settings(arguments.vllm)
    return read_options(arguments, RuntimeOptions, options)
