"""A run that starts from a checkpoint and learns from example files: policies of real size."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from coprs_deploy.architecture import SAM_SIZES, SegmentationConfig
from coprs_deploy.artifacts import write_json
from coprs_deploy.checkpoint import Checkpoint, load_segmentation_model, read_checkpoint
from coprs_deploy.conversion.generated_policy import POLICY_SIZES, build_config, build_tokenizer
from coprs_deploy.models import SegmentationModel
from coprs_deploy.policy.progress_bars import without_progress_bars
from coprs_deploy.policy.vision_inputs import VisionProcessor
from coprs_deploy.training.examples import ExampleFile
from coprs_deploy.training.features import FeatureStore
from coprs_deploy.training.phases.example_answers import ExampleAnswers, ExampleSets
from coprs_deploy.training.recipe import CheckpointModel, ExampleData, Recipe, SupervisedPhase
from coprs_deploy.training.report import write_report
from coprs_deploy.training.run_folder import CHECKPOINT_FOLDER, REPORT_FILE, RunFolder, all_passed
from coprs_deploy.training.small_policy import PolicyParts
from coprs_deploy.training.trainer import Trainer
from coprs_deploy.training.workbench import Workbench

if TYPE_CHECKING:
    from accelerate import Accelerator


def train_on_examples(
    recipe: Recipe, accelerator: Accelerator, folder: RunFolder
) -> dict[str, Any]:
    """Run the supervised phases of a recipe from a checkpoint to a checkpoint.

    Raises:
        ValueError: a phase is not supervised.
        CheckpointError: the checkpoint it starts from cannot be used.
    """
    model, data = recipe.model, recipe.data
    assert isinstance(model, CheckpointModel)
    assert isinstance(data, ExampleData)
    checkpoint = read_checkpoint(model.path)
    workbench = workbench_from_checkpoint(checkpoint)
    for part in (workbench.policy.model, workbench.segmentation):
        part.to(accelerator.device)
    vision = VisionProcessor(checkpoint.policy_path, workbench.policy.model.config)
    training, held_out = ExampleFile(data.training), ExampleFile(data.held_out)
    features = FeatureStore(data.features) if data.features else None
    if features is not None:
        features.require_encoder(workbench.segmentation)
    examples = ExampleSets(training, held_out, vision, recipe.seed, features)
    trainer = Trainer(accelerator, recipe, folder, workbench)
    results = {}
    for name, settings in recipe.phases.items():
        if not isinstance(settings, SupervisedPhase):
            raise ValueError(f"phases.{name} is not supervised; a checkpoint takes no other phase")
        workbench.policy.model.requires_grad_(True)
        workbench.segmentation.requires_grad_(True)
        freeze_by_recipe(workbench.policy.model, model)
        phase = ExampleAnswers(name, settings, workbench, examples)
        results[name] = trainer.run(phase)
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


def workbench_from_checkpoint(checkpoint: Checkpoint) -> Workbench:
    """Load every part of a checkpoint for training, in float32."""
    from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

    path: Path = checkpoint.policy_path
    with without_progress_bars():
        policy = AutoModelForImageTextToText.from_pretrained(
            path, dtype=torch.float32, local_files_only=True
        )
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        processor = AutoImageProcessor.from_pretrained(path, backend="pil", local_files_only=True)
    parts = PolicyParts(policy, tokenizer, processor, checkpoint.config.prompt)
    segmentation = load_segmentation_model(checkpoint)
    return Workbench(parts, segmentation, nn.Module(), checkpoint.config.policy_image)


def freeze_by_recipe(policy: Any, settings: CheckpointModel) -> None:
    """Apply what a recipe says about the policy: frozen parts, and memory for time."""
    if settings.freeze_vision_tower:
        tower = getattr(policy.model, "visual", None) or policy.model.vision_tower
        tower.requires_grad_(False)
    if settings.gradient_checkpointing:
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
