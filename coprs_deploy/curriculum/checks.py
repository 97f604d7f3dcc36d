"""Checks of a recipe of the tiny model before its first step."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from coprs_deploy.checkpoint import read_checkpoint
from coprs_deploy.console import format_bytes
from coprs_deploy.curriculum.recipe import CurriculumRecipe, ReasoningSettings
from coprs_deploy.data.synthetic.examples import with_question_types
from coprs_deploy.data.synthetic.presets import PRESETS, QUESTION_TYPES
from coprs_deploy.training.planning.checks import place_problems, setting_problems
from coprs_deploy.training.planning.problems import Problem, reporting
from coprs_deploy.training.recipe import nearest_name

SCENE_CHANNELS = 4
"""Bytes of a pixel of a rendered scene: its color, and the object that it shows."""


def check_curriculum(
    recipe: CurriculumRecipe, out: Path, scenes_dir: Path | None = None, num_processes: int = 1
) -> list[Problem]:
    """Find the problems of a recipe, its initial checkpoint and the disk.

    Args:
        recipe: the recipe.
        out: run directory, which need not exist.
        scenes_dir: folder of rendered scenes; ``out/scenes`` by default.
        num_processes: processes that train together.
    """
    problems = list(setting_problems(recipe, recipe.stages, num_processes))
    problems += place_problems(out)
    problems += _size_problems(recipe)
    problems += _question_problems(recipe)
    problems += _disk_problems(recipe, scenes_dir or out / "scenes")
    if recipe.model.init_from:
        with reporting(problems, "model.init_from"):
            found = read_checkpoint(recipe.model.init_from)
            if found.config.model != recipe.model.segmentation:
                raise ValueError(
                    f"the segmentation path of {found.path} has other sizes than "
                    "model.segmentation; use those of its training"
                )
    return problems


def _size_problems(recipe: CurriculumRecipe) -> Iterator[Problem]:
    wanted, model = PRESETS[recipe.data.preset].image_size, recipe.model
    for key, size in (
        ("model.policy.image_size", model.policy.image_size),
        ("model.segmentation.sam.geometry.image_size", model.segmentation.geometry.image_size),
    ):
        if size != wanted:
            text = f"it is {size}; accepted for the preset {recipe.data.preset!r}: {wanted}"
            yield Problem(key, text)


def _question_problems(recipe: CurriculumRecipe) -> Iterator[Problem]:
    """Find question types that do not exist, in weights and in thresholds."""
    preset = PRESETS[recipe.data.preset]
    for name, stage in recipe.stages.items():
        for metric in [*stage.thresholds, stage.best_metric]:
            group, dot, _ = metric.rpartition(".")
            if dot and group not in QUESTION_TYPES:
                hint = nearest_name(group, QUESTION_TYPES)
                yield Problem(
                    f"stages.{name}",
                    f"{metric} is a metric of the question type {group!r}; question types: "
                    f"{', '.join(QUESTION_TYPES)}{hint}",
                )
        if isinstance(stage, ReasoningSettings):
            for key in ("question_type_weights", "initial_question_type_weights"):
                try:
                    with_question_types(preset, getattr(stage, key))
                except ValueError as error:
                    yield Problem(f"stages.{name}.{key}", str(error))


def _disk_problems(recipe: CurriculumRecipe, scenes: Path) -> Iterator[Problem]:
    """Compare the rendered scenes, the largest part of such a run, with the free space."""
    data, size = recipe.data, PRESETS[recipe.data.preset].image_size
    count = data.num_training_scenes + data.num_held_out_scenes + data.num_no_match_scenes
    needed = SCENE_CHANNELS * count * size**2
    place = next(each for each in (scenes.absolute(), *scenes.absolute().parents) if each.exists())
    rendered = sum(file.stat().st_size for file in scenes.rglob("*.npy"))
    free = shutil.disk_usage(place).free
    if needed > free + rendered:
        yield Problem(
            "disk",
            f"{count:,} rendered scenes need {format_bytes(needed)}, and {format_bytes(free)} are "
            f"free at {place}; choose another disk with --out or --scenes-dir",
        )
