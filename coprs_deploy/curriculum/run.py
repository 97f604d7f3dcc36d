"""Training runs of a tiny model: stages on generated scenes, checkpoint, evaluation and report."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from coprs_deploy.checkpoint import read_checkpoint
from coprs_deploy.curriculum.checks import check_curriculum
from coprs_deploy.curriculum.context import CurriculumContext
from coprs_deploy.curriculum.evaluation import SceneEvaluator, held_out_questions
from coprs_deploy.curriculum.packed_forward import PackedForward
from coprs_deploy.curriculum.packing import QuestionPacker
from coprs_deploy.curriculum.perception_stage import PerceptionStage
from coprs_deploy.curriculum.reasoning_stage import ReasoningStage
from coprs_deploy.curriculum.recipe import (
    CurriculumRecipe,
    PerceptionSettings,
    ReasoningSettings,
    SegmentationSettings,
)
from coprs_deploy.curriculum.scenes import SceneSource, corpus, store_scenes
from coprs_deploy.curriculum.segmentation_stage import SegmentationStage
from coprs_deploy.curriculum.state import build_tiny_state
from coprs_deploy.data.synthetic.presets import HELD_OUT_SEED, PRESETS
from coprs_deploy.evaluation.summary import flat_row, summarize
from coprs_deploy.training.runs.progress import WEIGHTS_FILE
from coprs_deploy.training.runs.run import (
    Run,
    attach_run,
    finish_run,
    open_run,
    report_problems,
    save_checkpoint,
)
from coprs_deploy.training.runs.saved_state import SavedState, load_objective
from coprs_deploy.training.settings import StageSettings
from coprs_deploy.training.stage import TrainingStage
from coprs_deploy.training.state import TrainingState
from coprs_deploy.training.trainer import Trainer

STAGES: dict[type[StageSettings], Any] = {
    PerceptionSettings: PerceptionStage,
    SegmentationSettings: SegmentationStage,
    ReasoningSettings: ReasoningStage,
}
"""Settings to stage."""


def train_curriculum(
    recipe: CurriculumRecipe,
    out: Path,
    scenes_dir: Path | None = None,
    allowed: Sequence[str] = (),
) -> dict[str, Any]:
    """Run a recipe of a tiny model; a run in ``out`` is resumed.

    Args:
        recipe: the recipe.
        out: run directory.
        scenes_dir: folder of rendered scenes; ``out/scenes`` by default.
        allowed: keys of settings that a resumed run may change though that changes the training.

    Returns:
        The report: stages with their thresholds, and metrics of the finished model.

    Raises:
        MissingDependencyError: a package of the extra ``train`` is not installed.
        ValueError: ``out`` holds a run with other settings.
        ProblemsError: settings, initial checkpoint and machine do not fit together.
        CheckpointError: the initial checkpoint cannot be used.
    """
    with open_run(recipe, out, allowed) as run:
        num_processes = run.accelerator.num_processes
        report_problems(run, check_curriculum(recipe, out, scenes_dir, num_processes))
        context = build_context(run, scenes_dir or out / "scenes")
        run.provenance.update(_provenance(recipe))
        if run.accelerator.is_main_process and recipe.model.init_from:
            inputs = {"model.init_from": run.provenance["from"]}
            for note in run.directory.check_inputs(inputs, {}, list(recipe.stages), allowed):
                print(note, file=sys.stderr, flush=True)
        trainer = Trainer(run, context.state)
        stages = (build_stage(name, each, context) for name, each in recipe.stages.items())
        results = {stage.name: trainer.run(stage) for stage in stages}
        save_checkpoint(run, context.state)
        round_weights(context.state, recipe.save_dtype)
        return finish_run(run, results, evaluate(run, context))


def export_tiny_state(
    recipe: CurriculumRecipe, run: Path, saved: SavedState, out: Path, scenes_dir: Path | None
) -> None:
    """Write the checkpoint of a state, as ``training.saved_state.export_state`` does."""
    attached = attach_run(recipe, run)
    context = build_context(attached, scenes_dir or run / "scenes")
    for name, settings in recipe.stages.items():
        stage = build_stage(name, settings, context)
        if name == saved.stage and not saved.is_finished:
            load_objective(saved.folder, stage.objective)
            break
        file = attached.directory.stage(name) / WEIGHTS_FILE
        context.state.load_state_dict(torch.load(file, weights_only=True))
        if name == saved.stage:
            break
    provenance = _provenance(recipe) | {"stage": saved.stage, "step": saved.step}
    context.state.save_checkpoint(out, recipe.save_dtype, provenance, overwrite=True)


def build_context(run: Run[CurriculumRecipe], scenes_dir: Path) -> CurriculumContext:
    """Render the scenes, and build the model and the other shared parts of the stages."""
    recipe, accelerator = run.recipe, run.accelerator
    data, model = recipe.data, recipe.model
    preset = PRESETS[data.preset]
    with accelerator.main_process_first():
        workers = recipe.num_workers
        training = store_scenes(preset, 0, data.num_training_scenes, scenes_dir, workers)
        num_held_out = data.num_held_out_scenes + data.num_no_match_scenes
        held_out = store_scenes(preset, HELD_OUT_SEED, num_held_out, scenes_dir, workers)
    state = build_tiny_state(model, preset, lambda: corpus(preset), recipe.seed)
    for part in _parts(state):
        part.to(accelerator.device)
    policy = state.policy
    packer = QuestionPacker(policy.tokenizer, policy.prompt, model.policy.grid_size)
    exact_forward = PackedForward(policy.model, preset.image_size, torch.float32)
    return CurriculumContext(
        state=state,
        training=SceneSource(preset, training, recipe.seed),
        held_out=SceneSource(preset, held_out, recipe.seed),
        packer=packer,
        evaluator=SceneEvaluator(state, exact_forward, packer),
        dtype=torch.bfloat16 if recipe.precision == "bf16" else torch.float32,
    )


def build_stage(
    name: str, settings: StageSettings, context: CurriculumContext
) -> TrainingStage[Any]:
    """Build a stage; all parameters are trainable unless the stage freezes them."""
    for part in _parts(context.state):
        part.requires_grad_(True)
    stage: TrainingStage[Any] = STAGES[type(settings)](name, settings, context)
    return stage


def round_weights(state: TrainingState, dtype: str) -> None:
    """Round the weights to the dtype of the checkpoint, so that it is what is evaluated."""
    with torch.no_grad():
        for part in (state.policy.model, state.segmentation):
            for tensor in (*part.parameters(), *part.buffers()):
                if tensor.is_floating_point():
                    tensor.copy_(tensor.to(getattr(torch, dtype)))


def evaluate(run: Run[CurriculumRecipe], context: CurriculumContext) -> dict[str, Any]:
    """Evaluate the finished model, with generated and with teacher-forced responses."""
    data, held_out = run.recipe.data, context.held_out
    questions = held_out_questions(
        held_out.preset, held_out.scenes, data.num_held_out_scenes, data.num_no_match_scenes
    )
    evaluator = context.evaluator
    generated, teacher_forced = (
        evaluator.evaluate(questions, responses, run.accelerator)
        for responses in (None, evaluator.target_responses(questions))
    )
    return {
        "generated": summarize(generated),
        "teacher_forced": summarize(teacher_forced),
        "examples": [flat_row(each) for each in generated],
    }


def _provenance(recipe: CurriculumRecipe) -> dict[str, Any]:
    data = recipe.data.to_json()
    provenance = {"recipe": recipe.description, "seed": recipe.seed, "data": data}
    if recipe.model.init_from:
        provenance["from"] = read_checkpoint(recipe.model.init_from).fingerprint()
    return provenance


def _parts(state: TrainingState) -> tuple[Any, Any, Any]:
    return state.policy.model, state.segmentation, state.auxiliary_heads
