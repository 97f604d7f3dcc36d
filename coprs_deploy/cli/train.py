"""Train a model by a recipe.

A recipe is one TOML file; --list shows those of the package. Re-run the same command to resume an
interrupted run: SIGINT, SIGTERM and SIGHUP save a state after the current step. Exit code 1 when a
stage misses one of its thresholds, or, with --estimate, when a stage does not fit into memory.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any, TypeAlias

from coprs_deploy.artifacts import check_writable
from coprs_deploy.cli.parser import log, print_result
from coprs_deploy.console import StepPrinter
from coprs_deploy.curriculum.recipe import CurriculumRecipe
from coprs_deploy.errors import check_number
from coprs_deploy.training.distillation.recipe import DistillationRecipe
from coprs_deploy.training.recipe import Recipe, load_recipe, model_kind, recipe_names

AnyRecipe: TypeAlias = Recipe | CurriculumRecipe | DistillationRecipe

RECIPE_TYPES: dict[str, type[AnyRecipe]] = {
    "checkpoint": Recipe,
    "tiny": CurriculumRecipe,
    "distilled": DistillationRecipe,
}
"""``model.kind`` to the type of a recipe."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of this verb."""
    parser.add_argument("recipe", metavar="RECIPE", nargs="?", help="recipe name or .toml file")
    parser.add_argument("--list", action="store_true", help="list the recipes of the package")
    parser.add_argument(
        "--out",
        type=Path,
        help="run directory (default: runs/RECIPE); with --export-state, the checkpoint "
        "(default: RUN/exported/STAGE-N)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a value, such as stages.reasoning.max_steps=100; may be repeated",
    )
    parser.add_argument(
        "--export-state",
        type=Path,
        metavar="RUN",
        help="train nothing; write the checkpoint of a saved state of a run, which may be training",
    )
    parser.add_argument(
        "--step",
        type=int,
        metavar="N",
        help="steps of the state for --export-state (default: the newest)",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="train nothing; check settings, every row of the data, checkpoint, disk and memory; "
        "exit code 0 or 2",
    )
    parser.add_argument(
        "--allow-change",
        action="append",
        default=[],
        metavar="KEY",
        help="resume with another value of a setting, or other contents of data.training, "
        "data.held_out or model.path, though that changes the training; may be repeated",
    )
    parser.add_argument("--scenes-dir", type=Path, help="folder of rendered scenes to reuse")
    parser.add_argument(
        "--estimate", action="store_true", help="estimate memory and time without training"
    )
    parser.add_argument(
        "--gpus", type=int, default=8, help="number of GPUs for --estimate (default: 8)"
    )
    parser.add_argument(
        "--gpu-memory", type=float, default=80.0, help="GB per GPU for --estimate (default: 80)"
    )


def run(arguments: argparse.Namespace) -> int:
    """List the recipes, estimate, or train."""
    if arguments.list:
        return _list(arguments)
    if arguments.export_state is not None:
        return _export_state(arguments)
    if arguments.step is not None:
        raise ValueError("--step chooses a state for --export-state RUN; leave it out")
    if arguments.recipe is None:
        raise ValueError("RECIPE is missing; `coprs-deploy train --list` lists the recipes")
    recipe = _load(arguments.recipe, arguments.set)
    if arguments.estimate:
        return _estimate(recipe, arguments)
    return _check(recipe, arguments) if arguments.check else _train(recipe, arguments)


def _load(source: str, settings: list[str]) -> AnyRecipe:
    """Load a recipe of the type that its ``model.kind`` selects."""
    kind = model_kind(source)
    if kind not in RECIPE_TYPES:
        raise ValueError(f"model.kind is {kind!r}; accepted: {', '.join(RECIPE_TYPES)}")
    return load_recipe(source, settings, RECIPE_TYPES[kind])


def _list(arguments: argparse.Namespace) -> int:
    descriptions = {name: _load(name, []).description for name in recipe_names()}
    width = max(map(len, descriptions))
    lines = (f"{name:<{width}}  {description}" for name, description in descriptions.items())
    print_result(arguments, descriptions, "\n".join(lines))
    return 0


