"""Compare an existing bundle with the checkpoint that it was exported from.

Runs the equivalence check of export on other samples, the policy's graphs included. The exit code
is 1 if a graph is outside its tolerance, a file was changed, or the checkpoint is another one.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from coprs_deploy.artifacts import check_writable
from coprs_deploy.bundle import open_bundle
from coprs_deploy.checkpoint import read_checkpoint
from coprs_deploy.cli.options import Option, add_options, read_options
from coprs_deploy.cli.parser import print_result
from coprs_deploy.cli.tables import equivalence_table
from coprs_deploy.console import StepPrinter
from coprs_deploy.export import verify_bundle
from coprs_deploy.export.comparison import (
    BackendComparison,
    compare_backends,
    require_onnx_graphs,
)
from coprs_deploy.export.comparison_page import write_comparison_page
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
    parser.add_argument("bundle", metavar="BUNDLE", type=Path, help="bundle directory")
    parser.add_argument(
        "--against", type=Path, required=True, metavar="CHECKPOINT", help="its checkpoint"
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
    options = read_options(arguments, RuntimeOptions, OPTIONS)
    if arguments.report:
        check_writable(arguments.report, is_file=True)
        require_onnx_graphs(open_bundle(arguments.bundle))  # before the long check
    with StepPrinter() as progress:
        records = verify_bundle(
            arguments.bundle,
            arguments.against,
            options.device,
            progress,
            runtime=options.runtime,
            allow_engine_host_code=options.allow_engine_host_code,
        )
        policy = verify_policy_graphs(arguments.bundle, arguments.against, progress)
        comparisons = _compare_backends(arguments, progress) if arguments.report else ()
    passed = all(record.passed for record in records) and all(c.passed for c in comparisons)
    passed = passed and (policy is None or policy.passed)
    shown = {"passed": passed, "equivalence": [record.to_json() for record in records]}
    text = equivalence_table(records)
    if policy is not None:
        shown["policy_graphs"] = policy.to_json()
        text += f"\npolicy: {policy}"
    print_result(arguments, shown, text)
    return 0 if passed else 1


def _compare_backends(
    arguments: argparse.Namespace, progress: StepPrinter
) -> tuple[BackendComparison, ...]:
    bundle, checkpoint = open_bundle(arguments.bundle), read_checkpoint(arguments.against)
    samples = verification(bundle, checkpoint, None, progress).samples
    comparisons = compare_backends(bundle, checkpoint, samples, progress)
    write_comparison_page(arguments.report, bundle, comparisons, len(samples))
    return comparisons
