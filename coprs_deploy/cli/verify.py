"""Compare an existing bundle with the checkpoint that it was exported from.

BUNDLE --against CHECKPOINT             graphs against PyTorch
--encoder-swap OLD NEW --images DIR     two checkpoints that differ in their image encoder

Runs the equivalence check of export on other samples, the policy's graphs included. The exit code
is 1 if a graph is outside its tolerance, a file was changed, or the checkpoint is another one.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from coprs_deploy.artifacts import check_writable
from coprs_deploy.bundle import Bundle, open_bundle
from coprs_deploy.checkpoint import Checkpoint, read_checkpoint
from coprs_deploy.cli.options import Option, add_options, read_options
from coprs_deploy.cli.parser import print_result
from coprs_deploy.cli.tables import equivalence_table, movement_table
from coprs_deploy.console import StepPrinter
from coprs_deploy.export import verify_bundle
from coprs_deploy.export.comparison import (
    BackendComparison,
    compare_backends,
    require_onnx_graphs,
)
from coprs_deploy.export.comparison_page import write_comparison_page
from coprs_deploy.export.encoder_swap import compare_image_encoders, mean_movement
from coprs_deploy.export.verifier import verification, verify_policy_graphs
from coprs_deploy.runtime.options import RuntimeOptions

OPTIONS = (
    Option(
        "runtime",
        help="runtime of the graphs: onnxruntime or openvino (default: the one that the bundle was "
        "exported for)",
    ),
    Option("device"),
    Option("allow_engine_host_code"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of this verb."""
    parser.add_argument("bundle", metavar="BUNDLE", type=Path, nargs="?", help="bundle directory")
    parser.add_argument("--against", type=Path, metavar="CHECKPOINT", help="its checkpoint")
    parser.add_argument(
        "--encoder-swap",
        nargs=2,
        type=Path,
        metavar=("OLD", "NEW"),
        help="checkpoint, and the same one with another image encoder: how far priors and masks "
        "move; nothing is required of the difference",
    )
    parser.add_argument(
        "--images", type=Path, metavar="DIR", help="with --encoder-swap: images to compare on"
    )
    add_options(parser, RuntimeOptions, OPTIONS)
    parser.add_argument(
        "--report",
        type=Path,
        metavar="FILE",
        help="write a comparison of all backends, from the PyTorch module to every installed "
        "runtime, as one HTML page",
    )


def run(arguments: argparse.Namespace) -> int:
    """Verify; exit code 1 if a graph or backend is outside its tolerance."""
    if arguments.encoder_swap:
        return _compare_encoders(arguments)
    if not arguments.bundle or not arguments.against or arguments.images:
        raise ValueError(
            "accepted: BUNDLE --against CHECKPOINT, or --encoder-swap OLD NEW --images DIR"
        )
    options = read_options(arguments, RuntimeOptions, OPTIONS)
    if arguments.report:
        check_writable(arguments.report, is_file=True)
    bundle, checkpoint = open_bundle(arguments.bundle), read_checkpoint(arguments.against)
    if arguments.report:
        require_onnx_graphs(bundle)  # before the long check
    with StepPrinter() as progress:
        records = verify_bundle(
            bundle,
            checkpoint,
            options.device,
            progress,
            runtime=options.runtime,
            allow_engine_host_code=options.allow_engine_host_code,
        )
        policy = verify_policy_graphs(bundle, checkpoint, progress)
        comparisons = (
            _compare_backends(bundle, checkpoint, arguments.report, progress)
            if arguments.report
            else ()
        )
    passed = all(record.passed for record in records) and all(c.passed for c in comparisons)
    passed = passed and (policy is None or policy.passed)
    shown = {"passed": passed, "equivalence": [record.to_json() for record in records]}
    text = equivalence_table(records)
    if policy is not None:
        shown["policy_graphs"] = policy.to_json()
        text += f"\npolicy: {policy}"
    print_result(arguments, shown, text)
    return 0 if passed else 1


def _compare_encoders(arguments: argparse.Namespace) -> int:
    if arguments.bundle or arguments.against or arguments.report or not arguments.images:
        raise ValueError("--encoder-swap OLD NEW needs --images DIR, and no BUNDLE")
    with StepPrinter() as progress:
        old, new = arguments.encoder_swap
        moved = compare_image_encoders(old, new, arguments.images, progress)
    shown = {"images": [image.to_json() for image in moved], "mean": mean_movement(moved).to_json()}
    print_result(arguments, shown, movement_table(moved, mean_movement(moved)))
    return 0


def _compare_backends(
    bundle: Bundle, checkpoint: Checkpoint, report: Path, progress: StepPrinter
) -> tuple[BackendComparison, ...]:
    samples = verification(bundle, checkpoint, None, progress).samples
    comparisons = compare_backends(bundle, checkpoint, samples, progress)
    write_comparison_page(report, bundle, comparisons, len(samples))
    return comparisons
