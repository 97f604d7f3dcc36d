"""Inspect, check and convert data sets in the layouts in which they are published.

`inspect` decodes the examples and prints counts, sizes and invalid rows; --out FILE.png draws a
contact sheet. `check` compares the number of references, sentences and images with the known ones,
without decoding. `convert` writes an example file for `train`, `features` and `evaluate`. Exit code
1 if `check` finds a source incomplete, or `inspect` or `convert` an invalid row.

sources: refcoco:SPLIT, refcoco+:SPLIT, refcocog:SPLIT, refcocog:google:SPLIT, grefcoco:SPLIT and
reasonseg:SPLIT below --root; an example file, Parquet of Hugging Face or a COCO instance file; a
folder of Hugging Face, with :SPLIT if it has several. A name without a split is all of its splits.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from coprs_deploy.artifacts import atomic_write, check_writable, make_directory
from coprs_deploy.cli.parser import log, print_result
from coprs_deploy.console import StepPrinter, table
from coprs_deploy.data.contact_sheet import draw_contact_sheet
from coprs_deploy.data.conversion import convert_sources
from coprs_deploy.data.examples import REPORTED, Example, ExampleSource
from coprs_deploy.data.inspection import Inspection, check_source, inspect_source
from coprs_deploy.data.readers.registry import (
    SourceOptions,
    all_splits,
    open_source,
    require_images,
)
from coprs_deploy.data.rows import SUFFIXES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of this verb."""
    parser.add_argument("action", choices=("inspect", "check", "convert"), help="what to do")
    parser.add_argument("sources", metavar="SOURCE", nargs="+", help="name or path of a data set")
    parser.add_argument(
        "--root",
        type=Path,
        metavar="DIR",
        help="folder of the public data sets (default: $COPRS_DEPLOY_DATA, or the current folder)",
    )
    parser.add_argument(
        "--images", type=Path, metavar="DIR", help="folder of the images (default: usual folders)"
    )
    parser.add_argument(
        "--first-sentences",
        action="store_true",
        help="use only the first sentence of each reference",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="inspect: contact sheet, .png; convert: example file, .parquet or .jsonl",
    )
    parser.add_argument(
        "--num-examples", type=int, metavar="N", help="inspect: decode N examples (default: all)"
    )
    parser.add_argument(
        "--exclude-images-of",
        nargs="+",
        default=[],
        metavar="SOURCE",
        help="convert: leave out examples on any image of these sources; a name without a split is "
        "all of its splits except train",
    )
    parser.add_argument(
        "--embed-images",
        action="store_true",
        help="convert: write the bytes of image files instead of their paths",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the chosen action."""
    _check_options(arguments)
    actions = {"inspect": _inspect, "check": _check, "convert": _convert}
    return actions[arguments.action](arguments)


def _check_options(arguments: argparse.Namespace) -> None:
    """Refuse options of another action, and an output of the wrong kind."""
    action = arguments.action
    of_actions = {
        "--num-examples": (arguments.num_examples is not None, ("inspect",)),
        "--exclude-images-of": (bool(arguments.exclude_images_of), ("convert",)),
        "--embed-images": (arguments.embed_images, ("convert",)),
        "--first-sentences": (arguments.first_sentences, ("inspect", "convert")),
    }
    for flag, (is_given, owners) in of_actions.items():
        if is_given and action not in owners:
            named = " and ".join(f"`data {owner}`" for owner in owners)
            raise ValueError(f"{flag} is an option of {named}, not of `data {action}`")
    if arguments.num_examples is not None and arguments.num_examples < 1:
        raise ValueError(f"--num-examples is {arguments.num_examples}; it must be at least 1")
    suffixes = {"inspect": (".png",), "check": (), "convert": SUFFIXES}[action]
    out: Path | None = arguments.out
    if out is not None and not suffixes:
        raise ValueError("`data check` writes no file; leave out --out, or use --json")
    if out is None and action == "convert":
        raise ValueError(f"--out is missing; name a file that ends in {' or '.join(SUFFIXES)}")
    if out is not None:
        if out.suffix not in suffixes:
            raise ValueError(f"--out is {out}; accepted: a name that ends in {', '.join(suffixes)}")
        check_writable(out, is_file=True)
        make_directory(out.parent)


def _options(arguments: argparse.Namespace) -> SourceOptions:
    return SourceOptions(arguments.root, arguments.images, arguments.first_sentences or None)


def _open(names: Sequence[str], arguments: argparse.Namespace) -> list[ExampleSource]:
    options = _options(arguments)
    return [open_source(name, options) for each in names for name in all_splits(each, options)]


def _inspect(arguments: argparse.Namespace) -> int:
    sheet: list[Example] = []
    found = []
    with StepPrinter() as steps:
        for source in _open(arguments.sources, arguments):
            steps(f"decode {source.description}")
            found.append(
                inspect_source(
                    source,
                    arguments.num_examples,
                    sheet=sheet,
                    on_progress=lambda done, total: steps.progress(f"{done:,} of {total:,}"),
                )
            )
    if arguments.out and sheet:
        with atomic_write(arguments.out) as partial:
            draw_contact_sheet(sheet).save(partial, "PNG")
    text = "\n\n".join(map(_inspection_text, found))
    print_result(arguments, {"sources": [each.to_json() for each in found]}, text)
    return 1 if any(each.problems for each in found) else 0


def _inspection_text(found: Inspection) -> str:
    counts = {
        "rows": f"{found.num_rows:,}",
        "examples": f"{found.num_examples:,}",
        "distinct images": f"{found.num_images:,}",
        **{_targets_label(number): f"{count:,}" for number, count in found.targets.items()},
        **{f"type {name}": f"{count:,}" for name, count in found.question_types.items() if name},
        "decoded": f"{found.num_decoded:,}",
        "with an ignore mask": f"{found.num_with_ignore_mask:,}",
    }
    labels = {
        "width_px": "width, px (min / median / max)",
        "height_px": "height, px",
        "target_share": "targets, share of the image",
        "words": "words of the instruction",
    }
    sizes = {labels[name]: str(spread) for name, spread in found.sizes.items()}
    lines = [table((found.source, ""), list((counts | sizes).items()))]
    if found.images:
        lines.append(f"images: {found.images}")
    if found.problems:
        lines.append(f"{len(found.problems):,} invalid:")
        lines += [f"  {problem}" for problem in found.problems[:REPORTED]]
        if len(found.problems) > REPORTED:
            lines.append(f"  and {len(found.problems) - REPORTED:,} more; --json lists all")
    return "\n".join(lines)


def _targets_label(number: int) -> str:
    return {0: "no target", 1: "one target"}.get(number, f"{number} targets")


def _check(arguments: argparse.Namespace) -> int:
    checks = [check_source(source) for source in _open(arguments.sources, arguments)]
    result = {"sources": [asdict(check) for check in checks]}
    print_result(arguments, result, "\n".join(map(str, checks)))
    return 1 if any(check.failures for check in checks) else 0


def _convert(arguments: argparse.Namespace) -> int:
    out: Path = arguments.out
    sources = _open(arguments.sources, arguments)
    options = _options(arguments)
    excluded = [
        open_source(name, options)
        for each in arguments.exclude_images_of
        for name in all_splits(each, options)
        if name == each or not name.endswith(":train")
    ]
    for source in sources:
        require_images(source)
    with StepPrinter() as steps:
        steps(f"write {out.name}")
        report = convert_sources(
            sources,
            out,
            excluded=excluded,
            embed_images=arguments.embed_images,
            on_progress=lambda done, total: steps.progress(f"{done:,} of {total:,} examples"),
        )
    for problem in report.problems[:REPORTED]:
        log(f"left out: {problem}")
    text = f"{out}: {report.num_written:,} examples"
    if excluded:
        text += (
            f"; {report.num_excluded:,} examples left out, on {report.num_excluded_images:,} "
            f"images of {', '.join(source.description for source in excluded)}"
        )
    if report.problems:
        text += f"; {len(report.problems):,} invalid examples left out"
    names = [source.description for source in excluded]
    result = {"file": str(out), **asdict(report), "excluded_sources": names}
    print_result(arguments, result, text)
    return 1 if report.problems else 0
