"""Compare an existing bundle with the checkpoint that it was exported from.

The same check that export runs, on other inputs. Exit code 1 when a graph is outside its tolerance,
a file was changed, or the checkpoint is another one.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from coprs_deploy.cli.parser import add_json_flag, add_plan_code_flag, print_json
from coprs_deploy.cli.tables import equivalence_table
from coprs_deploy.console import StepPrinter

if TYPE_CHECKING:
    from coprs_deploy.export.comparison import BackendComparison

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
    add_plan_code_flag(parser)
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

    if arguments.report:
        _check_chain(arguments.bundle)
    with StepPrinter() as progress:
        records = verify_bundle(
            arguments.bundle,
            arguments.against,
            arguments.device,
            progress,
            runtime=arguments.runtime,
            allow_engine_host_code=arguments.allow_engine_host_code,
        )
        links = _measure_chain(arguments, progress) if arguments.report else ()
    passed = all(record.passed for record in records) and all(link.passed for link in links)
    if arguments.json:
        rows = [record.to_json() for record in records]
        print_json({"passed": passed, "equivalence": rows})
    else:
        print(equivalence_table(records))
    return 0 if passed else 1


def _check_chain(bundle: Path) -> None:
    """Refuse before the long check what could not be reported after it."""
    from coprs_deploy.bundle import open_bundle
    from coprs_deploy.export.comparison import require_onnx_graphs

    require_onnx_graphs(open_bundle(bundle))


def _measure_chain(
    arguments: argparse.Namespace, progress: StepPrinter
) -> tuple[BackendComparison, ...]:
    from coprs_deploy.bundle import open_bundle
    from coprs_deploy.checkpoint import read_checkpoint
    from coprs_deploy.export.comparison import compare_backends
    from coprs_deploy.export.comparison_page import write_chain_page
    from coprs_deploy.export.equivalence import END_TO_END, TOLERANCES, reference_opener
    from coprs_deploy.export.samples import draw_bundle_samples
    from coprs_deploy.specs import IMAGE_ENCODER

    bundle, checkpoint = open_bundle(arguments.bundle), read_checkpoint(arguments.against)
    graphs = bundle.manifest.graphs
    encoder = graphs[IMAGE_ENCODER]
    reference = reference_opener(checkpoint, {name: graph.spec for name, graph in graphs.items()})
    pools_masks = TOLERANCES[encoder.runtime, encoder.precision][END_TO_END].pools_masks
    samples, _ = draw_bundle_samples(bundle.manifest, reference, pools_masks, seed=1)
    links = compare_backends(bundle, checkpoint, samples, progress)
    write_chain_page(arguments.report, bundle, links, len(samples))
    return links
