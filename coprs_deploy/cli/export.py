"""Export a checkpoint to a bundle that the runtime answers with.

Three graphs are written and compared with PyTorch; outside the tolerance nothing is written and the
exit code is 1.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from coprs_deploy.cli.parser import add_json_flag, log, print_json
from coprs_deploy.cli.progress import StepPrinter
from coprs_deploy.cli.tables import equivalence_table

SUMMARY = "turn a checkpoint into a bundle of graphs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of this verb."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path)
    parser.add_argument("--out", type=Path, required=True, metavar="BUNDLE")
    parser.add_argument("--runtime", default="onnxruntime", help="default: onnxruntime")
    parser.add_argument("--precision", default="fp32", help="default: fp32")
    parser.add_argument(
        "--targets",
        default="1",
        metavar="N | MIN,PREFERRED,MAX",
        help="targets in one call: a fixed number, or a range (default 1)",
    )
    parser.add_argument(
        "--refer-to-policy",
        action="store_true",
        help="keep the policy where it is instead of copying it into the bundle",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a bundle that is there")
    add_json_flag(parser)


def run(arguments: argparse.Namespace) -> int:
    """Export, then show what was measured."""
    from coprs_deploy.export import ExportOptions, export_checkpoint
    from coprs_deploy.specs import TargetsProfile

    options = ExportOptions(
        runtime=arguments.runtime,
        precision=arguments.precision,
        targets=TargetsProfile.parse(arguments.targets),
        copy_policy=not arguments.refer_to_policy,
        overwrite=arguments.overwrite,
    )
    with StepPrinter() as progress:
        report = export_checkpoint(arguments.checkpoint, arguments.out, options, progress)
    records = report.bundle.manifest.equivalence
    if arguments.json:
        print_json(
            {
                **{k: v for k, v in asdict(report).items() if k != "bundle"},
                "bundle": str(arguments.out),
                "equivalence": [record.to_json() for record in records],
            }
        )
    else:
        print(equivalence_table(records))
        log(
            f"{arguments.out}: weights {report.weights_bytes / 1e6:,.1f} MB; peak memory "
            f"{report.peak_bytes_export / 1e6:,.0f} MB exporting, "
            f"{report.peak_bytes_total / 1e6:,.0f} MB with the check"
        )
    return 0
