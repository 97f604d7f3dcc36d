"""Training runs: open the run directory, train the stages, save the checkpoint, write the report.

:func:`train` runs a :class:`~coprs_deploy.training.recipe.Recipe`. Recipes of the tiny model are
run by :mod:`coprs_deploy.curriculum.run` with :func:`open_run`, :func:`save_checkpoint` and
:func:`finish_run` from here.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic

import msgspec
import torch
from torch import Tensor

from coprs_deploy.artifacts import write_json
from coprs_deploy.checkpoint import Checkpoint
from coprs_deploy.console import StepPrinter
from coprs_deploy.data.examples import ExampleSource
from coprs_deploy.errors import import_failure, install_hint
from coprs_deploy.policy.vision_inputs import VisionProcessor
from coprs_deploy.training.examples import ExampleSets, OpenedData
from coprs_deploy.training.planning.checks import check_run, describe_inputs, progress_of
from coprs_deploy.training.planning.problems import Problem, describe_problems, require_none
from coprs_deploy.training.recipe import R, Recipe, RunSettings
from coprs_deploy.training.runs.checkpoints import BEST, LAST, RunCheckpoints
from coprs_deploy.training.runs.processes import StopRequest
from coprs_deploy.training.runs.progress import StageProgress, clear_finished, load_finished_stage
from coprs_deploy.training.runs.report import write_report, write_running_report
from coprs_deploy.training.runs.run_directory import (
    CHECKPOINT_FOLDER,
    REPORT_FILE,
    RunDirectory,
    all_passed,
)
from coprs_deploy.training.runs.saved_state import select_trained
from coprs_deploy.training.runs.trackers import close_trackers, require_trackers
from coprs_deploy.training.settings import StageSettings, SupervisedSettings
from coprs_deploy.training.state import TrainingState, state_from_checkpoint
from coprs_deploy.training.supervised_stage import SupervisedStage
from coprs_deploy.training.trainer import Trainer

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Run(Generic[R]):
    """An open run: its recipe with the precision of this machine, and ``time.perf_counter()``.

    ``provenance`` is written into its checkpoints.
    """

    recipe: R
    accelerator: Accelerator
    directory: RunDirectory
    started: float
    provenance: dict[str, Any] = field(default_factory=dict)
    stop: StopRequest = field(default_factory=StopRequest)

    def progress(self, stage: str) -> StageProgress:
        """Return the progress of a stage."""
        return StageProgress(self.directory, self.accelerator, stage, self.recipe)

    @cached_property
    def checkpoints(self) -> RunCheckpoints:
        """Checkpoints that are written while the run trains."""
        limit = self.recipe.save_total_limit
        return RunCheckpoints(self.directory.path, list(self.recipe.all_stages()), limit)

    def save_last(
        self,
        state: TrainingState,
        progress: StageProgress,
        step: int,
        policy_weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write ``checkpoints/last``; all processes take part."""
        self._save(LAST, state, {"stage": progress.name, "step": step}, policy_weights)

    def save_best(
        self,
        state: TrainingState,
        progress: StageProgress,
        policy_weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write ``checkpoints/best``; all processes take part."""
        metric = self.recipe.all_stages()[progress.name].best_metric
        position = {"stage": progress.name, "best_metric": metric, **progress.best}
        self._save(BEST, state, position, policy_weights)
        if self.accelerator.is_main_process:
            progress.commit_best()

    def write_report(self) -> None:
        """Write the report of what was trained so far; all processes take part."""
        if self.accelerator.is_main_process:
            write_running_report(self.directory, self.recipe)
        self.accelerator.wait_for_everyone()

    def _save(
        self,
        link: str,
        state: TrainingState,
        position: dict[str, Any],
        policy_weights: Mapping[str, Tensor] | None,
    ) -> None:
        def write(path: Path) -> None:
            state.save_checkpoint(
                path,
                self.recipe.save_dtype,
                self.provenance | position,
                policy_weights=policy_weights,
            )

        if self.accelerator.is_main_process:
            self.checkpoints.add(position["stage"], int(position["step"]), link, write)
        self.accelerator.wait_for_everyone()


def train(recipe: Recipe, out: Path, allowed: Sequence[str] = ()) -> dict[str, Any]:
    """Run a recipe that starts from a checkpoint; a run in ``out`` is resumed.

    Args:
        recipe: the recipe.
        out: run directory.
        allowed: keys of settings and data that a resumed run may change though that changes the
            training.

    Returns:
        The report: stages with their metrics and thresholds.

    Raises:
        MissingDependencyError: a package of the extra ``train`` is not installed.
        ValueError: ``out`` holds a run with other settings or data.
        ProblemsError: settings, data, checkpoint and machine do not fit together.
    """
    with open_run(recipe, out, allowed) as run:
        checkpoint, data = _check(run, out)
        if run.accelerator.is_main_process:
            inputs, rows = describe_inputs(checkpoint, data)
            _print(*run.directory.check_inputs(inputs, rows, list(recipe.stages), allowed))
            source = inputs["model.path"]
            run.provenance.update({"recipe": recipe.description, "from": source})
        run.accelerator.wait_for_everyone()
        state = state_from_checkpoint(checkpoint)
        vision = VisionProcessor(checkpoint.policy_path, state.policy.model.config)
        examples = ExampleSets(data.training, data.held_out, vision, recipe.seed, data.features)
        if run.accelerator.is_main_process:
            log_run(run, checkpoint, examples)
        results = _train_stages(run, checkpoint, state, examples)
        save_checkpoint(run, state)
        files = [file for file in (data.training, data.held_out) if isinstance(file, ExampleSource)]
        skipped = {"files": [file.to_json() for file in files]} if files else {}
        return finish_run(run, results, skipped)


def _check(run: Run[Recipe], out: Path) -> tuple[Checkpoint, OpenedData]:
    """Check everything before the first step; the main process says what is wrong."""
    is_main, num_processes = run.accelerator.is_main_process, run.accelerator.num_processes
    with run.accelerator.main_process_first():  # it remembers the images that it decodes
        if is_main:
            with StepPrinter() as steps:
                checked = check_run(run.recipe, out, num_processes, progress_of(steps))
        else:
            checked = check_run(run.recipe, out, num_processes)
    report_problems(run, checked.problems)
    assert checked.checkpoint is not None and checked.data is not None
    return checked.checkpoint, checked.data


def report_problems(run: Run[Any], problems: Sequence[Problem]) -> None:
    """Print warnings in the main process; with an error, all processes end.

    Raises:
        ProblemsError: there is an error, in the main process.
    """
    if run.accelerator.is_main_process:
        require_none(problems)
        if problems:
            _print(describe_problems(problems))
    elif any(problem.is_error for problem in problems):
        sys.exit(2)


def _print(*lines: str) -> None:
    for line in lines:
        print(line, file=sys.stderr, flush=True)


def attach_run(recipe: R, out: Path) -> Run[R]:
    """Return a run that is only read, whether it trains or not."""
    recipe = resolve_precision(recipe)
    return Run(recipe, _accelerator(recipe), RunDirectory(out), time.perf_counter())


@contextmanager
def open_run(recipe: R, out: Path, allowed: Sequence[str] = ()) -> Iterator[Run[R]]:
    """Open a run directory, locked, with an accelerator for the recipe.

    Raises:
        MissingDependencyError: a package of the extra ``train`` is not installed.
        ValueError: ``out`` holds a run with other settings.
        ArtifactError: another process trains in ``out``.
    """
    recipe = resolve_precision(type(recipe).from_json(recipe.to_json()))  # checks the ranges
    accelerator = _accelerator(recipe)
    directory = RunDirectory(out)
    with directory.lock() if accelerator.is_main_process else nullcontext():
        with accelerator.main_process_first():
            notes = directory.open(recipe, allowed)
        if accelerator.is_main_process:
            _print(*notes)
        run = Run(recipe, accelerator, directory, time.perf_counter())
        with run.stop.handled():
            yield run
    close_trackers(accelerator)


def log_run(run: Run[Recipe], checkpoint: Checkpoint, examples: ExampleSets) -> None:
    """Say on stderr what is trained, on what, and where."""
    accelerator, recipe = run.accelerator, run.recipe
    skipped = len(getattr(examples.training, "problems", ()))
    print(
        f"{checkpoint.path}: {len(examples.training):,} training examples"
        f"{f' ({skipped:,} invalid rows left out)' if skipped else ''}, "
        f"{len(examples.held_out):,} held out; {accelerator.device}, {recipe.precision}, "
        f"processes: {accelerator.num_processes}, threads: {recipe.num_threads}",
        f"a state and a checkpoint every {recipe.save_steps} steps, the last "
        f"{recipe.save_total_limit} kept; curves: {', '.join(recipe.report_to) or 'none'}",
        *(stage_text(name, settings) for name, settings in recipe.stages.items()),
        sep="\n",
        file=sys.stderr,
        flush=True,
    )


def stage_text(name: str, settings: StageSettings) -> str:
    """Return batch and evaluations of a stage."""
    evaluations = "evaluation at the end"
    if settings.eval_steps:
        best = f", best by {settings.best_metric}" if settings.best_metric else ""
        evaluations = f"evaluation every {settings.eval_steps} steps{best}"
    return f"{name}: {settings.batch_text()} per step; {evaluations}"


def resolve_precision(recipe: R) -> R:
    """Replace ``precision = "auto"`` by bf16 on a device with bf16 units, else by fp32."""
    if recipe.precision != "auto":
        return recipe
    if torch.cuda.is_available():
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        units = torch.cpu.get_capabilities()
        has_bf16 = bool(units.get("avx512_bf16") or units.get("amx_bf16") or units.get("sve_bf16"))
    return msgspec.structs.replace(recipe, precision="bf16" if has_bf16 else "fp32")


def save_checkpoint(run: Run[Any], state: TrainingState) -> None:
    """Write the checkpoint of a run; all processes take part."""
    if run.accelerator.is_main_process:
        path = run.directory.path / CHECKPOINT_FOLDER
        state.save_checkpoint(path, run.recipe.save_dtype, run.provenance, overwrite=True)
        run.checkpoints.end_with(path)
    run.accelerator.wait_for_everyone()


def finish_run(
    run: Run[Any], results: dict[str, Any], evaluation: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Write and return the report with ``evaluation`` added; all processes take part."""
    report = {
        "recipe": run.recipe.to_json(),
        "minutes": sum(result["seconds"] for result in results.values()) / 60,
        "minutes_this_time": (time.perf_counter() - run.started) / 60,
        "stages": results,
        "passed": all_passed(results),
        **(evaluation or {}),
    }
    if run.accelerator.is_main_process:
        for name in results:
            clear_finished(run.directory.stage(name))
        write_json(run.directory.path / REPORT_FILE, report)
        write_report(run.directory, report, run.recipe.all_stages())
    run.accelerator.wait_for_everyone()
    return report


def _accelerator(recipe: RunSettings) -> Accelerator:
    with _extra_packages():
        from accelerate import Accelerator
    require_trackers(recipe.report_to)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.set_num_threads(recipe.num_threads)
    return Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision="bf16" if recipe.precision == "bf16" else "no",
    )


