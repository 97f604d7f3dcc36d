"""Training runs: open the run directory, train the stages, save the checkpoint, write the report.

:func:`train` runs a :class:`~coprs_deploy.training.recipe.Recipe`. Recipes of the tiny model are
run by :mod:`coprs_deploy.curriculum.run` with :func:`open_run`, :func:`save_checkpoint` and
:func:`finish_run` from here.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic

import msgspec
import torch
from torch import nn

from coprs_deploy.artifacts import write_json
from coprs_deploy.checkpoint import Checkpoint, read_checkpoint
from coprs_deploy.conversion.random_policy import POLICY_SIZES, build_config, build_tokenizer
from coprs_deploy.data.examples import ExampleFile
from coprs_deploy.data.synthetic.examples import SceneExamples, held_out_examples
from coprs_deploy.data.synthetic.presets import PRESETS
from coprs_deploy.demo import CHECKPOINT
from coprs_deploy.errors import MissingDependencyError, install_hint
from coprs_deploy.model_config import SAM_SIZES, SegmentationConfig
from coprs_deploy.models import SegmentationModel
from coprs_deploy.policy.vision_inputs import VisionProcessor
from coprs_deploy.training.features import FeatureStore
from coprs_deploy.training.progress import load_finished_stage
from coprs_deploy.training.recipe import R, Recipe, RunSettings
from coprs_deploy.training.report import write_report
from coprs_deploy.training.run_directory import (
    CHECKPOINT_FOLDER,
    REPORT_FILE,
    RunDirectory,
    all_passed,
)
from coprs_deploy.training.settings import CheckpointModel, ExampleData, SupervisedSettings
from coprs_deploy.training.state import TrainingState, state_from_checkpoint
from coprs_deploy.training.supervised_stage import ExampleSets, SupervisedStage
from coprs_deploy.training.trainer import Trainer

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Run(Generic[R]):
    """An open run: its recipe with the precision of this machine, and ``time.perf_counter()``."""

    recipe: R
    accelerator: Accelerator
    directory: RunDirectory
    started: float


def train(recipe: Recipe, out: Path) -> dict[str, Any]:
    """Run a recipe that starts from a checkpoint; a run in ``out`` is resumed.

    Returns:
        The report: stages with their metrics and thresholds.

    Raises:
        MissingDependencyError: a package of the extra ``train`` is not installed.
        ValueError: ``out`` holds a run with other settings, or settings contradict each other.
        CheckpointError: the initial checkpoint cannot be used.
    """
    with open_run(recipe, out) as run:
        checkpoint = read_checkpoint(recipe.model.path or CHECKPOINT)
        state = state_from_checkpoint(checkpoint)
        results = _train_stages(run, checkpoint, state)
        provenance = {"recipe": recipe.description, "from": checkpoint.fingerprint()}
        save_checkpoint(run, state, provenance)
        return finish_run(run, results)


@contextmanager
def open_run(recipe: R, out: Path) -> Iterator[Run[R]]:
    """Open a run directory, locked, with an accelerator for the recipe.

    Raises:
        MissingDependencyError: a package of the extra ``train`` is not installed.
        ValueError: ``out`` holds a run with other settings.
        ArtifactError: another process trains in ``out``.
    """
    recipe = resolve_precision(type(recipe).from_json(recipe.to_json()))  # checks the ranges
    accelerator = _accelerator(recipe, out)
    directory = RunDirectory(out)
    with directory.lock() if accelerator.is_main_process else nullcontext():
        with accelerator.main_process_first():
            directory.open(recipe)
        accelerator.init_trackers("tensorboard")
        yield Run(recipe, accelerator, directory, time.perf_counter())
    accelerator.end_training()


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


def save_checkpoint(run: Run[Any], state: TrainingState, provenance: dict[str, Any]) -> None:
    """Write the finished checkpoint of a run; all processes take part."""
    if run.accelerator.is_main_process:
        path = run.directory.path / CHECKPOINT_FOLDER
        state.save_checkpoint(path, run.recipe.save_dtype, provenance, overwrite=True)
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
        write_json(run.directory.path / REPORT_FILE, report)
        write_report(run.directory, report)
    run.accelerator.wait_for_everyone()
    return report


def _accelerator(recipe: RunSettings, out: Path) -> Accelerator:
    with _extra_packages():
        from accelerate import Accelerator
        from torch.utils import tensorboard  # noqa: F401
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.set_num_threads(recipe.num_threads)
    return Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision="bf16" if recipe.precision == "bf16" else "no",
        log_with="tensorboard",
        project_dir=str(out),
    )


@contextmanager
def _extra_packages() -> Iterator[None]:
    """Name the extra that brings a missing package."""
    try:
        yield
    except ImportError as error:
        raise MissingDependencyError(
            f"training needs {error.name}; {install_hint('train')}"
        ) from error


def _train_stages(run: Run[Recipe], checkpoint: Checkpoint, state: TrainingState) -> dict[str, Any]:
    """Train all stages in order; return their results by name."""
    recipe, accelerator, directory = run.recipe, run.accelerator, run.directory
    state.segmentation.to(accelerator.device)
    if accelerator.distributed_type != "FSDP":  # sharding moves each process's share itself
        state.policy.model.to(accelerator.device)
    examples = open_examples(recipe, checkpoint, state)
    trainer = Trainer(accelerator, recipe, directory, state)
    results: dict[str, Any] = {}
    for name, settings in recipe.stages.items():
        state.policy.model.requires_grad_(True)
        state.segmentation.requires_grad_(True)
        if recipe.model.freeze_vision_tower:
            vision_tower(state.policy.model).requires_grad_(False)
        if isinstance(settings, SupervisedSettings):
            stage = SupervisedStage(name, settings, state, examples)
            if recipe.model.gradient_checkpointing:
                enable_gradient_checkpointing(state.policy.model)
            results[name] = trainer.run(stage)
        elif finished := load_finished_stage(directory, name, state):
            results[name] = finished
        else:
            with _extra_packages():
                from coprs_deploy.training.grpo.stage import GrpoStage
            grpo = GrpoStage(
                run,
                name,
                settings,
                state,
                examples,
                steps_before=sum(result["steps"] for result in results.values()),
                policy_path=None if results else checkpoint.policy_path,
            )
            results[name] = grpo.run()
    return results


def open_examples(recipe: Recipe, checkpoint: Checkpoint, state: TrainingState) -> ExampleSets:
    """Open the training and held-out examples: example files, or generated scenes."""
    data = recipe.data
    vision = VisionProcessor(checkpoint.policy_path, state.policy.model.config)
    if isinstance(data, ExampleData):
        features = FeatureStore(data.features) if data.features else None
        if features is not None:
            features.require_encoder(state.segmentation)
        training, held_out = ExampleFile(data.training), ExampleFile(data.held_out)
        return ExampleSets(training, held_out, vision, recipe.seed, features)
    preset = PRESETS[data.preset]
    return ExampleSets(
        SceneExamples(preset, data.num_training_scenes),
        held_out_examples(preset, data.num_held_out_scenes, data.num_no_match_scenes),
        vision,
        recipe.seed,
    )


def vision_tower(policy: Any) -> nn.Module:
    """Return the vision tower of a policy of either family."""
    tower: nn.Module = getattr(policy.model, "visual", None) or policy.model.vision_tower
    return tower


def enable_gradient_checkpointing(policy: Any) -> None:
    """Recompute activations in the backward pass instead of storing them."""
    if hasattr(policy, "activation_checkpointing_enable"):  # later versions of transformers
        policy.activation_checkpointing_enable()
    else:
        policy.gradient_checkpointing_enable()


def build_on_meta(settings: CheckpointModel) -> tuple[nn.Module, SegmentationModel]:
    """Build policy and segmentation path of the named sizes on the meta device."""
    from transformers import AutoModelForImageTextToText

    for name, found, known in (
        ("model.policy", settings.policy, POLICY_SIZES),
        ("model.sam", settings.sam, SAM_SIZES),
    ):
        if found not in known:
            raise ValueError(f"{name} is {found!r}; accepted: {', '.join(known)}")
    size = POLICY_SIZES[settings.policy]
    tokenizer = build_tokenizer(size.family)
    with torch.device("meta"):
        policy = AutoModelForImageTextToText.from_config(build_config(size, tokenizer))
        hidden_size = policy.get_output_embeddings().weight.shape[1]
        config = SegmentationConfig(hidden_size, sam=SAM_SIZES[settings.sam])
        segmentation = SegmentationModel(config)
    return policy, segmentation
