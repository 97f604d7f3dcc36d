"""Checks of a distillation before its first step: settings, teacher, data, disk and memory."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from coprs_deploy.checkpoint import Checkpoint, read_checkpoint
from coprs_deploy.data.examples import ExampleSource
from coprs_deploy.data.image_checks import ImageChecks
from coprs_deploy.data.readers.image_folder import ImageFolder
from coprs_deploy.data.readers.registry import open_images, open_source
from coprs_deploy.data.selection import Selection
from coprs_deploy.demo import CHECKPOINT
from coprs_deploy.models import SegmentationModel
from coprs_deploy.policy.compressed_weights import require_float_weights
from coprs_deploy.training.distillation.estimate import estimate_distillation
from coprs_deploy.training.distillation.recipe import (
    AGREEMENT,
    EMBEDDING_COSINE,
    DistillationRecipe,
)
from coprs_deploy.training.distillation.student import student_config
from coprs_deploy.training.examples import Contents, Progress, embedding_problems
from coprs_deploy.training.features import FeatureStore
from coprs_deploy.training.planning.checks import (
    available_device,
    disk_problems,
    memory_problems,
    multiplier_problems,
    place_problems,
    require_encoder,
    setting_problems,
)
from coprs_deploy.training.planning.problems import Problem, reporting, row_problems
from coprs_deploy.training.runs.resume import Rows
from coprs_deploy.training.runs.run_directory import IMAGES_FILE, RunDirectory


@dataclass
class CheckedDistillation:
    """A recipe that was checked, with what it opened; None where it cannot be used.

    Attributes:
        problems: what is wrong.
        checkpoint: the teacher.
        sources: opened sources by their key in the recipe, ``held_out`` always among them.
        contents: what the sources on disk hold.
        features: the teacher's embeddings.
    """

    problems: list[Problem]
    checkpoint: Checkpoint | None = None
    sources: dict[str, ExampleSource] = field(default_factory=dict)
    contents: dict[str, Contents] = field(default_factory=dict)
    features: FeatureStore | None = None

    def inputs(self) -> tuple[dict[str, Any], dict[str, Rows]]:
        """Return a hash of the contents of teacher and data, and of each row on disk."""
        assert self.checkpoint is not None, "the recipe has no errors"
        inputs: dict[str, Any] = {"teacher": self.checkpoint.fingerprint()}
        for key, content in self.contents.items():
            inputs[key] = {"examples": len(content.rows), "hash": content.hexdigest()}
        return inputs, {key: content.rows for key, content in self.contents.items()}


def check_distillation(
    recipe: DistillationRecipe,
    out: Path,
    num_processes: int = 1,
    on_progress: Progress = lambda name, done, total: None,
) -> CheckedDistillation:
    """Check a recipe with every image of its data.

    Args:
        recipe: the recipe.
        out: run directory, which need not exist; if it does, decoded images are remembered there.
        num_processes: processes that train together.
        on_progress: callback after each image.
    """
    problems = list(setting_problems(recipe, recipe.stages, num_processes))
    problems += _stage_problems(recipe)
    problems += place_problems(out)
    checked = CheckedDistillation(problems)
    with reporting(problems, "teacher"):
        checked.checkpoint = read_checkpoint(recipe.teacher or CHECKPOINT)
        if recipe.examples or recipe.held_out:
            require_float_weights(checked.checkpoint.policy_path, "reading examples")
    if checked.checkpoint is not None:
        with reporting(problems, "model.image_encoder"):
            problems += _size_problems(recipe, checked.checkpoint, out, num_processes)
    if recipe.features:
        with reporting(problems, "features"):
            checked.features = FeatureStore(recipe.features)
            if checked.checkpoint is not None:
                require_encoder(checked.features, checked.checkpoint)
    _open_sources(recipe, checked, out / IMAGES_FILE, on_progress)
    return checked


def check_resume(
    recipe: DistillationRecipe, out: Path, checked: CheckedDistillation, allowed: Sequence[str]
) -> list[Problem]:
    """Find what keeps a run in ``out`` from resuming with a recipe that was checked."""
    problems: list[Problem] = []
    directory = RunDirectory(out)
    with reporting(problems, "--out"):
        directory.changed_settings(recipe, allowed)
    if not any(problem.is_error for problem in checked.problems):
        with reporting(problems, "--out"):
            directory.changed_inputs(*checked.inputs(), allowed)
    return problems


def _open_sources(
    recipe: DistillationRecipe, checked: CheckedDistillation, cache: Path, on_progress: Progress
) -> None:
    """Open the data and read every image; what is left out is a warning."""
    images, problems = ImageChecks(cache), checked.problems
    for key, source in recipe.sources().items():
        if not source:
            text = "it is empty; set it to a folder of images: --set images=DIR"
            problems.append(Problem(key, text))
            continue
        contents = checked.contents[key] = Contents(checked.features)
        opener = open_source if key == "examples" else open_images
        with reporting(problems, key), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            found = opener(
                source, inspect=contents.add, load=images, on_progress=partial(on_progress, key)
            )
            checked.sources[key] = found
            problems += row_problems(key, found)
        problems += embedding_problems(key, contents, source, checked.features)
    if cache.parent.is_dir():
        images.save(cache)
    if "images" in checked.sources and not recipe.held_out:
        with reporting(problems, "num_held_out_images"):
            checked.sources |= _split(checked.sources["images"], recipe)
    held_out = checked.sources.get("held_out")
    if isinstance(held_out, ImageFolder | Selection):
        problems += _ground_truth_problems(recipe)


def has_instructions(held_out: ExampleSource) -> bool:
    """Return whether held-out images have instructions, and so concentrations of the policy."""
    return not isinstance(held_out, ImageFolder | Selection)


def _split(images: ExampleSource, recipe: DistillationRecipe) -> dict[str, ExampleSource]:
    """Hold out some images; the seed of the recipe decides which."""
    count = recipe.num_held_out_images
    if len(images) <= count:
        raise ValueError(
            f"it is {count}, and images has {len(images)}; accepted: fewer than the images, or "
            "another source of held_out"
        )
    order = np.random.default_rng([recipe.seed, len(images)]).permutation(len(images)).tolist()
    return {
        "held_out": Selection(images, sorted(order[:count])),
        "images": Selection(images, sorted(order[count:])),
    }


def _size_problems(
    recipe: DistillationRecipe, teacher: Checkpoint, out: Path, num_processes: int
) -> Iterator[Problem]:
    """Find multipliers without a parameter, and too little disk or memory."""
    with torch.device("meta"):
        student = SegmentationModel(student_config(recipe.model, teacher))
    names = {part for name, _ in student.named_parameters() for part in name.split(".")}
    yield from multiplier_problems(recipe.stages, names | {"segmentation"})
    gpu = available_device(num_processes)
    stages = estimate_distillation(recipe, teacher, num_processes, gpu).stages
    yield from disk_problems(recipe, stages, out)
    yield from memory_problems(stages)


def _stage_problems(recipe: DistillationRecipe) -> Iterator[Problem]:
    uses_examples = False
    for name, stage in recipe.stages.items():
        key = f"stages.{name}"
        if not stage.embedding_loss_weight and not stage.decoding_loss_weight:
            yield Problem(
                key,
                "embedding_loss_weight and decoding_loss_weight are 0: nothing is trained; set one",
            )
        uses_examples = uses_examples or stage.decoding_loss_weight > 0
        if stage.decoding_loss_weight and not recipe.examples:
            yield Problem(
                "examples",
                f"it is empty, and {key}.decoding_loss_weight is {stage.decoding_loss_weight:g}: "
                "set it to examples with instructions, or the weight to 0",
            )
    if recipe.examples and not uses_examples:
        yield Problem(
            "examples",
            "no stage has a decoding_loss_weight: they are not used; leave them out",
            is_error=False,
        )


def _ground_truth_problems(recipe: DistillationRecipe) -> Iterator[Problem]:
    for name, stage in recipe.stages.items():
        for metric in [*stage.thresholds, stage.best_metric]:
            if metric and metric != EMBEDDING_COSINE and not metric.startswith(AGREEMENT):
                yield Problem(
                    f"stages.{name}",
                    f"{metric} needs ground truth; set held_out to examples, or use "
                    f"{AGREEMENT}{metric}, which compares with the teacher",
                )
