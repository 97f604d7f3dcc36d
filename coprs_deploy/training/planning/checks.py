"""Checks of a run before its first step: settings, checkpoint, data, disk and memory.

:func:`check_run` finds all problems of a recipe that starts from a checkpoint, and opens what the
run needs on the way. Recipes of the tiny model are checked in :mod:`coprs_deploy.curriculum.checks`
with :func:`setting_problems` and :func:`place_problems` from here.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from coprs_deploy.artifacts import check_writable
from coprs_deploy.checkpoint import Checkpoint, load_segmentation_model, read_checkpoint
from coprs_deploy.console import StepPrinter, format_bytes
from coprs_deploy.demo import CHECKPOINT
from coprs_deploy.errors import install_hint
from coprs_deploy.machine import available_memory_bytes
from coprs_deploy.policy.compressed_weights import require_float_weights
from coprs_deploy.policy.policy_size import check_policy_size
from coprs_deploy.training.examples import OpenedData, Progress, open_data
from coprs_deploy.training.features import FeatureStore
from coprs_deploy.training.planning.estimate import Estimate, GpuSpec, estimate
from coprs_deploy.training.planning.estimate_page import largest_directory
from coprs_deploy.training.planning.meta_models import build_on_meta, parameter_parts
from coprs_deploy.training.planning.problems import Problem, reporting
from coprs_deploy.training.recipe import Recipe, RunSettings, nearest_name
from coprs_deploy.training.runs.resume import Rows
from coprs_deploy.training.runs.run_directory import IMAGES_FILE, RunDirectory
from coprs_deploy.training.settings import (
    ExampleData,
    GrpoSettings,
    StageSettings,
    SupervisedSettings,
)

GIGABYTE = 1e9


@dataclass(frozen=True)
class CheckedRun:
    """A recipe that was checked: its checkpoint and data, None where they cannot be used."""

    problems: list[Problem]
    checkpoint: Checkpoint | None = None
    data: OpenedData | None = None


def check_run(
    recipe: Recipe,
    out: Path,
    num_processes: int = 1,
    on_progress: Progress = lambda name, done, total: None,
) -> CheckedRun:
    """Check a recipe that starts from a checkpoint, with every row of its data.

    Args:
        recipe: the recipe.
        out: run directory, which need not exist. If it does, the images that were decoded are
            remembered there, so that the next check decodes only those that changed.
        num_processes: processes that train together.
        on_progress: callback after each example.
    """
    problems = recipe_problems(recipe, num_processes)
    problems += _package_problems(recipe)
    problems += place_problems(out)
    checkpoint = None
    with reporting(problems, "model.path"):
        checkpoint = read_checkpoint(recipe.model.path or CHECKPOINT)
        require_float_weights(checkpoint.policy_path, "training")
        check_policy_size(checkpoint.policy_path)
    if checkpoint is not None:
        with reporting(problems, "model.path"):
            models = build_on_meta(recipe.model)
            problems += multiplier_problems(recipe.stages, parameter_parts(models))
            estimates = estimate(recipe, num_processes, available_device(num_processes), models)
            problems += disk_problems(recipe, estimates, out)
            problems += memory_problems(estimates)
    data = open_data(recipe, problems, out / IMAGES_FILE, on_progress)
    if checkpoint is not None and data is not None and data.features is not None:
        with reporting(problems, "data.features"):
            require_encoder(data.features, checkpoint)
    return CheckedRun(problems, checkpoint, data)


def recipe_problems(recipe: Recipe, num_processes: int) -> list[Problem]:
    """Find settings that contradict each other, without a look at checkpoint, data and machine."""
    problems = list(setting_problems(recipe, recipe.stages, num_processes))
    return problems + list(_stage_problems(recipe, num_processes))


def check_resume(
    recipe: Recipe, out: Path, checked: CheckedRun, allowed: Sequence[str]
) -> list[Problem]:
    """Find what keeps a run in ``out`` from resuming with a recipe and data that were checked."""
    problems: list[Problem] = []
    directory = RunDirectory(out)
    with reporting(problems, "--out"):
        directory.changed_settings(recipe, allowed)
    if checked.checkpoint is not None and checked.data is not None:
        with reporting(problems, "--out"):
            directory.changed_inputs(*describe_inputs(checked.checkpoint, checked.data), allowed)
    return problems


def progress_of(steps: StepPrinter, what: str = "check") -> Progress:
    """Return a callback that shows the progress of a check, or of other work on examples."""
    shown = ""

    def progress(name: str, done: int, total: int) -> None:
        nonlocal shown
        if name != shown:
            shown = name
            steps(f"{what} {name}")
        steps.progress(f"{done:,} of {total:,} examples")

    return progress


def describe_inputs(
    checkpoint: Checkpoint, data: OpenedData
) -> tuple[dict[str, Any], dict[str, Rows]]:
    """Return a hash of the contents of checkpoint and data, and of each example on disk."""
    inputs: dict[str, Any] = {"model.path": checkpoint.fingerprint()}
    for key, contents in data.contents.items():
        inputs[key] = {"examples": len(contents.rows), "hash": contents.hexdigest()}
    return inputs, {key: contents.rows for key, contents in data.contents.items()}


def require_encoder(features: FeatureStore, checkpoint: Checkpoint) -> None:
    """Check that embeddings were computed with the image encoder of a checkpoint."""
    features.require_encoder(load_segmentation_model(checkpoint))


def setting_problems(
    recipe: RunSettings, stages: Mapping[str, StageSettings], num_processes: int
) -> Iterator[Problem]:
    """Find settings of any recipe that contradict each other."""
    for name, stage in stages.items():
        key = f"stages.{name}"
        # Processes of a GRPO stage share the completions, see GrpoSettings.split_batch.
        is_too_small = stage.global_batch_size < num_processes
        if is_too_small and not isinstance(stage, GrpoSettings):
            yield Problem(
                f"{key}.global_batch_size",
                f"it is {stage.global_batch_size}, and {num_processes} processes train together; "
                f"accepted: at least {num_processes}, an example for each",
            )
        for metric, required in stage.thresholds.items():
            if required > 1 and metric != "completion_length":
                yield Problem(
                    f"{key}.thresholds.{metric}",
                    f"it is {required:g}, and the metric is at most 1",
                )
        warmup = stage.optimizer.warmup_steps
        if warmup >= stage.max_steps:
            yield Problem(
                f"{key}.optimizer.warmup_steps",
                f"it is {warmup}, and max_steps is {stage.max_steps}: the learning rate never "
                "reaches its peak",
                is_error=False,
            )
        if 0 < stage.max_steps < stage.eval_steps:
            yield Problem(
                f"{key}.eval_steps",
                f"it is {stage.eval_steps}, and max_steps is {stage.max_steps}: the only "
                "evaluation is at the end",
                is_error=False,
            )
    if not stages:
        yield Problem("stages", "there is none; a recipe has at least one [stages.NAME]")


def place_problems(out: Path) -> Iterator[Problem]:
    """Find out whether the run directory can be written."""
    try:
        check_writable(out)
    except OSError as error:
        yield Problem("--out", f"{error.filename}: {error.strerror}; choose another directory")


def _stage_problems(recipe: Recipe, num_processes: int) -> Iterator[Problem]:
    """Find settings of stages on examples that contradict each other or the data."""
    has_features = isinstance(recipe.data, ExampleData) and bool(recipe.data.features)
    for name, stage in recipe.stages.items():
        if isinstance(stage, GrpoSettings):
            yield from _grpo_problems(f"stages.{name}", stage, recipe, num_processes)
        elif stage.train_image_encoder and has_features:
            yield Problem(
                f"stages.{name}.train_image_encoder",
                "data.features holds embeddings of the encoder before training; leave out one of "
                "them",
            )
        if isinstance(stage, SupervisedSettings):
            yield from _supervised_problems(f"stages.{name}", stage)
        for metric in [*stage.thresholds, stage.best_metric]:
            if "." in metric:
                yield Problem(
                    f"stages.{name}",
                    f"{metric} is a metric of a question type, which only stages of the tiny model "
                    f"measure; accepted: {', '.join(stage.metric_names)}",
                )


def _supervised_problems(key: str, stage: SupervisedSettings) -> Iterator[Problem]:
    if stage.segmentation_loss_weight:
        return
    if stage.thresholds:
        yield Problem(
            f"{key}.thresholds",
            "masks are decoded and measured only with segmentation_loss_weight above 0; remove the "
            "thresholds, or set it",
        )
    if not stage.language_loss_weight:
        yield Problem(
            key,
            "language_loss_weight and segmentation_loss_weight are 0: nothing is trained; set one",
        )


def _grpo_problems(
    key: str, stage: GrpoSettings, recipe: Recipe, num_processes: int
) -> Iterator[Problem]:
    try:
        stage.split_batch(num_processes)
    except ValueError as error:
        yield Problem(key, str(error))
    if recipe.save_steps % stage.num_iterations:
        yield Problem(
            "save_steps",
            f"it is {recipe.save_steps}; accepted: multiples of {key}.num_iterations "
            f"({stage.num_iterations}), so that a resume does not split a rollout",
        )
    if stage.mode == "segmentation" and not stage.segmentation_loss_weight:
        yield Problem(
            f"{key}.segmentation_loss_weight",
            "it is 0, and mode is 'segmentation': nothing is trained; raise it",
        )


def _package_problems(recipe: Recipe) -> Iterator[Problem]:
    """Find settings that need a package that is not installed."""
    for name, stage in recipe.stages.items():
        if not isinstance(stage, GrpoSettings):
            continue
        packages = [
            ("peft", f"stages.{name}.lora.r", stage.lora.r),
            ("vllm", f"stages.{name}.use_vllm", stage.use_vllm),
        ]
        for package, setting, is_needed in packages:
            if is_needed and importlib.util.find_spec(package) is None:
                hint = install_hint("train") if package == "peft" else "see docs/train.md"
                yield Problem(setting, f"it needs {package}, which is not installed; {hint}")


def multiplier_problems(stages: Mapping[str, StageSettings], parts: Set[str]) -> Iterator[Problem]:
    """Find multipliers that no parameter has in its name, so that they have no effect."""
    for key, stage in stages.items():
        for name in stage.optimizer.lr_multipliers:
            if name not in parts:
                known = ("policy", "prior", "prompt_encoder", "mask_decoder", "image_encoder")
                yield Problem(
                    f"stages.{key}.optimizer.lr_multipliers",
                    f"no parameter has {name!r} in its name; accepted: {', '.join(known)}, or "
                    f"another part of a name{nearest_name(name, sorted(parts))}",
                )


def available_device(num_processes: int) -> GpuSpec:
    """Return the memory that a process has: of its GPU, or its share of the machine's."""
    if torch.cuda.is_available():
        return GpuSpec(memory_gb=torch.cuda.get_device_properties(0).total_memory / GIGABYTE)
    return GpuSpec(memory_gb=available_memory_bytes() / num_processes / GIGABYTE)


def disk_problems(
    recipe: RunSettings, estimates: Mapping[str, Estimate], out: Path
) -> Iterator[Problem]:
    """Compare the files that a run writes with the free space."""
    needed = largest_directory(estimates)
    place = next(each for each in (out.absolute(), *out.absolute().parents) if each.exists())
    written = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    free = shutil.disk_usage(place).free
    if needed > free + written:
        yield Problem(
            "disk",
            f"the run needs up to {format_bytes(needed)}, and {format_bytes(free)} are free at "
            f"{place}; choose another disk with --out, or a smaller save_total_limit "
            f"(it is {recipe.save_total_limit})",
        )


def memory_problems(estimates: Mapping[str, Estimate]) -> Iterator[Problem]:
    """Name stages whose estimated memory is not there; an estimate refuses no run."""
    for name, one in estimates.items():
        if not one.fits:
            yield Problem(
                f"stages.{name}",
                f"a process needs about {one.memory['peak'] / GIGABYTE:.1f} GB of memory "
                f"(estimated), and has {one.gpu.memory_gb:.1f} GB; use a smaller "
                "per_device_train_batch_size or global_batch_size, adapters "
                "(stages.NAME.lora.r), or more GPUs",
                is_error=False,
            )
