"""Compare an existing bundle with the checkpoint that it was exported from.

Runs the equivalence check of export on other samples. The exit code is 1 if a graph is outside its
tolerance, a file was changed, or the checkpoint is another one.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from coprs_deploy.cli.options import Option
from coprs_deploy.cli.parser import add_json_flag, print_json
from coprs_deploy.cli.runtime_arguments import add_runtime_options, runtime_options
from coprs_deploy.cli.tables import equivalence_table
from coprs_deploy.console import StepPrinter

if TYPE_CHECKING:
    from coprs_deploy.export.comparison import BackendComparison

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
    add_runtime_options(parser, OPTIONS)
    parser.add_argument(
        "--report",
        type=Path,
        metavar="FILE",
        help="write a comparison of all backends, from the PyTorch module to every installed "
        "runtime, as one HTML page",
    )
    add_json_flag(parser)


def run(arguments: argparse.Namespace) -> int:
    """Verify; exit code 1 if a graph or backend is outside its tolerance."""
    from coprs_deploy.export import verify_bundle

    options = runtime_options(arguments, OPTIONS)
    if arguments.report:
        _check_report(arguments.bundle, arguments.report)
    with StepPrinter() as progress:
        records = verify_bundle(
            arguments.bundle,
            arguments.against,
            options.device,
            progress,
            runtime=options.runtime,
            allow_engine_host_code=options.allow_engine_host_code,
        )
        comparisons = _compare_backends(arguments, progress) if arguments.report else ()
    passed = all(record.passed for record in records) and all(c.passed for c in comparisons)
    if arguments.json:
        rows = [record.to_json() for record in records]
        print_json({"passed": passed, "equivalence": rows})
    else:
        print(equivalence_table(records))
    return 0 if passed else 1


def _check_report(bundle: Path, report: Path) -> None:
    """Refuse a report that cannot be made or written before the long check."""
    from coprs_deploy.bundle import open_bundle
    from coprs_deploy.export.comparison import require_onnx_graphs

    require_onnx_graphs(open_bundle(bundle))
    report.parent.mkdir(parents=True, exist_ok=True)
    if report.is_dir() or not os.access(report if report.exists() else report.parent, os.W_OK):
        raise ValueError(f"--report {report} cannot be written; accepted: the path of a file")


def _compare_backends(
    arguments: argparse.Namespace, progress: StepPrinter
) -> tuple[BackendComparison, ...]:
    from coprs_deploy.bundle import open_bundle
    from coprs_deploy.checkpoint import read_checkpoint
    from coprs_deploy.export.comparison import compare_backends
    from coprs_deploy.export.comparison_page import write_comparison_page
    from coprs_deploy.export.verifier import verification

    bundle, checkpoint = open_bundle(arguments.bundle), read_checkpoint(arguments.against)
    samples = verification(bundle, checkpoint, None, progress).samples
    comparisons = compare_backends(bundle, checkpoint, samples, progress)
    write_comparison_page(arguments.report, bundle, comparisons, len(samples))
    return comparisons
