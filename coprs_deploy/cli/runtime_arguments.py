"""Options of the verbs that run a bundle, and its opening."""

from __future__ import annotations

import argparse
from pathlib import Path

from coprs_deploy.cli.options import Option
from coprs_deploy.cli.parser import log
from coprs_deploy.policy.vllm_policy.settings import read_settings
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
    Option("policy"),
    Option("policy_device"),
    Option("policy_dtype"),
    Option("prompt_lookup_num_tokens", parse=int),
    Option("static_decoding"),
    Option(
        "vllm",
        metavar="NAME=VALUE",
        collect=read_settings,
        help="setting of the vLLM engine, such as max_num_seqs=8; may be repeated",
    ),
)
"""Where and how the policy runs."""

REQUEST = (
    Option("max_targets", parse=int),
    Option("max_new_tokens", parse=int),
    Option("max_reasoning_tokens", parse=int),
    Option("deadline_ms", "--deadline-ms", parse=float),
    Option("reasoning"),
)
"""What one request asks for, and limits of its reasoning."""

QUEUE = (
    Option("max_queue_size", parse=int),
    Option("timeout_s"),
)
"""How many requests wait, and for how long."""


def add_bundle_argument(parser: argparse.ArgumentParser) -> None:
    """Add the optional positional argument ``BUNDLE``."""
    parser.add_argument(
        "bundle",
        metavar="BUNDLE",
        type=Path,
        nargs="?",
        help="bundle directory, or hf://org/name (default: the demo model)",
    )


def open_runtime(
    bundle: Path | None,
    options: RuntimeOptions,
    progress: Progress = lambda step: None,
    report: Progress = log,
) -> CoPRS:
    """Load a bundle, the demo model if None, and report which runtimes were measured as fastest."""
    coprs = CoPRS.load(bundle, options, progress=progress)
    for choice in coprs.runtime_choices:
        report(str(choice))
    return coprs
