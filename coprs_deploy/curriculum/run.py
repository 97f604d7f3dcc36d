"""A whole run: phases in order, then the finished checkpoint, its figures and its report."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coprs_deploy.artifacts import write_json
from coprs_deploy.curriculum.recipe import PerceptionSettings, SegmentationSettings, TinyModel
from coprs_deploy.training.recipe import AnyStage, Recipe
from coprs_deploy.training.run_directory import (
    CHECKPOINT_FOLDER,
    REPORT_FILE,
    RunDirectory,
    all_passed,
)
from coprs_deploy.training.settings import SupervisedSettings, SyntheticData

if TYPE_CHECKING:
    from accelerate import Accelerator

    from coprs_deploy.curriculum.context import CurriculumContext
    from coprs_deploy.training.stage import TrainingStage
    from coprs_deploy.training.state import TrainingState


def _train_on_scenes(
    recipe: Recipe, accelerator: Accelerator, folder: RunDirectory, scenes: Path
) -> dict[str, Any]:
    from coprs_deploy.checkpoint import read_checkpoint
    from coprs_deploy.curriculum.evaluation import held_out_questions
    from coprs_deploy.evaluation.metrics import summarize
    from coprs_deploy.training.trainer import Trainer

    shared = share_scenes(recipe, accelerator, scenes)
    workbench, judge, data = shared.workbench, shared.judge, recipe.data
    assert isinstance(data, SyntheticData)
    provenance = {"recipe": recipe.description, "seed": recipe.seed, "data": data.to_json()}
    if isinstance(recipe.model, TinyModel) and recipe.model.start:
        provenance["from"] = read_checkpoint(recipe.model.start).fingerprint()
    trainer = Trainer(accelerator, recipe, folder, workbench)
    started = time.perf_counter()
    results = {
        name: trainer.run(build_phase(name, settings, shared))
        for name, settings in recipe.phases.items()
    }
    checkpoint = folder.path / CHECKPOINT_FOLDER
    if accelerator.is_main_process:
        workbench.save_checkpoint(checkpoint, recipe.store, provenance, overwrite=True)
    accelerator.wait_for_everyone()
    round_weights(workbench, recipe.store)
    questions = held_out_questions(
        shared.held_out.preset,
        shared.held_out.scenes,
        data.num_held_out_scenes,
        data.num_no_match_scenes,
    )
    generated = judge.evaluate(questions, accelerator=accelerator)
    fed = judge.evaluate(questions, True, accelerator)
    report = {
        "recipe": recipe.to_json(),
        "minutes": sum(result["seconds"] for result in results.values()) / 60,
        "minutes_this_time": (time.perf_counter() - started) / 60,
        "phases": results,
        "passed": all_passed(results),
        "generated": summarize([each.score for each in generated]),
        "teacher_forced": summarize([each.score for each in fed]),
        "answers": [each.to_json() for each in generated],
    }
    if accelerator.is_main_process:
        from coprs_deploy.training.report import write_report

        write_json(folder.path / REPORT_FILE, report)
        write_report(folder, report)
    accelerator.wait_for_everyone()
    return report


def share_scenes(recipe: Recipe, accelerator: Accelerator, scenes: Path) -> CurriculumContext:
    """Draw the scenes, and build the model and what its phases share."""
    import torch

    from coprs_deploy.curriculum.context import CurriculumContext
    from coprs_deploy.curriculum.evaluation import SceneEvaluator
    from coprs_deploy.curriculum.packed_forward import PackedForward
    from coprs_deploy.curriculum.packing import QuestionPacker
    from coprs_deploy.curriculum.scenes import SceneSource, corpus, store_scenes
    from coprs_deploy.curriculum.state import build_tiny_state
    from coprs_deploy.data.synthetic.presets import HELD_OUT_SEED, PRESETS

    data, model = recipe.data, recipe.model
    assert isinstance(data, SyntheticData) and isinstance(model, TinyModel)
    preset = PRESETS[data.preset]
    with accelerator.main_process_first():
        stored = store_scenes(preset, 0, data.num_training_scenes, scenes, recipe.workers)
        total = data.num_held_out_scenes + data.num_no_match_scenes
        held_out = store_scenes(preset, HELD_OUT_SEED, total, scenes, recipe.workers)
    workbench = build_tiny_state(model, preset, lambda: corpus(preset), recipe.seed)
    move_to(workbench, accelerator.device)
    policy, size = workbench.policy, model.policy.image_size
    packer = QuestionPacker(policy.tokenizer, policy.prompt, model.policy.grid_size)
    return CurriculumContext(
        workbench=workbench,
        training=SceneSource(preset, stored, recipe.seed),
        held_out=SceneSource(preset, held_out, recipe.seed),
        packer=packer,
        judge=SceneEvaluator(
            workbench, held_out, PackedForward(policy.model, size, torch.float32), packer
        ),
        image_size=size,
        dtype=torch.bfloat16 if recipe.precision == "bf16" else torch.float32,
    )


def build_phase(name: str, settings: AnyStage, shared: CurriculumContext) -> TrainingStage[Any]:
    """Build a phase on scenes; everything may learn unless the phase says otherwise."""
    from coprs_deploy.curriculum.perception_stage import PerceptionStage
    from coprs_deploy.curriculum.reasoning_stage import ReasoningStage
    from coprs_deploy.curriculum.segmentation_stage import SegmentationStage

    workbench = shared.workbench
    for part in (workbench.policy.model, workbench.segmentation, workbench.heads):
        part.requires_grad_(True)
    if isinstance(settings, PerceptionSettings):
        return PerceptionStage(name, settings, shared)
    if isinstance(settings, SegmentationSettings):
        return SegmentationStage(name, settings, shared)
    if isinstance(settings, SupervisedSettings):
        return ReasoningStage(name, settings, shared)
    raise ValueError(f'phases.{name} is grpo; it needs model.kind "checkpoint"')


def move_to(workbench: TrainingState, device: Any) -> None:
    """Put every part on a device."""
    for part in (workbench.policy.model, workbench.segmentation, workbench.heads):
        part.to(device)


def round_weights(workbench: TrainingState, dtype: str) -> None:
    """Give the weights the values that the checkpoint stores, so that its figures are its own."""
    import torch

    wanted = getattr(torch, dtype)
    with torch.no_grad():
        for part in (workbench.policy.model, workbench.segmentation):
            for tensor in (*part.parameters(), *part.buffers()):
                if tensor.is_floating_point():
                    tensor.copy_(tensor.to(wanted))