def _out(arguments: argparse.Namespace) -> Path:
    return arguments.out or Path("runs") / Path(arguments.recipe).stem


def _check(recipe: AnyRecipe, arguments: argparse.Namespace) -> int:
    """Print all problems of a run; return 2 if one of them refuses it."""
    from coprs_deploy.training.planning.problems import describe_problems, reporting
    from coprs_deploy.training.runs.run import resolve_precision

    recipe, out, count = resolve_precision(recipe), _out(arguments), recipe.num_processes
    if isinstance(recipe, Recipe):
        from coprs_deploy.training.planning.checks import check_resume, check_run, progress_of

        with StepPrinter() as steps:
            checked = check_run(recipe, out, count, progress_of(steps))
        problems = checked.problems + check_resume(recipe, out, checked, arguments.allow_change)
    elif isinstance(recipe, DistillationRecipe):
        from coprs_deploy.training.distillation import checks
        from coprs_deploy.training.planning.checks import progress_of

        with StepPrinter() as steps:
            found = checks.check_distillation(recipe, out, count, progress_of(steps))
        problems = found.problems
        problems += checks.check_resume(recipe, out, found, arguments.allow_change)
    else:
        from coprs_deploy.curriculum.checks import check_curriculum
        from coprs_deploy.training.runs.run_directory import RunDirectory

        problems = check_curriculum(recipe, out, arguments.scenes_dir, count)
        with reporting(problems, "--out"):
            RunDirectory(out).changed_settings(recipe, arguments.allow_change)
    shown = {"problems": [problem.to_json() for problem in problems]}
    print_result(arguments, shown, describe_problems(problems))
    return 2 if any(problem.is_error for problem in problems) else 0


def _train(recipe: AnyRecipe, arguments: argparse.Namespace) -> int:
    from coprs_deploy.training.runs.run_directory import read_report

    out = _out(arguments)
    check_writable(out)
    is_worker = "LOCAL_RANK" in os.environ  # one of several processes of a run
    if is_worker:
        from coprs_deploy.training.runs.processes import end_with_launcher

        end_with_launcher()
    try:
        if recipe.num_processes > 1 and not is_worker:
            code = _launch(recipe, arguments, out)
        else:
            code = _run_recipe(recipe, out, arguments)
    except (KeyboardInterrupt, SystemExit):
        if not is_worker:
            log(_kept(out))
        raise
    if code > 128 and not is_worker:
        log(_kept(out))
    if code or is_worker:  # another exit code than 0 would end the other processes
        return code
    return _show(read_report(out), out, arguments)


def _kept(out: Path) -> str:
    """Say what a stopped run has, and what can be done with it."""
    states = [(path.stat().st_mtime, path) for path in out.glob("stages/*/state-*")]
    if not states:
        return f"no state was saved in {out} since the last stage; re-run the same command"
    return (
        f"{max(states)[1]} is kept; re-run the same command to resume from it, or write its "
        f"checkpoint with `coprs-deploy train --export-state {out}`"
    )


def _show(report: dict[str, Any], out: Path, arguments: argparse.Namespace) -> int:
    from coprs_deploy.training.runs.report import page

    shown = {key: value for key, value in report.items() if key not in ("examples", "recipe")}
    print_result(arguments, shown, page(report))
    log(f"{out}: checkpoint, report.md, report.json, plots")
    return 0 if report["passed"] else 1


def _run_recipe(recipe: AnyRecipe, out: Path, arguments: argparse.Namespace) -> int:
    """Train in this process; return the exit code, 0 if the run ended."""
    scenes_dir = arguments.scenes_dir
    if isinstance(recipe, CurriculumRecipe):
        from coprs_deploy.curriculum.run import train_curriculum

        train_curriculum(recipe, out, scenes_dir, arguments.allow_change)
        return 0
    if scenes_dir is not None:
        log("--scenes-dir is ignored: only recipes of the tiny model keep rendered scenes")
    if isinstance(recipe, Recipe):
        from coprs_deploy.training.runs.run import train

        train(recipe, out, arguments.allow_change)
    else:
        from coprs_deploy.training.distillation.run import train_distillation

        train_distillation(recipe, out, arguments.allow_change)
    return 0


