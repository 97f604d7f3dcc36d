"""A run that starts from a checkpoint and learns from examples: policies of any size and family."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from coprs_deploy.architecture import SAM_SIZES, SegmentationConfig
from coprs_deploy.artifacts import write_json
from coprs_deploy.checkpoint import Checkpoint, read_checkpoint
from coprs_deploy.conversion.generated_policy import POLICY_SIZES, build_config, build_tokenizer
from coprs_deploy.errors import MissingDependencyError
from coprs_deploy.models import SegmentationModel
from coprs_deploy.policy.vision_inputs import VisionProcessor
from coprs_deploy.shipped import CHECKPOINT
from coprs_deploy.training.asked import held_out_examples
from coprs_deploy.training.examples import ExampleFile
from coprs_deploy.training.features import FeatureStore
from coprs_deploy.training.grpo.settings import GrpoPhase
from coprs_deploy.training.phase_settings import SupervisedPhase
from coprs_deploy.training.phases.example_answers import ExampleAnswers, ExampleSets
from coprs_deploy.training.recipe import CheckpointModel, ExampleData, Recipe
from coprs_deploy.training.report import write_report
from coprs_deploy.training.run_folder import CHECKPOINT_FOLDER, REPORT_FILE, RunFolder, all_passed
from coprs_deploy.training.scenes.dataset import SceneExamples
from coprs_deploy.training.scenes.tiers import TIERS
from coprs_deploy.training.trainer import Trainer
from coprs_deploy.training.workbench import Workbench, workbench_from_checkpoint

if TYPE_CHECKING:
    from accelerate import Accelerator


def train_on_examples(
    recipe: Recipe, accelerator: Accelerator, folder: RunFolder
) -> dict[str, Any]:
    """Run the phases of a recipe from a checkpoint to a checkpoint.

    Raises:
        ValueError: a phase is neither supervised nor GRPO.
        CheckpointError: the checkpoint it starts from cannot be used.
    """
    model = recipe.model
    assert isinstance(model, CheckpointModel)
    checkpoint = read_checkpoint(model.path or CHECKPOINT)
    workbench = workbench_from_checkpoint(checkpoint)
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
        if isinstance(settings, SupervisedPhase):
            phase = ExampleAnswers(name, settings, workbench, examples)
            if model.gradient_checkpointing:
                save_memory(workbench.policy.model)
            results[name] = trainer.run(phase)
        elif isinstance(settings, GrpoPhase):
            run_grpo = import_grpo()
            context = run_grpo.RunContext(
                recipe=recipe,
                accelerator=accelerator,
                folder=folder,
                workbench=workbench,
                examples=examples,
                steps_before=sum(result["steps"] for result in results.values()),
                policy_path=None if results else checkpoint.policy_path,
            )
            results[name] = run_grpo.run_grpo_phase(name, settings, context)
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
        from coprs_deploy.training.grpo import phase_run
    except ImportError as error:
        raise MissingDependencyError(
            f"GRPO needs {error.name}; pip install 'coprs-deploy[train]'"
        ) from error
    return phase_run


def example_sets(recipe: Recipe, checkpoint: Checkpoint, workbench: Workbench) -> ExampleSets:
    """Open what is learned from and judged on: files of examples, or generated scenes."""
    data = recipe.data
    vision = VisionProcessor(checkpoint.policy_path, workbench.policy.model.config)
    if isinstance(data, ExampleData):
        features = FeatureStore(data.features) if data.features else None
        if features is not None:
            features.require_encoder(workbench.segmentation)
        training, held_out = ExampleFile(data.training), ExampleFile(data.held_out)
        return ExampleSets(training, held_out, vision, recipe.seed, features)
    tier = TIERS[data.tier]
    return ExampleSets(
        SceneExamples(tier, data.training_scenes),
        held_out_examples(tier, data.held_out_scenes, data.no_match_scenes),
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
