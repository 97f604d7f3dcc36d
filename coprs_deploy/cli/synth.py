"""Generate synthetic scenes with questions: a contact sheet, an example file, or a data set.

The suffix of --out selects the output: .png is a contact sheet, .parquet or .jsonl an example file
for `train` and `evaluate`. With --layout, --out is the root of a data set in a public layout, with
the split val for held-out scenes, else train.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from coprs_deploy.artifacts import atomic_write, check_writable, make_directory
from coprs_deploy.cli.parser import print_result
from coprs_deploy.data.contact_sheet import draw_contact_sheet
from coprs_deploy.data.examples import write_examples
from coprs_deploy.data.public_layouts import LAYOUTS, write_layout
from coprs_deploy.data.rows import SUFFIXES
from coprs_deploy.data.synthetic import HELD_OUT_SEED, PRESETS, SceneExamples


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of this verb."""
    parser.add_argument(
        "--preset", default="plain", help="difficulty preset of the scenes: plain or full"
    )
    parser.add_argument(
        "--num-examples", type=int, default=24, help="number of scenes (default: 24)"
    )
    parser.add_argument(
        "--first-seed", type=int, default=0, help="seed of the first scene (default: 0)"
    )
    parser.add_argument(
        "--held-out",
        action="store_true",
        help="generate held-out scenes, which training never uses",
    )
    parser.add_argument(
        "--columns", type=int, default=6, help="columns of a contact sheet (default: 6)"
    )
    parser.add_argument(
        "--layout",
        choices=tuple(LAYOUTS),
        help="write a data set: refer (as RefCOCO), grefcoco, reasonseg, or parquet (as the "
        "evaluation files of Seg-Zero)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="output file: .png, .parquet or .jsonl; with --layout, a new folder",
    )


def run(arguments: argparse.Namespace) -> int:
    """Generate the scenes and write the output file."""
    out: Path = arguments.out
    if arguments.preset not in PRESETS:
        raise ValueError(f"--preset is {arguments.preset!r}; accepted: {', '.join(PRESETS)}")
    if arguments.layout is None and out.suffix not in (".png", *SUFFIXES):
        raise ValueError(
            f"--out is {out}; accepted: a name that ends in .png (contact sheet) or in "
            f"{' or '.join(SUFFIXES)} (example file), or any name with --layout (data set)"
        )
    if arguments.first_seed < 0:
        raise ValueError(f"--first-seed is {arguments.first_seed}; it must be at least 0")
    if arguments.columns < 1:
        raise ValueError(f"--columns is {arguments.columns}; it must be at least 1")
    first_seed = arguments.first_seed + (HELD_OUT_SEED if arguments.held_out else 0)
    examples = SceneExamples(PRESETS[arguments.preset], arguments.num_examples, first_seed)
    report = {"file": str(out), "preset": arguments.preset, "num_examples": len(examples)}
    text = f"{out}: {len(examples)} scenes of the preset {arguments.preset}"
    if arguments.layout:
        split = "val" if arguments.held_out else "train"
        source = write_layout(out, arguments.layout, examples, split)
        root = "" if source == str(out) else f" with --root {out}"
        print_result(arguments, {**report, "source": source}, f"{text}, read as {source}{root}")
        return 0
    check_writable(out, is_file=True)
    make_directory(out.parent)
    if out.suffix == ".png":
        sheet = draw_contact_sheet(list(examples), arguments.columns)
        with atomic_write(out) as partial:
            sheet.save(partial, "PNG")
    else:
        write_examples(out, examples)
    print_result(arguments, report, text)
    return 0