def _export_state(arguments: argparse.Namespace) -> int:
    """Write the checkpoint of a saved state of a run."""
    if arguments.recipe is not None or arguments.set:
        raise ValueError("--export-state takes the recipe of the run; leave out RECIPE and --set")
    run = arguments.export_state
    recipe = _recipe_of(run)
    from coprs_deploy.training.runs.saved_state import choose_state, export_state

    saved = choose_state(run, list(recipe.stages), arguments.step)
    out = arguments.out or run / "exported" / f"{saved.stage}-{saved.step:06d}"
    if arguments.out and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out is {out}, which exists; accepted: a new or empty directory")
    check_writable(out)
    if isinstance(recipe, Recipe):
        export_state(recipe, run, saved, out)
    elif isinstance(recipe, DistillationRecipe):
        from coprs_deploy.training.distillation.run import export_distilled_state

        export_distilled_state(recipe, run, saved, out)
    else:
        from coprs_deploy.curriculum.run import export_tiny_state

        export_tiny_state(recipe, run, saved, out, arguments.scenes_dir)
    shown = {"checkpoint": str(out), "stage": saved.stage, "step": saved.step}
    print_result(arguments, shown, str(out))
    return 0


def _recipe_of(run: Path) -> AnyRecipe:
    """Read the recipe of a run."""
    from coprs_deploy.training.runs.run_directory import RECIPE_FILE

    file = run / RECIPE_FILE
    if not file.is_file():
        raise ValueError(
            f"{run} has no {RECIPE_FILE}; --export-state takes the directory of a training run"
        )
    data = json.loads(file.read_text(encoding="utf-8"))
    return RECIPE_TYPES[data["model"]["kind"]].from_json(data)


def _estimate(recipe: AnyRecipe, arguments: argparse.Namespace) -> int:
    from coprs_deploy.training.planning.checks import recipe_problems
    from coprs_deploy.training.planning.estimate import GpuSpec
    from coprs_deploy.training.planning.estimate_page import estimate_page, estimate_run
    from coprs_deploy.training.planning.problems import require_none

    check_number("--gpus", arguments.gpus, least=1)
    check_number("--gpu-memory", arguments.gpu_memory, above=0, is_whole=False)
    gpu = GpuSpec(memory_gb=arguments.gpu_memory)
    if isinstance(recipe, CurriculumRecipe):
        raise ValueError(
            "model.kind is 'tiny'; accepted with --estimate: 'checkpoint' and 'distilled'. A tiny "
            "model trains on any machine"
        )
    if isinstance(recipe, DistillationRecipe):
        from coprs_deploy.checkpoint import read_checkpoint
        from coprs_deploy.demo import CHECKPOINT
        from coprs_deploy.training.distillation.estimate import estimate_distillation

        teacher = read_checkpoint(recipe.teacher or CHECKPOINT)
        found = estimate_distillation(recipe, teacher, arguments.gpus, gpu)
    else:
        require_none(recipe_problems(recipe, arguments.gpus))
        found = estimate_run(recipe, arguments.gpus, gpu)
    print_result(arguments, found.to_json(), estimate_page(found))
    return 0 if found.fits else 1


def _launch(recipe: AnyRecipe, arguments: argparse.Namespace, out: Path) -> int:
    """Run this command in several processes that train together; return the exit code."""
    from coprs_deploy.training.runs.processes import run_processes

    command = [sys.executable, "-m", "coprs_deploy", "train", arguments.recipe, "--out", str(out)]
    for setting in arguments.set:
        command += ["--set", setting]
    for key in arguments.allow_change:
        command += ["--allow-change", key]
    if arguments.scenes_dir:
        command += ["--scenes-dir", str(arguments.scenes_dir)]
    return run_processes(command, recipe.num_processes, recipe.num_threads)
