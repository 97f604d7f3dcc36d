"""Compute SAM's image embeddings once, for training with a frozen image encoder.

Equal images are stored once; a computation that was stopped goes on when the same command is given
again. A recipe takes the folder as data.features.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from coprs_deploy.cli.parser import add_json_flag, log, print_json

if TYPE_CHECKING:
    from coprs_deploy.images import RgbArray

SUMMARY = "compute SAM's image embeddings for training"

LOG_SECONDS = 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of this verb."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path)
    parser.add_argument(
        "examples", metavar="EXAMPLES", type=Path, nargs="+", help=".parquet or .jsonl files"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the embeddings")
    parser.add_argument("--shard-images", type=int, default=256, help="images a file (default 256)")
    parser.add_argument("--device", default="cpu", help="of the image encoder: cpu, cuda, cuda:N")
    add_json_flag(parser)


def run(arguments: argparse.Namespace) -> int:
    """Say what it takes, compute, report."""
    from dataclasses import asdict

    from coprs_deploy.checkpoint import read_checkpoint
    from coprs_deploy.data.examples import ExampleFile
    from coprs_deploy.training.features import compute_features, largest_bytes

    checkpoint = read_checkpoint(arguments.checkpoint)
    files = [ExampleFile(path) for path in arguments.examples]
    count = sum(len(file) for file in files)
    size = largest_bytes(checkpoint, count) / 1e9
    log(f"{count:,} examples, at most {size:,.2f} GB in float16; equal images are stored once")

    def images() -> Iterator[RgbArray]:
        for file in files:
            for example in file:
                yield example.image

    spoken = 0.0

    def progress(done: int, total: int, seconds: float) -> None:
        nonlocal spoken
        if seconds - spoken >= LOG_SECONDS or done == total:
            spoken = seconds
            left = seconds / done * (total - done)
            log(f"{done:,} of {total:,} examples, {left / 60:.1f} min left")

    report = compute_features(
        checkpoint,
        images(),
        count,
        arguments.out,
        shard_images=arguments.shard_images,
        device=arguments.device,
        progress=progress,
    )
    if arguments.json:
        print_json({"features": str(arguments.out), **asdict(report)})
    else:
        log(
            f"{arguments.out}: {report.num_images:,} images of {report.num_examples:,} examples, "
            f"{report.num_new:,} computed, {report.bytes_written / 1e6:,.1f} MB written"
        )
    return 0
