"""Draw generated scenes with their questions: a contact sheet to look at, or a file of examples.

The suffix of --out decides: .png is a contact sheet, .parquet or .jsonl a file of examples that
`train` and `evaluate` read.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from coprs_deploy.cli.parser import add_json_flag, log, print_json

SUMMARY = "draw generated scenes: a contact sheet, or a file of examples"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of this verb."""
    parser.add_argument("--tier", default="plain", help="world of the scenes: plain or full")
    parser.add_argument("--count", type=int, default=24, help="scenes (default 24)")
    parser.add_argument("--first-seed", type=int, default=0, help="seed of the first (default 0)")
    parser.add_argument(
        "--held-out",
        action="store_true",
        help="count seeds from the first that is never trained on",
    )
    parser.add_argument("--columns", type=int, default=6, help="of a contact sheet (default 6)")
    parser.add_argument("--out", type=Path, required=True, help="a .png, .parquet or .jsonl file")
    add_json_flag(parser)


def run(arguments: argparse.Namespace) -> int:
    """Draw and write."""
    from coprs_deploy.data.contact_sheet import draw_contact_sheet
    from coprs_deploy.data.examples import write_examples
    from coprs_deploy.data.rows import SUFFIXES
    from coprs_deploy.data.synthetic import HELD_OUT_SEED, PRESETS, SceneExamples

    out: Path = arguments.out
    if arguments.tier not in PRESETS:
        raise ValueError(f"--tier is {arguments.tier!r}; accepted: {', '.join(PRESETS)}")
    if out.suffix not in (".png", *SUFFIXES):
        raise ValueError(
            f"--out is {out}; accepted: a name that ends in .png (a contact sheet) or in "
            f"{' or '.join(SUFFIXES)} (a file of examples)"
        )
    first = arguments.first_seed + (HELD_OUT_SEED if arguments.held_out else 0)
    examples = SceneExamples(PRESETS[arguments.tier], arguments.count, first)
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".png":
        draw_contact_sheet(list(examples), arguments.columns).save(out)
    else:
        write_examples(out, examples)
    if arguments.json:
        print_json({"file": str(out), "tier": arguments.tier, "scenes": len(examples)})
    else:
        log(f"{out}: {len(examples)} scenes of the tier {arguments.tier}")
    return 0
