"""Compare an existing bundle with the checkpoint that it was exported from.

The same check that export runs, on other inputs. Exit code 1 when a graph is outside its tolerance,
a file was changed, or the checkpoint is another one.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from coprs_deploy.cli.parser import add_json_flag, print_json
from coprs_deploy.cli.progress import StepPrinter
from coprs_deploy.cli.tables import equivalence_table

SUMMARY = "check a bundle against its checkpoint again"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of this verb."""
    parser.add_argument("bundle", metavar="BUNDLE", type=Path)
    parser.add_argument("--against", type=Path, required=True, metavar="CHECKPOINT")
    parser.add_argument("--device", default="cpu", help="of the graphs: cpu, cuda, cuda:N")
    add_json_flag(parser)


def run(arguments: argparse.Namespace) -> int:
    """Verify, and fail when any graph does."""
    from coprs_deploy.export import verify_bundle

    with StepPrinter() as progress:
        records = verify_bundle(arguments.bundle, arguments.against, arguments.device, progress)
    passed = all(record.passed for record in records)
    if arguments.json:
        rows = [record.to_json() for record in records]
        print_json({"passed": passed, "equivalence": rows})
    else:
        print(equivalence_table(records))
    return 0 if passed else 1
