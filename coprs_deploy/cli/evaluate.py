"""Judge a bundle on questions whose answers are known: generated scenes, or a file of examples.

Every answer goes through the runtime, exactly as a user gets it. With --out, a page, a plot of the
prior against the mask, and every answer are left in a folder. Exit code 1 when a figure named with
--require is not reached.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from coprs_deploy.cli.parser import (
    add_json_flag,
    add_plan_code_flag,
    add_runtime_arguments,
    log,
    print_json,
)
from coprs_deploy.console import table

if TYPE_CHECKING:
    from coprs_deploy.data.examples import Example
    from coprs_deploy.runtime import CoPRS

SUMMARY = "judge a bundle on questions whose answers are known"

LOG_EVERY = 50


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of this verb."""
    parser.add_argument(
        "bundle", metavar="BUNDLE", type=Path, nargs="?", help="default: the shipped model"
    )
    parser.add_argument("--examples", type=Path, help="a .parquet or .jsonl file of examples")
    parser.add_argument("--tier", default="plain", help="world of generated scenes: plain or full")
    parser.add_argument("--count", type=int, help="how many (default: 256 scenes, or all examples)")
    parser.add_argument(
        "--absent", type=int, default=64, help="scenes asked about what is not there (default 64)"
    )
    parser.add_argument(
        "--first-seed",
        type=int,
        default=0,
        help="seed of the first held-out scene (default 0, where the reports of training begin)",
    )
    parser.add_argument("--out", type=Path, help="folder for report.md, answers.jsonl and the plot")
    parser.add_argument(
        "--require",
        action="append",
        default=[],
        metavar="FIGURE=VALUE",
        help="fail below this, as in mask_iou=0.93; may be repeated",
    )
    add_runtime_arguments(parser)
    parser.add_argument("--device", default="cpu", help="of graphs and policy: cpu, cuda, cuda:N")
    add_plan_code_flag(parser)
    add_json_flag(parser)


def run(arguments: argparse.Namespace) -> int:
    """Ask, compare, report."""
    from coprs_deploy.data.sources import choose_examples
    from coprs_deploy.evaluation.evaluator import score_examples
    from coprs_deploy.evaluation.metrics import summarize
    from coprs_deploy.evaluation.report import write_evaluation
    from coprs_deploy.runtime import CoPRS, RuntimeOptions

    required = _required(arguments.require)
    chosen = choose_examples(
        arguments.examples,
        arguments.tier,
        arguments.count,
        arguments.absent,
        arguments.first_seed,
    )
    options = RuntimeOptions(
        device=arguments.device,
        runtime=arguments.runtime,
        retune=arguments.retune,
        inference_precision=arguments.inference_precision,
        allow_engine_host_code=arguments.allow_engine_host_code,
    )
    scored = []
    with CoPRS.load(arguments.bundle, options) as coprs:
        for choice in coprs.runtime_choices:
            log(str(choice))
        _require_inside(chosen.examples, coprs)
        for answer in score_examples(coprs.segment, chosen.examples, chosen.max_targets):
            scored.append(answer)
            if len(scored) % LOG_EVERY == 0:
                log(f"{len(scored)} of {len(chosen.examples)} answers")
    figures = summarize([answer.score for answer in scored])
    missed = [
        f"{name} is {figures.get(name, float('nan')):.4f}, below {wanted:g}"
        for name, wanted in required.items()
        if not figures.get(name, float("-inf")) >= wanted
    ]
    if arguments.out:
        write_evaluation(arguments.out, chosen.description, scored)
    if arguments.json:
        print_json({"examples": chosen.description, "figures": figures, "missed": missed})
    else:
        rows = [(name.replace("_", " "), f"{value:.4f}") for name, value in figures.items()]
        print(table((chosen.description, ""), rows))
    for line in missed:
        log(line)
    return 1 if missed else 0


def _require_inside(examples: Sequence[Example], coprs: CoPRS) -> None:
    """Refuse before the first question what the bundle does not take."""
    from coprs_deploy.errors import ImageSizeError

    outside = []
    for example in examples:
        try:
            coprs.check_image(example.image)
        except ImageSizeError as error:
            outside.append(f"{example.id}: {error}")
    if outside:
        raise ImageSizeError(
            f"{len(outside)} of {len(examples)} examples cannot be asked; the first, {outside[0]}. "
            "Generated scenes are square: a bundle of one aspect is judged on --examples of it"
        )


def _required(settings: list[str]) -> dict[str, float]:
    required = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        try:
            required[name.strip()] = float(value)
        except ValueError:
            equals = ""
        if not equals:
            raise ValueError(f"--require takes FIGURE=VALUE, as in mask_iou=0.93, not {setting!r}")
    return required
