"""Export a checkpoint to a bundle that the runtime answers with.

Three graphs are written and compared with PyTorch; outside the tolerance nothing is written and the
exit code is 1.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from coprs_deploy.cli.parser import add_json_flag, log, print_json
from coprs_deploy.cli.tables import equivalence_table
from coprs_deploy.console import StepPrinter

SUMMARY = "turn a checkpoint into a bundle of graphs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of this verb."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path)
    parser.add_argument("--out", type=Path, required=True, metavar="BUNDLE")
    parser.add_argument(
        "--runtime",
        default="onnxruntime",
        help="onnxruntime (default), openvino, tensorrt or tensorrt-rtx",
    )
    parser.add_argument("--precision", default="fp32", help="fp32 (default), bf16, fp16 or int8")
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="DIR",
        help="pictures of the kind that the model will see, 32 to 128 of them, for int8",
    )
    parser.add_argument(
        "--targets",
        default="1",
        metavar="N | MIN,PREFERRED,MAX",
        help="targets in one call: a fixed number, or a range (default 1)",
    )
    parser.add_argument(
        "--images",
        default="1",
        metavar="1 | 1,PREFERRED,MAX",
        help="pictures that the image encoder takes in one call, for services with many users "
        "(default 1)",
    )
    parser.add_argument(
        "--aspect",
        metavar="W:H",
        help="all pictures are at least as wide (or high) as this: what is padding in all of them "
        "is not computed where that changes nothing (5 to 7%% of the operations for 16:9)",
    )
    parser.add_argument(
        "--drop-padding",
        action="store_true",
        help="with --aspect: compute nothing beyond it at all; about half the work for 16:9, and "
        "another function, whose masks have to be judged",
    )
    parser.add_argument(
        "--refer-to-policy",
        action="store_true",
        help="keep the policy where it is instead of copying it into the bundle",
    )
    engines = parser.add_argument_group("engines (tensorrt, tensorrt-rtx)")
    engines.add_argument(
        "--gpu",
        metavar="SM,SM",
        help="compute capabilities that tensorrt-rtx builds for, as sm_80,sm_89,sm_120 "
        "(default: the GPU of this machine)",
    )
    engines.add_argument(
        "--workspace", type=float, metavar="GIB", help="limit of an engine's scratch memory"
    )
    engines.add_argument(
        "--version-compatible",
        action="store_true",
        help="later versions of tensorrt load the engines, which then carry code",
    )
    engines.add_argument(
        "--hardware-compatible",
        action="store_true",
        help="every GPU from sm_80 on runs the engines of tensorrt, somewhat slower",
    )
    engines.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="folder of engines and calibrations that were made before (default: "
        "COPRS_DEPLOY_CACHE, or the user's cache folder)",
    )
    engines.add_argument(
        "--cache-limit",
        type=float,
        metavar="GIB",
        help="remove engines from this folder that were not used for longest, down to this size",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a bundle that is there")
    add_json_flag(parser)


def run(arguments: argparse.Namespace) -> int:
    """Export, then show what was measured."""
    from coprs_deploy.engines.trt.cache import BuildCallbacks
    from coprs_deploy.engines.trt.variants import parse_gpus
    from coprs_deploy.export import ExportOptions, export_checkpoint
    from coprs_deploy.specs import IMAGE_ENCODER, OptimizationProfile, parse_aspect_ratio

    options = ExportOptions(
        runtime=arguments.runtime,
        precision=arguments.precision,
        targets=OptimizationProfile.parse(arguments.targets),
        images=OptimizationProfile.parse(arguments.images, "images"),
        aspect_ratio=None
        if arguments.aspect_ratio is None
        else parse_aspect_ratio(arguments.aspect_ratio),
        drop_padding=arguments.drop_padding,
        copy_policy=not arguments.refer_to_policy,
        overwrite=arguments.overwrite,
        gpus=parse_gpus(arguments.gpu),
        workspace_bytes=_bytes_from_gib(arguments.workspace),
        version_compatible=arguments.version_compatible,
        hardware_compatible=arguments.hardware_compatible,
        cache_limit_bytes=_bytes_from_gib(arguments.cache_limit),
        cache=arguments.cache,
        calibration=arguments.calibration,
    )
    with StepPrinter() as progress:
        watch = BuildCallbacks(note=progress.note, phase=progress.phase)
        report = export_checkpoint(arguments.checkpoint, arguments.out, options, progress, watch)
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
        if report.bundle.manifest.graphs[IMAGE_ENCODER].spec.drops_padding:
            log(
                "Without padding the encoder is another function, which no tolerance judges: "
                f"`coprs-deploy evaluate {arguments.out} --examples FILE` does, on your pictures"
            )
        engines = [g.engine for g in report.bundle.manifest.graphs.values() if g.engine]
        if any(engine.verified_on is None for engine in engines):
            log(
                "The engines never ran: the figures above are of the graphs that they were built "
                "from. On the machine that will run them: `coprs-deploy verify "
                f"{arguments.out} --against {arguments.checkpoint} --device cuda`"
            )
    return 0


def _bytes_from_gib(size: float | None) -> int | None:
    return None if size is None else int(size * 2**30)
