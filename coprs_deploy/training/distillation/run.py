"""Runs of a distillation: student, stages, checkpoint and report."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from coprs_deploy.checkpoint import read_checkpoint
from coprs_deploy.console import StepPrinter
from coprs_deploy.demo import CHECKPOINT
from coprs_deploy.training.distillation.checks import (
    CheckedDistillation,
    check_distillation,
    has_instructions,
)
from coprs_deploy.training.distillation.concentrations import ConcentrationFiles
from coprs_deploy.training.distillation.estimate import encoder_costs
from coprs_deploy.training.distillation.recipe import DistillationRecipe
from coprs_deploy.training.distillation.stage import (
    DistillationObjective,
    DistillationSets,
    DistillationStage,
)
from coprs_deploy.training.distillation.student import build_student
from coprs_deploy.training.planning.checks import progress_of
from coprs_deploy.training.runs.progress import WEIGHTS_FILE
from coprs_deploy.training.runs.run import (
    Run,
    finish_run,
    open_run,
    report_problems,
    save_checkpoint,
    stage_text,
)
from coprs_deploy.training.runs.run_directory import RunDirectory
from coprs_deploy.training.runs.saved_state import SavedState, load_objective
from coprs_deploy.training.trainer import Trainer

CONCENTRATIONS_FOLDER = "concentrations"


def train_distillation(
    recipe: DistillationRecipe, out: Path, allowed: Sequence[str] = ()
) -> dict[str, Any]:
    """Run a recipe; a run in ``out`` is resumed.

    Args:
        recipe: the recipe.
        out: run directory.
        allowed: keys of settings and data that a resumed run may change though that changes the
            training.

    Returns:
        The report: sizes of both encoders, and stages with their metrics and thresholds.

    Raises:
        MissingDependencyError: a package of the extra ``train`` is not installed.
        ValueError: ``out`` holds a run with other settings or data.
        ProblemsError: settings, data, teacher and machine do not fit together.
    """
    with open_run(recipe, out, allowed) as run:
        checked = _check(run, out)
        assert checked.checkpoint is not None
        accelerator = run.accelerator
        if accelerator.is_main_process:
            inputs, rows = checked.inputs()
            notes = run.directory.check_inputs(inputs, rows, list(recipe.stages), allowed)
            _print(*notes)
            run.provenance.update(_provenance(recipe, inputs["teacher"]))
        accelerator.wait_for_everyone()
        costs = encoder_costs(recipe, checked.checkpoint)
        state, teacher = build_student(recipe.model, checked.checkpoint, recipe.seed)
        sets = _sets(run, checked, out / CONCENTRATIONS_FOLDER)
        if accelerator.is_main_process:
            _log_run(run, checked, {name: cost.text() for name, cost in costs.items()})
        state.segmentation.to(accelerator.device)
        if sets.features is None:
            teacher.to(accelerator.device)
        trainer, results = Trainer(run, state), dict[str, Any]()
        for name, settings in recipe.stages.items():
            stage = DistillationStage(name, settings, state, teacher, sets)
            results[name] = trainer.run(stage)
        save_checkpoint(run, state)
        encoders = {name: cost.to_json() for name, cost in costs.items()}
        return finish_run(run, results, {"encoders": encoders})


def export_distilled_state(
    recipe: DistillationRecipe, run: Path, saved: SavedState, out: Path
) -> None:
    """Write the checkpoint of a state, as ``training.saved_state.export_state`` does.

    Raises:
        ValueError: the teacher has changed.
        ArtifactError: ``out`` exists.
    """
    checkpoint = read_checkpoint(recipe.teacher or CHECKPOINT)
    source = RunDirectory(run).check_start(checkpoint, "teacher")
    state, teacher = build_student(recipe.model, checkpoint, recipe.seed)
    if saved.is_finished:
        state.load_state_dict(torch.load(saved.folder / WEIGHTS_FILE, weights_only=True))
    else:
        settings = recipe.stages[saved.stage]
        load_objective(saved.folder, DistillationObjective(state, teacher, settings))
    position = {"stage": saved.stage, "step": saved.step}
    provenance = _provenance(recipe, source) | position
    state.save_checkpoint(out, recipe.save_dtype, provenance, overwrite=True)


def _check(run: Run[DistillationRecipe], out: Path) -> CheckedDistillation:
    """Check everything before the first step; the main process says what is wrong."""
    is_main, num_processes = run.accelerator.is_main_process, run.accelerator.num_processes
    with run.accelerator.main_process_first():  # it remembers the images that it decodes
        if is_main:
            with StepPrinter() as steps:
                checked = check_distillation(run.recipe, out, num_processes, progress_of(steps))
        else:
            checked = check_distillation(run.recipe, out, num_processes)
    report_problems(run, checked.problems)
    return checked


def _sets(
    run: Run[DistillationRecipe], checked: CheckedDistillation, folder: Path
) -> DistillationSets:
    """Return images and examples, with the teacher's concentrations, computed where missing."""
    checkpoint, sources = checked.checkpoint, checked.sources
    assert checkpoint is not None
    names = ["examples"] if "examples" in sources else []
    if has_instructions(sources["held_out"]):
        names.append("held_out")
    found = {}
    for name in names:
        content = checked.contents[name].hexdigest()
        files = ConcentrationFiles(folder, name, checkpoint, sources[name], content)
        with run.accelerator.main_process_first():
            if run.accelerator.is_main_process:
                with StepPrinter() as steps:
                    progress = partial(progress_of(steps, "concentrations of"), name)
                    files.compute(run.accelerator.device, progress)
            found[name] = files.load()
    return DistillationSets(
        images=sources["images"],
        examples=sources.get("examples", ()),
        held_out=sources["held_out"],
        concentrations=found.get("examples", ()),
        held_out_concentrations=found.get("held_out"),
        teacher_geometry=checkpoint.config.model.geometry,
        seed=run.recipe.seed,
        features=checked.features,
    )


def _provenance(recipe: DistillationRecipe, teacher: str) -> dict[str, Any]:
    encoder = recipe.model.image_encoder
    name = encoder if isinstance(encoder, str) else encoder.to_json()
    return {"recipe": recipe.description, "from": teacher, "image_encoder": name}


def _log_run(
    run: Run[DistillationRecipe], checked: CheckedDistillation, encoders: dict[str, str]
) -> None:
    """Say on stderr what is trained, on what, and where."""
    accelerator, recipe, sources = run.accelerator, run.recipe, checked.sources
    sizes = ", ".join(f"{len(source):,} {key}" for key, source in sorted(sources.items()))
    origin = "read from features" if recipe.features else "computed in every step"
    _print(
        *(f"{name}: {text}" for name, text in encoders.items()),
        f"{sizes}; the teacher's embeddings are {origin}; {accelerator.device}, "
        f"{recipe.precision}, processes: {accelerator.num_processes}",
        *(stage_text(name, settings) for name, settings in recipe.stages.items()),
    )


def _print(*lines: str) -> None:
    for line in lines:
        print(line, file=sys.stderr, flush=True)
