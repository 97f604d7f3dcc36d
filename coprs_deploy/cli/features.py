"""Precompute SAM's image embeddings for training with a frozen image encoder.

Equal images are stored once. Re-run the same command to resume. Set data.features of a recipe, or
features of a distillation, to the output directory.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from coprs_deploy.artifacts import check_writable
from coprs_deploy.checkpoint import read_checkpoint
from coprs_deploy.cli.parser import log, print_result
from coprs_deploy.console import StepPrinter
from coprs_deploy.data.readers.registry import SourceOptions, open_images, require_images


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of this verb."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="checkpoint directory")
    parser.add_argument(
        "examples",
        metavar="EXAMPLES",
        nargs="+",
        help="example files, data sets, as in refcoco:train, or folders of images",
    )
    parser.add_argument(
        "--root",
        type=Path,
        metavar="DIR",
        help="folder of the public data sets (default: $COPRS_DEPLOY_DATA, or the current folder)",
    )
    parser.add_argument("--out", type=Path, required=True, help="output directory")
    parser.add_argument(
        "--images-per-shard", type=int, default=256, help="images per file (default: 256)"
    )
    parser.add_argument(
        "--device",
        default="cpu",
        help="device of the image encoder: cpu, cuda or cuda:N (default: cpu)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the maximum size, compute the embeddings, print the result."""
    check_writable(arguments.out)
    from coprs_deploy.training.features import compute_features, max_feature_bytes

    checkpoint = read_checkpoint(arguments.checkpoint)
    options = SourceOptions(arguments.root)
    files = [open_images(source, options) for source in arguments.examples]
    for file in files:
        require_images(file)
    count = sum(len(file) for file in files)
    size = max_feature_bytes(checkpoint, count) / 1e9
    log(f"{count:,} examples, at most {size:,.2f} GB in float16; equal images are stored once")

    with StepPrinter() as steps:
        steps("compute embeddings")

        def progress(done: int, total: int, seconds: float) -> None:
            left = seconds / done * (total - done)
            steps.progress(f"{done:,} of {total:,} examples, {left / 60:.1f} min left")

        report = compute_features(
            checkpoint,
            (example.image for file in files for example in file),
            count,
            arguments.out,
            images_per_shard=arguments.images_per_shard,
            device=arguments.device,
            progress=progress,
        )
    text = (
        f"{arguments.out}: {report.num_images:,} distinct images in {report.num_examples:,} "
        f"examples, {report.num_new:,} computed, {report.bytes_written / 1e6:,.1f} MB written"
    )
    opened = [file.to_json() for file in files]
    result = {"features": str(arguments.out), **asdict(report), "files": opened}
    print_result(arguments, result, text)
    return 0
