"""Arguments of the verbs that run a bundle, and its opening.

Options come from the fields of :class:`~coprs_deploy.runtime.RuntimeOptions`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from coprs_deploy.cli.options import Option, add_options, read_options
from coprs_deploy.cli.parser import log

if TYPE_CHECKING:
    from coprs_deploy.runtime import CoPRS, RuntimeOptions
    from coprs_deploy.runtime.loading import Progress

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


def add_bundle_argument(parser: argparse.ArgumentParser) -> None:
    """Add the optional positional argument ``BUNDLE``."""
    parser.add_argument(
        "bundle",
        metavar="BUNDLE",
        type=Path,
        nargs="?",
        help="bundle directory (default: the demo model)",
    )


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


def open_runtime(
    bundle: Path | None, options: RuntimeOptions, progress: Progress = lambda step: None
) -> CoPRS:
    """Load a bundle, the demo model if None, and log which runtimes were measured as fastest."""
    from coprs_deploy.runtime import CoPRS

    coprs = CoPRS.load(bundle, options, progress=progress)
    for choice in coprs.runtime_choices:
        log(str(choice))
    return coprs
