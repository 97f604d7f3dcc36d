"""Measure, and write a report.

  full-size-export   conversion and export of SAM's real sizes with random weights: time, memory,
                     equality

Exit code 1 when a limit that the suite states is not kept.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from coprs_deploy.cli.parser import add_json_flag, log, print_json
from coprs_deploy.cli.progress import StepPrinter

SUMMARY = "measure, and write a report"

SUITES = ("full-size-export",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of this verb."""
    parser.add_argument("--suite", choices=SUITES, required=True)
    parser.add_argument("--sizes", default="vit_b,vit_h", help="of SAM (default vit_b,vit_h)")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder of the report"
    )
    add_json_flag(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run a suite."""
    from coprs_deploy.architecture import SAM_SIZES
    from coprs_deploy.benchmarks import full_size_export

    sizes = arguments.sizes.split(",")
    unknown = [size for size in sizes if size not in SAM_SIZES]
    if unknown:
        raise ValueError(f"sizes names {unknown[0]!r}; accepted: {', '.join(SAM_SIZES)}")
    with StepPrinter() as progress:
        report = full_size_export.run(arguments.out, sizes, progress)
    if arguments.json:
        print_json(report)
    else:
        print(full_size_export.render(report))
    failures = full_size_export.failures(report)
    for failure in failures:
        log(failure)
    return 1 if failures else 0
