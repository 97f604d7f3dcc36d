"""A whole run: phases in order, then the finished checkpoint, its figures and its report."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from torch import nn

from coprs_deploy.artifacts import write_json
from coprs_deploy.checkpoint import Checkpoint, read_checkpoint
from coprs_deploy.conversion.random_policy import POLICY_SIZES, build_config, build_tokenizer
from coprs_deploy.curriculum.run import _train_on_scenes
from coprs_deploy.data.examples import ExampleFile
from coprs_deploy.data.synthetic.examples import SceneExamples, held_out_examples
from coprs_deploy.data.synthetic.presets import PRESETS
from coprs_deploy.demo import CHECKPOINT
from coprs_deploy.errors import MissingDependencyError
from coprs_deploy.model_config import SAM_SIZES, SegmentationConfig
from coprs_deploy.models import SegmentationModel
from coprs_deploy.policy.vision_inputs import VisionProcessor
from coprs_deploy.training.features import FeatureStore
from coprs_deploy.training.recipe import Recipe
from coprs_deploy.training.report import write_report
from coprs_deploy.training.run_directory import (
    CHECKPOINT_FOLDER,
    REPORT_FILE,
    RunDirectory,
    all_passed,
)
from coprs_deploy.training.settings import (
    CheckpointModel,
    ExampleData,
    GrpoSettings,
    SupervisedSettings,
)
from coprs_deploy.training.state import TrainingState, state_from_checkpoint
from coprs_deploy.training.supervised_stage import ExampleSets, SupervisedStage
from coprs_deploy.training.trainer import Trainer

if TYPE_CHECKING:
    from accelerate import Accelerator

    from coprs_deploy.training.state import TrainingState


def train(recipe: Recipe, out: Path, scenes: Path | None = None) -> dict[str, Any]:
    """Run a recipe; a run that lies in ``out`` goes on where it stopped.

    Args:
        recipe: the run.
        out: its folder.
        scenes: where pictures of generated scenes are kept; ``out/scenes`` by default.

    Returns:
        The report: phases with their gates, and figures of the finished model.

    Raises:
        MissingDependencyError: a package of the extra ``train`` is not installed.
        ValueError: ``out`` holds another recipe's run, or settings do not fit together.
    """
    recipe = with_precision_of_this_machine(recipe)
    starts_from_checkpoint = isinstance(recipe.model, CheckpointModel)
    if isinstance(recipe.data, ExampleData) and not starts_from_checkpoint:
        raise ValueError('data.kind "examples" needs model.kind "checkpoint"')
    accelerator = _accelerator(recipe, out)
    folder = RunDirectory(out)
    with folder.lock() if accelerator.is_main_process else nullcontext():
        with accelerator.main_process_first():
            folder.open(recipe)
        accelerator.init_trackers("tensorboard")
        if starts_from_checkpoint:
            pass

            report = train_on_examples(recipe, accelerator, folder)
        else:
            report = _train_on_scenes(recipe, accelerator, folder, scenes or out / "scenes")
    accelerator.end_training()
    return report


def with_precision_of_this_machine(recipe: Recipe) -> Recipe:
    """Settle ``precision = "auto"``: bf16 on a device that has units for it, else fp32."""
    import torch

    if recipe.precision != "auto":
        return recipe
    if torch.cuda.is_available():
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        units = torch.cpu.get_capabilities()
        has_bf16 = bool(units.get("avx512_bf16") or units.get("amx_bf16") or units.get("sve_bf16"))
    return msgspec.structs.replace(recipe, precision="bf16" if has_bf16 else "fp32")


def _accelerator(recipe: Recipe, out: Path) -> Accelerator:
    try:
        import torch
        from accelerate import Accelerator
        from torch.utils import tensorboard  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            f"training needs {error.name}; pip install 'coprs-deploy[train]'"
        ) from error
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.set_num_threads(recipe.threads)
    return Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision="bf16" if recipe.precision == "bf16" else "no",
        log_with="tensorboard",
        project_dir=str(out),
    )


def train_on_examples(
    recipe: Recipe, accelerator: Accelerator, folder: RunDirectory
) -> dict[str, Any]:
    """Run the phases of a recipe from a checkpoint to a checkpoint.

    Raises:
        ValueError: a phase is neither supervised nor GRPO.
        CheckpointError: the checkpoint it starts from cannot be used.
    """
    model = recipe.model
    assert isinstance(model, CheckpointModel)
    checkpoint = read_checkpoint(model.path or CHECKPOINT)
    workbench = state_from_checkpoint(checkpoint)
    workbench.segmentation.to(accelerator.device)
    if accelerator.distributed_type != "FSDP":  # sharding moves each process's share itself
        workbench.policy.model.to(accelerator.device)
    examples = example_sets(recipe, checkpoint, workbench)
    trainer = Trainer(accelerator, recipe, folder, workbench)
    results: dict[str, Any] = {}
    for name, settings in recipe.phases.items():
        workbench.policy.model.requires_grad_(True)
        workbench.segmentation.requires_grad_(True)
        freeze_by_recipe(workbench.policy.model, model)
        if isinstance(settings, SupervisedSettings):
            phase = SupervisedStage(name, settings, workbench, examples)
            if model.gradient_checkpointing:
                save_memory(workbench.policy.model)
            results[name] = trainer.run(phase)
        elif isinstance(settings, GrpoSettings):
            run_grpo = import_grpo()
            context = run_grpo.GrpoContext(
                recipe=recipe,
                accelerator=accelerator,
                directory=folder,
                state=workbench,
                examples=examples,
                steps_before=sum(result["steps"] for result in results.values()),
                policy_path=None if results else checkpoint.policy_path,
            )
            results[name] = run_grpo.run_grpo_stage(name, settings, context)
        else:
            raise ValueError(
                f"phases.{name} is neither supervised nor grpo; a checkpoint takes no other phase"
            )
    report = {
        "recipe": recipe.to_json(),
        "minutes": sum(result["seconds"] for result in results.values()) / 60,
        "phases": results,
        "passed": all_passed(results),
    }
    if accelerator.is_main_process:
        provenance = {"recipe": recipe.description, "from": checkpoint.fingerprint()}
        workbench.save_checkpoint(folder.path / CHECKPOINT_FOLDER, recipe.store, provenance, True)
        write_json(folder.path / REPORT_FILE, report)
        write_report(folder, report)
    accelerator.wait_for_everyone()
    return report


def import_grpo() -> ModuleType:
    """Import what needs TRL.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        from coprs_deploy.training.grpo import stage
    except ImportError as error:
        raise MissingDependencyError(
            f"GRPO needs {error.name}; pip install 'coprs-deploy[train]'"
        ) from error
    return stage


