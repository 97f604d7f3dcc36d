"""Convert public weights to a checkpoint.

--policy DIR --sam FILE                a transformers policy and SAM: initial weights for training
--training-checkpoint DIR --sam FILE   a checkpoint of the public CoPRS training code
--random [--policy-size S] [--sam S]   random weights at a real size, for speed, memory and shapes
CHECKPOINT --image-encoder FILE        the same checkpoint with another image encoder

With --image-encoder, an encoder that was distilled to SAM ViT-H's takes its place.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from coprs_deploy import conversion
from coprs_deploy.cli.options import Option, add_options, read_options
from coprs_deploy.cli.parser import print_result
from coprs_deploy.console import StepPrinter


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


OPTIONS = (
    Option("prompt", "--prompt-template", parse=_read_text, metavar="FILE"),
    Option("reference_tail", metavar="TEXT"),
    Option("seed", parse=int),
    Option("overwrite"),
    Option("image_encoder", metavar="FILE | NAME"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of this verb."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "checkpoint",
        type=Path,
        nargs="?",
        metavar="CHECKPOINT",
        help="checkpoint whose image encoder is replaced",
    )
    source.add_argument(
        "--policy",
        type=Path,
        metavar="DIR | HUB",
        help="transformers directory of a Qwen2.5-VL or LLaVA-1.5 model, or hf://org/name@revision",
    )
    source.add_argument(
        "--training-checkpoint",
        type=Path,
        metavar="DIR",
        help="directory with refseg_modules.pt, huggingface/ and optionally FSDP shards",
    )
    source.add_argument("--random", action="store_true", help="random weights at a real size")
    parser.add_argument(
        "--sam",
        metavar="FILE | SIZE",
        help="sam_vit_*.pth file; with --random: vit_b, vit_l, vit_h or tiny; with CHECKPOINT: the "
        "SAM it was trained from, to compare decoders",
    )
    parser.add_argument(
        "--policy-size", help="with --random: tiny, tiny-llava, 3b, 7b, llava-7b or llava-13b"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="CHECKPOINT", help="checkpoint to write"
    )
    add_options(parser, conversion.ConversionOptions, OPTIONS)


def run(arguments: argparse.Namespace) -> int:
    """Convert from the given source."""
    if arguments.policy_size and not arguments.random:
        raise ValueError("--policy-size requires --random")
    has_prompt = hasattr(arguments, "prompt") or hasattr(arguments, "reference_tail")
    if has_prompt and (arguments.random or arguments.checkpoint):
        source = "--random" if arguments.random else "CHECKPOINT"
        raise ValueError(
            f"--prompt-template and --reference-tail cannot be combined with {source}, whose "
            "policy has its own"
        )
    has_encoder = hasattr(arguments, "image_encoder")
    if arguments.checkpoint and not has_encoder:
        raise ValueError("--image-encoder is missing: name the encoder that CHECKPOINT gets")
    if not arguments.random and not arguments.checkpoint and not arguments.sam:
        raise ValueError("--sam is missing: name the sam_vit_*.pth file")

    options = read_options(arguments, conversion.ConversionOptions, OPTIONS)
    with StepPrinter() as progress:
        if arguments.random:
            sam = arguments.sam or ("vit_b" if has_encoder else "tiny")
            sizes = arguments.policy_size or "tiny", sam
            checkpoint = conversion.random_checkpoint(arguments.out, *sizes, options, progress)
        elif arguments.checkpoint:
            checkpoint = conversion.checkpoint_from_checkpoint(
                arguments.checkpoint,
                arguments.image_encoder,
                arguments.out,
                options,
                progress,
                sam=arguments.sam,
            )
        elif arguments.policy:
            checkpoint = conversion.checkpoint_from_policy_and_sam(
                arguments.policy, arguments.sam, arguments.out, options, progress
            )
        else:
            checkpoint = conversion.checkpoint_from_public_training(
                arguments.training_checkpoint, arguments.sam, arguments.out, options, progress
            )
    note = checkpoint.config.provenance.get("note", "")
    text = f"{checkpoint.path} ({note})" if note else f"{checkpoint.path}"
    print_result(arguments, {"checkpoint": str(checkpoint.path), "note": note}, text)
    return 0
