"""Make a checkpoint from the files that people have.

--policy DIR --sam FILE                a transformers policy and SAM: the start of training
--training-checkpoint DIR --sam FILE   a checkpoint of the public CoPRS training code
--random [--policy-size S] [--sam S]   a real size without weights, for speed, memory and shape
"""

from __future__ import annotations

import argparse
from pathlib import Path

from coprs_deploy.cli.parser import add_json_flag, log, print_json
from coprs_deploy.console import StepPrinter

SUMMARY = "make a checkpoint from SAM, policy or public training files"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of this verb."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--policy", type=Path, metavar="DIR", help="a transformers directory")
    source.add_argument(
        "--training-checkpoint",
        type=Path,
        metavar="DIR",
        help="holds refseg_modules.pt, huggingface/ and, perhaps, FSDP shards",
    )
    source.add_argument("--random", action="store_true", help="random weights of a real size")
    parser.add_argument(
        "--sam",
        metavar="FILE | SIZE",
        help="sam_vit_*.pth; with --random vit_b, vit_l, vit_h, tiny",
    )
    parser.add_argument(
        "--policy-size", help="with --random: tiny, tiny-llava, 3b, 7b, llava-7b, llava-13b"
    )
    parser.add_argument(
        "--prompt-template",
        type=Path,
        metavar="FILE",
        help="text of the prompt that the policy was trained with; holds {instruction}",
    )
    parser.add_argument("--seed", type=int, default=0, help="of everything that starts random")
    parser.add_argument("--out", type=Path, required=True, metavar="CHECKPOINT")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a checkpoint that is there"
    )
    add_json_flag(parser)


def run(arguments: argparse.Namespace) -> int:
    """Convert by the way that was asked for."""
    if arguments.policy_size and not arguments.random:
        raise ValueError("--policy-size goes with --random only")
    if arguments.prompt_template and arguments.random:
        raise ValueError("--prompt-template does not go with --random")
    if not arguments.random and not arguments.sam:
        raise ValueError("--sam is missing: name the sam_vit_*.pth file")

    from coprs_deploy import conversion

    template = arguments.prompt_template
    options = conversion.ConversionOptions(
        prompt=template.read_text(encoding="utf-8") if template else None,
        overwrite=arguments.overwrite,
        seed=arguments.seed,
    )
    with StepPrinter() as progress:
        if arguments.random:
            checkpoint = conversion.random_checkpoint(
                arguments.out,
                arguments.policy_size or "tiny",
                arguments.sam or "tiny",
                options,
                progress,
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
    if arguments.json:
        print_json({"checkpoint": str(checkpoint.path), "note": note})
    else:
        log(f"{checkpoint.path}" + (f" ({note})" if note else ""))
    return 0
