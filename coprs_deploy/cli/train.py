"""Train a model by a recipe.

A recipe is one TOML file; --list shows those of the package. A run that was stopped goes on when
the same command is given again. Exit code 1 when the run ended below one of its gates,
or with --estimate when a phase does not fit.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from coprs_deploy.cli.parser import add_json_flag, log, print_json

if TYPE_CHECKING:
    from coprs_deploy.training.recipe import Recipe

SUMMARY = "train a model by a recipe"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of this verb."""
    parser.add_argument("recipe", metavar="RECIPE", nargs="?", help="a name, or a .toml file")
    parser.add_argument("--list", action="store_true", help="list the recipes of the package")
    parser.add_argument("--out", type=Path, help="folder of the run (default: runs/RECIPE)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a value, as in phases.reasoning.steps=100; may be repeated",
    )
    parser.add_argument(
        "--estimate", action="store_true", help="say what memory and time it takes, and stop"
    )
    parser.add_argument(
        "--gpus", type=int, default=8, help="with --estimate: GPUs that share the work (default 8)"
    )
    parser.add_argument(
        "--gpu-memory", type=float, default=80.0, help="with --estimate: GB of each (default 80)"
    )
    parser.add_argument("--scenes", type=Path, help="folder that keeps generated pictures")
    add_json_flag(parser)


def run(arguments: argparse.Namespace) -> int:
    """List the recipes, or train."""
    from coprs_deploy.training.recipe import load_recipe, recipe_names
    from coprs_deploy.training.run_directory import read_report

    if arguments.list:
        described = {name: load_recipe(name).description for name in recipe_names()}
        if arguments.json:
            print_json(described)
        else:
            width = max(map(len, described))
            for name, description in described.items():
                print(f"{name:<{width}}  {description}")
        return 0
    if arguments.recipe is None:
        raise ValueError("no recipe was named; `coprs-deploy train --list` shows what there is")
    recipe = load_recipe(arguments.recipe, arguments.set)
    if arguments.estimate:
        return _estimate(recipe, arguments)
    out = arguments.out or Path("runs") / Path(arguments.recipe).stem
    from coprs_deploy.training.launch import is_worker, launch

    try:
        if recipe.processes > 1 and not is_worker():
            code = launch(_command_line(arguments, out), recipe.processes, recipe.threads)
            if code:
                return code
            report = read_report(out)
        else:
            from coprs_deploy.training.run import train

            report = train(recipe, out, arguments.scenes)
    except KeyboardInterrupt:
        if not is_worker():
            log(
                f"the same command goes on from the last state in {out}; one is saved every "
                f"{recipe.save_steps} steps"
            )
        raise
    if is_worker():  # a process that ends with another code than 0 takes the others with it
        return 0
    _show(report, out, arguments.json)
    return 0 if report["passed"] else 1


def _estimate(recipe: Recipe, arguments: argparse.Namespace) -> int:
    from coprs_deploy.training.estimate import GpuSpec, estimate, estimate_page

    if arguments.gpus < 1:
        raise ValueError(f"--gpus is {arguments.gpus}; it must be at least 1")
    found = estimate(recipe, arguments.gpus, GpuSpec(memory_gb=arguments.gpu_memory))
    if arguments.json:
        print_json({name: one.to_json() for name, one in found.items()})
    else:
        print(estimate_page(found))
    return 0 if all(one.fits for one in found.values()) else 1


def _command_line(arguments: argparse.Namespace, out: Path) -> list[str]:
    """Write the same command for the processes of the run."""
    line = ["train", arguments.recipe, "--out", str(out)]
    for setting in arguments.set:
        line += ["--set", setting]
    if arguments.scenes:
        line += ["--scenes", str(arguments.scenes)]
    return line


def _show(report: dict[str, object], out: Path, as_json: bool) -> None:
    if as_json:
        print_json({k: v for k, v in report.items() if k not in ("answers", "recipe")})
        return
    from coprs_deploy.training.report import page

    print(page(report))
    log(f"{out}: checkpoint, report.md, report.json, plots")