@contextmanager
def _extra_packages() -> Iterator[None]:
    """Name the extra that brings a missing package."""
    try:
        yield
    except ImportError as error:
        raise import_failure(error, "", install_hint("train"), needed_by="training") from error


def _train_stages(
    run: Run[Recipe],
    checkpoint: Checkpoint,
    state: TrainingState,
    examples: ExampleSets,
) -> dict[str, Any]:
    """Train all stages in order; return their results by name."""
    recipe, accelerator, directory = run.recipe, run.accelerator, run.directory
    state.segmentation.to(accelerator.device)
    if accelerator.distributed_type != "FSDP":  # sharding moves each process's share itself
        state.policy.model.to(accelerator.device)
    trainer = Trainer(run, state)
    results: dict[str, Any] = {}
    for name, settings in recipe.stages.items():
        select_trained(recipe, settings, state)
        if isinstance(settings, SupervisedSettings):
            stage = SupervisedStage(name, settings, state, examples)
            if recipe.model.gradient_checkpointing:
                enable_gradient_checkpointing(state.policy.model)
            results[name] = trainer.run(stage)
            continue
        if finished := load_finished_stage(directory, name, settings, state):
            results[name] = finished
            continue
        with _extra_packages():
            from coprs_deploy.training.grpo.stage import GrpoStage
        grpo = GrpoStage(
            run,
            name,
            settings,
            state,
            examples,
            policy_path=None if results else checkpoint.policy_path,
        )
        results[name] = grpo.run()
    return results


def enable_gradient_checkpointing(policy: Any) -> None:
    """Recompute activations in the backward pass instead of storing them."""
    if hasattr(policy, "activation_checkpointing_enable"):  # later versions of transformers
        policy.activation_checkpointing_enable()
    else:
        policy.gradient_checkpointing_enable()