def example_sets(recipe: Recipe, checkpoint: Checkpoint, workbench: TrainingState) -> ExampleSets:
    """Open what is learned from and judged on: files of examples, or generated scenes."""
    data = recipe.data
    vision = VisionProcessor(checkpoint.policy_path, workbench.policy.model.config)
    if isinstance(data, ExampleData):
        features = FeatureStore(data.features) if data.features else None
        if features is not None:
            features.require_encoder(workbench.segmentation)
        training, held_out = ExampleFile(data.training), ExampleFile(data.held_out)
        return ExampleSets(training, held_out, vision, recipe.seed, features)
    tier = PRESETS[data.tier]
    return ExampleSets(
        SceneExamples(tier, data.num_training_scenes),
        held_out_examples(tier, data.num_held_out_scenes, data.num_no_match_scenes),
        vision,
        recipe.seed,
    )


def freeze_by_recipe(policy: Any, settings: CheckpointModel) -> None:
    """Freeze the parts of the policy that a recipe leaves as they are."""
    if settings.freeze_vision_tower:
        tower = getattr(policy.model, "visual", None) or policy.model.vision_tower
        tower.requires_grad_(False)


def save_memory(policy: Any) -> None:
    """Compute activations twice instead of keeping them."""
    # Later versions of transformers know it by another name.
    name = "activation_checkpointing_enable"
    enable = getattr(policy, name, policy.gradient_checkpointing_enable)
    enable()


def build_on_meta(settings: CheckpointModel) -> tuple[nn.Module, SegmentationModel]:
    """Build policy and segmentation path of the named sizes without memory.

    Raises:
        ValueError: a size has no such name.
    """
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
        width = policy.get_output_embeddings().weight.shape[1]
        segmentation = SegmentationModel(SegmentationConfig(width, sam=SAM_SIZES[settings.sam]))
    return policy, segmentation
