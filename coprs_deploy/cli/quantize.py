"""Quantize the policy of a checkpoint for vLLM.

Writes a checkpoint whose policy is in the compressed-tensors format, and compares it with the float
policy on held-out examples. Outside its tolerance nothing is written and the exit code is 1.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from coprs_deploy.cli.options import Option, add_options, read_options
from coprs_deploy.cli.parser import print_result
from coprs_deploy.console import StepPrinter
from coprs_deploy.export.policy_quantization import (
    SCHEMES,
    QuantizationOptions,
    quantize_checkpoint,
)

OPTIONS = (Option("allow_inexact_policy"), Option("overwrite"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of this verb."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="checkpoint directory")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="CHECKPOINT", help="checkpoint to write"
    )
    parser.add_argument(
        "--scheme",
        required=True,
        help="w4a16 (weights of 4 bits), w8a8 (weights and inputs int8) or fp8",
        choices=SCHEMES,
    )
    parser.add_argument(
        "--calibration",
        type=Path,
        required=True,
        metavar="EXAMPLES",
        help="example file, .parquet or .jsonl: 8 or more, best 128 typical ones; one in four "
        "images is held out for the check",
    )
    add_options(parser, QuantizationOptions, OPTIONS)


def run(arguments: argparse.Namespace) -> int:
    """Quantize, and print the measured difference."""
    options = read_options(arguments, QuantizationOptions, OPTIONS)
    with StepPrinter() as progress:
        checkpoint = quantize_checkpoint(
            arguments.checkpoint,
            arguments.out,
            arguments.scheme,
            arguments.calibration,
            options,
            report=progress,
        )
    record = checkpoint.config.policy_quantization
    assert record is not None
    shown = {"checkpoint": str(checkpoint.path), "quantization": record.to_json()}
    print_result(arguments, shown, f"{checkpoint.path}: {record}")
    return 0
