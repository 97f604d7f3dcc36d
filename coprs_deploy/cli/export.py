"""Export a checkpoint to a bundle.

Writes the three graphs and compares them with PyTorch. If one is outside its tolerance, nothing is
written and the exit code is 1.
"""

from __future__ import annotations

import argparse
import shlex
from dataclasses import asdict
from pathlib import Path

from coprs_deploy.cli.options import Option, add_options, read_options
from coprs_deploy.cli.parser import log, print_result
from coprs_deploy.cli.tables import equivalence_table
from coprs_deploy.console import StepPrinter
from coprs_deploy.engines.trt.build import BuildCallbacks
from coprs_deploy.engines.trt.variants import parse_capabilities
from coprs_deploy.export import ExportOptions, ExportReport, export_checkpoint
from coprs_deploy.export.model_repository import check_model_repository, write_model_repository
from coprs_deploy.specs import IMAGE_ENCODER, OptimizationProfile, parse_aspect_ratio

GRAPHS = (
    Option("runtime"),
    Option("precision"),
    Option("calibration_images", "--calibration", parse=Path, metavar="DIR"),
    Option("targets", parse=OptimizationProfile.parse, metavar="N | MIN,OPT,MAX"),
    Option("images", parse=OptimizationProfile.parse, metavar="1 | 1,OPT,MAX"),
    Option("aspect_ratio", parse=parse_aspect_ratio, metavar="W:H"),
    Option("drop_padding"),
    Option("policy_runtime"),
    Option("policy_precision"),
    Option("policy_calibration", parse=Path, metavar="EXAMPLES"),
    Option("allow_inexact_policy"),
    Option("external_policy"),
    Option("overwrite"),
)

ENGINES = (
    Option("compute_capabilities", parse=parse_capabilities, metavar="SM,SM"),
    Option("workspace_bytes", help="scratch memory limit of an engine (default: TensorRT's)"),
    Option("version_compatible"),
    Option("hardware_compatible"),
    Option("cache_dir", parse=Path, metavar="DIR"),
    Option("max_cache_bytes", "--max-cache-size"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of this verb."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="checkpoint directory")
    parser.add_argument("--out", type=Path, required=True, metavar="BUNDLE", help="bundle to write")
    parser.add_argument(
        "--triton",
        type=Path,
        metavar="DIR",
        help="also write a model repository of NVIDIA's Triton Inference Server (runtimes "
        "onnxruntime and tensorrt)",
    )
    add_options(parser, ExportOptions, GRAPHS)
    group = parser.add_argument_group("engines (tensorrt, tensorrt-rtx)")
    add_options(group, ExportOptions, ENGINES)


def run(arguments: argparse.Namespace) -> int:
    """Export, and print the equivalence records."""
    options = read_options(arguments, ExportOptions, GRAPHS + ENGINES)
    if arguments.triton is not None:
        check_model_repository(options.runtime, arguments.out, arguments.triton, options.overwrite)
    with StepPrinter() as progress:
        callbacks = BuildCallbacks(on_note=progress.note, on_progress=progress.progress)
        report = export_checkpoint(
            arguments.checkpoint, arguments.out, options, progress, callbacks
        )
    if arguments.triton is not None:
        write_model_repository(report.bundle, arguments.triton, options.overwrite)
    records = report.bundle.manifest.equivalence
    shown = {
        **{k: v for k, v in asdict(report).items() if k != "bundle"},
        "bundle": str(arguments.out),
        "equivalence": [record.to_json() for record in records],
    }
    print_result(arguments, shown, equivalence_table(records))
    _log_advice(report, arguments.checkpoint)
    return 0


def _log_advice(report: ExportReport, checkpoint: Path) -> None:
    """Log size and memory, and the commands that evaluate or verify the bundle where needed."""
    bundle = report.bundle
    log(
        f"{bundle.path}: weights {report.weights_bytes / 1e6:,.1f} MB; peak memory "
        f"{report.peak_bytes_export / 1e6:,.0f} MB exporting, "
        f"{report.peak_bytes_total / 1e6:,.0f} MB with the equivalence check"
    )
    graphs, path = bundle.manifest.graphs, shlex.quote(str(bundle.path))
    if graphs[IMAGE_ENCODER].spec.drops_padding:
        log(
            "An encoder without padding is a different function, for which there is no tolerance: "
            f"evaluate it on your images with `coprs-deploy evaluate {path} --dataset FILE`"
        )
    if any(graph.engine and graph.engine.verified_on is None for graph in graphs.values()):
        log(
            "The engines have never run: the table above is of the graphs that they were built "
            "from. On the machine that will run them: `coprs-deploy verify "
            f"{path} --against {shlex.quote(str(checkpoint))} --device cuda`"
        )
