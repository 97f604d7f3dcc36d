"""Export a checkpoint to a bundle.

Writes the three graphs and compares them with PyTorch. If one is outside its tolerance, nothing is
written and the exit code is 1.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from coprs_deploy.cli.parser import add_json_flag, log, print_json
from coprs_deploy.console import StepPrinter, equivalence_table

if TYPE_CHECKING:
    from coprs_deploy.export import ExportOptions, ExportReport

SUMMARY = "export a checkpoint to a bundle of graphs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of this verb."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path)
    parser.add_argument("--out", type=Path, required=True, metavar="BUNDLE")
    parser.add_argument(
        "--runtime",
        default="onnxruntime",
        help="runtime of the graphs: onnxruntime (default), openvino, tensorrt or tensorrt-rtx",
    )
    parser.add_argument(
        "--precision",
        default="fp32",
        help="precision of weights and matrix products: fp32 (default), bf16, fp16 or int8",
    )
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="DIR",
        help="directory of images to calibrate int8 on, 32 to 128 typical ones",
    )
    parser.add_argument(
        "--targets",
        default="1",
        metavar="N | MIN,OPT,MAX",
        help="number of targets per call, fixed or an optimization profile (default: 1)",
    )
    parser.add_argument(
        "--images",
        default="1",
        metavar="1 | 1,OPT,MAX",
        help="number of images per image encoder call, for many concurrent users (default: 1)",
    )
    parser.add_argument(
        "--aspect-ratio",
        metavar="W:H",
        help="fixed aspect ratio of all images: skip padding that they share, without changing the "
        "result (5 to 7%% of the operations for 16:9); images may be more elongated than this",
    )
    parser.add_argument(
        "--drop-padding",
        action="store_true",
        help="with --aspect-ratio: skip that padding in every block; about half the work for 16:9, "
        "but a different function whose masks have to be evaluated",
    )
    parser.add_argument(
        "--external-policy",
        action="store_true",
        help="refer to the policy by a relative path instead of copying it",
    )
    engines = parser.add_argument_group("engines (tensorrt, tensorrt-rtx)")
    engines.add_argument(
        "--compute-capabilities",
        metavar="SM,SM",
        help="compute capabilities to build for with tensorrt-rtx, such as sm_80,sm_89,sm_120 "
        "(default: the GPU of this machine)",
    )
    engines.add_argument(
        "--workspace", type=float, metavar="GIB", help="scratch memory limit of an engine"
    )
    engines.add_argument(
        "--version-compatible",
        action="store_true",
        help="build engines that later versions of tensorrt load; they carry host code",
    )
    engines.add_argument(
        "--hardware-compatible",
        action="store_true",
        help="build engines of tensorrt that every GPU from sm_80 on can run, somewhat slower",
    )
    engines.add_argument(
        "--cache-dir",
        type=Path,
        metavar="DIR",
        help="directory of the engine and calibration cache (default: COPRS_DEPLOY_CACHE, or the "
        "user's cache)",
    )
    engines.add_argument(
        "--max-cache-size",
        type=float,
        metavar="GIB",
        help="remove the least recently used engines from the cache down to this size",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing bundle")
    add_json_flag(parser)


def run(arguments: argparse.Namespace) -> int:
    """Export, and print the equivalence records."""
    from coprs_deploy.engines.trt.build import BuildCallbacks
    from coprs_deploy.export import export_checkpoint

    options = _options(arguments)
    with StepPrinter() as progress:
        callbacks = BuildCallbacks(on_note=progress.note, on_progress=progress.progress)
        report = export_checkpoint(
            arguments.checkpoint, arguments.out, options, progress, callbacks
        )
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
        _log_advice(report, arguments.checkpoint)
    return 0


def _options(arguments: argparse.Namespace) -> ExportOptions:
    from coprs_deploy.engines.trt.variants import parse_capabilities
    from coprs_deploy.export import ExportOptions
    from coprs_deploy.specs import OptimizationProfile, parse_aspect_ratio

    aspect_ratio = arguments.aspect_ratio
    return ExportOptions(
        runtime=arguments.runtime,
        precision=arguments.precision,
        targets=OptimizationProfile.parse(arguments.targets),
        images=OptimizationProfile.parse(arguments.images, "images"),
        aspect_ratio=None if aspect_ratio is None else parse_aspect_ratio(aspect_ratio),
        drop_padding=arguments.drop_padding,
        external_policy=arguments.external_policy,
        overwrite=arguments.overwrite,
        compute_capabilities=parse_capabilities(arguments.compute_capabilities),
        workspace_bytes=_bytes_from_gib(arguments.workspace),
        version_compatible=arguments.version_compatible,
        hardware_compatible=arguments.hardware_compatible,
        cache_dir=arguments.cache_dir,
        max_cache_bytes=_bytes_from_gib(arguments.max_cache_size),
        calibration_images=arguments.calibration,
    )


def _log_advice(report: ExportReport, checkpoint: Path) -> None:
    """Log size and memory, and the commands that evaluate or verify the bundle where needed."""
    from coprs_deploy.specs import IMAGE_ENCODER

    bundle = report.bundle
    log(
        f"{bundle.path}: weights {report.weights_bytes / 1e6:,.1f} MB; peak memory "
        f"{report.peak_bytes_export / 1e6:,.0f} MB exporting, "
        f"{report.peak_bytes_total / 1e6:,.0f} MB with the equivalence check"
    )
    graphs = bundle.manifest.graphs
    if graphs[IMAGE_ENCODER].spec.drops_padding:
        log(
            "An encoder without padding is a different function, for which there is no tolerance: "
            f"evaluate it on your images with `coprs-deploy evaluate {bundle.path} "
            "--examples FILE`"
        )
    if any(graph.engine and graph.engine.verified_on is None for graph in graphs.values()):
        log(
            "The engines have never run: the table above is of the graphs that they were built "
            "from. On the machine that will run them: `coprs-deploy verify "
            f"{bundle.path} --against {checkpoint} --device cuda`"
        )


def _bytes_from_gib(size: float | None) -> int | None:
    return None if size is None else int(size * 2**30)
