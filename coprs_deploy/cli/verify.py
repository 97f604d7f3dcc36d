"""Compare an existing bundle with the checkpoint that it was exported from.

The same check that export runs, on other inputs. Exit code 1 when a graph is outside its tolerance,
a file was changed, or the checkpoint is another one.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from coprs_deploy.cli.parser import add_json_flag, print_json
from coprs_deploy.cli.progress import StepPrinter
from coprs_deploy.cli.tables import equivalence_table

if TYPE_CHECKING:
    from coprs_deploy.export.chain import Link

SUMMARY = "check a bundle against its checkpoint again"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of this verb."""
    parser.add_argument("bundle", metavar="BUNDLE", type=Path)
    parser.add_argument("--against", type=Path, required=True, metavar="CHECKPOINT")
    parser.add_argument(
        "--runtime",
        help="of the graphs: onnxruntime or openvino (default: the one that the bundle was "
        "exported for)",
    )
    parser.add_argument("--device", default="cpu", help="of the graphs: cpu, cuda, cuda:N")
    parser.add_argument(
        "--report",
        type=Path,
        metavar="PAGE",
        help="write the whole chain, from the PyTorch module to the masks of every runtime that is "
        "here, as one HTML page",
    )
    add_json_flag(parser)


def run(arguments: argparse.Namespace) -> int:
    """Verify, and fail when any graph does."""
    from coprs_deploy.export import verify_bundle

    with StepPrinter() as progress:
        records = verify_bundle(
            arguments.bundle,
            arguments.against,
            arguments.device,
            progress,
            runtime=arguments.runtime,
        )
        links = _measure_chain(arguments, progress) if arguments.report else ()
    passed = all(record.passed for record in records) and all(link.passed for link in links)
    if arguments.json:
        rows = [record.to_json() for record in records]
        print_json({"passed": passed, "equivalence": rows})
    else:
        print(equivalence_table(records))
    return 0 if passed else 1


def _measure_chain(arguments: argparse.Namespace, progress: StepPrinter) -> tuple[Link, ...]:
    from coprs_deploy.bundle import open_bundle
    from coprs_deploy.checkpoint import read_checkpoint
    from coprs_deploy.export.chain import measure_chain
    from coprs_deploy.export.chain_page import write_chain_page
    from coprs_deploy.export.equivalence import sample_inputs
    from coprs_deploy.specs import PRIOR

    bundle = open_bundle(arguments.bundle)
    targets = bundle.manifest.graphs[PRIOR].spec.targets.preferred
    samples = sample_inputs(bundle.manifest.geometry, bundle.manifest.policy.width, targets, seed=1)
    links = measure_chain(bundle, read_checkpoint(arguments.against), samples, progress)
    write_chain_page(arguments.report, bundle, links, len(samples))
    return links
