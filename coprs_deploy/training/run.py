"""A whole run: phases in order, then the finished checkpoint, its figures and its report."""

from __future__ import annotations

import os
import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from coprs_deploy.artifacts import write_json
from coprs_deploy.errors import MissingDependencyError
from coprs_deploy.training.phase_settings import (
    SegmentationPhase,
    SupervisedPhase,
    WarmUpPhase,
)
from coprs_deploy.training.recipe import (
    AnyPhase,
    CheckpointModel,
    ExampleData,
    Recipe,
    SceneData,
    SmallModel,
)
from coprs_deploy.training.run_folder import CHECKPOINT_FOLDER, REPORT_FILE, RunFolder, all_passed

if TYPE_CHECKING:
    from accelerate import Accelerator

    from coprs_deploy.training.phases.phase import TrainingPhase
    from coprs_deploy.training.phases.scene_training import SceneTraining
    from coprs_deploy.training.workbench import Workbench


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
    folder = RunFolder(out)
    with folder.lock() if accelerator.is_main_process else nullcontext():
        with accelerator.main_process_first():
            folder.open(recipe)
        accelerator.init_trackers("tensorboard")
        if starts_from_checkpoint:
            from coprs_deploy.training.example_run import train_on_examples

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


def _train_on_scenes(
    recipe: Recipe, accelerator: Accelerator, folder: RunFolder, scenes: Path
) -> dict[str, Any]:
    from coprs_deploy.checkpoint import read_checkpoint
    from coprs_deploy.training.evaluation import held_out_questions, summarize
    from coprs_deploy.training.trainer import Trainer

    shared = share_scenes(recipe, accelerator, scenes)
    workbench, judge, data = shared.workbench, shared.judge, recipe.data
    assert isinstance(data, SceneData)
    provenance = {"recipe": recipe.description, "seed": recipe.seed, "data": data.to_json()}
    if isinstance(recipe.model, SmallModel) and recipe.model.start:
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
        shared.held_out.tier,
        shared.held_out.scenes,
        data.held_out_scenes,
        data.no_match_scenes,
    )
    generated = judge.judge(questions, True, accelerator)
    fed = judge.judge(questions, False, accelerator)
    report = {
        "recipe": recipe.to_json(),
        "minutes": sum(result["seconds"] for result in results.values()) / 60,
        "minutes_this_time": (time.perf_counter() - started) / 60,
        "phases": results,
        "passed": all_passed(results),
        "generated": summarize(generated),
        "teacher_forced": summarize(fed),
        "answers": [asdict(judged) for judged in generated],
    }
    if accelerator.is_main_process:
        from coprs_deploy.training.report import write_report

        write_json(folder.path / REPORT_FILE, report)
        write_report(folder, report)
    accelerator.wait_for_everyone()
    return report


def share_scenes(recipe: Recipe, accelerator: Accelerator, scenes: Path) -> SceneTraining:
    """Draw the scenes, and build the model and what its phases share."""
    import torch

    from coprs_deploy.training.evaluation import Judge
    from coprs_deploy.training.packed_forward import PackedForward
    from coprs_deploy.training.packing import QuestionPacker
    from coprs_deploy.training.phases.scene_training import SceneTraining
    from coprs_deploy.training.scene_source import SceneSource, corpus, store_scenes
    from coprs_deploy.training.scenes.tiers import HELD_OUT_SEED, TIERS
    from coprs_deploy.training.workbench import build_small_workbench

    data, model = recipe.data, recipe.model
    assert isinstance(data, SceneData) and isinstance(model, SmallModel)
    tier = TIERS[data.tier]
    with accelerator.main_process_first():
        stored = store_scenes(tier, 0, data.training_scenes, scenes, recipe.workers)
        total = data.held_out_scenes + data.no_match_scenes
        held_out = store_scenes(tier, HELD_OUT_SEED, total, scenes, recipe.workers)
    workbench = build_small_workbench(model, tier, lambda: corpus(tier), recipe.seed)
    move_to(workbench, accelerator.device)
    policy, size = workbench.policy, model.policy.image_size
    packer = QuestionPacker(policy.tokenizer, policy.prompt, model.policy.grid_size)
    return SceneTraining(
        workbench=workbench,
        training=SceneSource(tier, stored, recipe.seed),
        held_out=SceneSource(tier, held_out, recipe.seed),
        packer=packer,
        judge=Judge(workbench, held_out, PackedForward(policy.model, size, torch.float32), packer),
        image_size=size,
        dtype=torch.bfloat16 if recipe.precision == "bf16" else torch.float32,
    )


def build_phase(name: str, settings: AnyPhase, shared: SceneTraining) -> TrainingPhase[Any]:
    """Build a phase on scenes; everything may learn unless the phase says otherwise."""
    from coprs_deploy.training.phases.segmentation import Segmentation
    from coprs_deploy.training.phases.supervised import Supervised
    from coprs_deploy.training.phases.warm_up import WarmUp

    workbench = shared.workbench
    for part in (workbench.policy.model, workbench.segmentation, workbench.heads):
        part.requires_grad_(True)
    if isinstance(settings, WarmUpPhase):
        return WarmUp(name, settings, shared)
    if isinstance(settings, SegmentationPhase):
        return Segmentation(name, settings, shared)
    if isinstance(settings, SupervisedPhase):
        return Supervised(name, settings, shared)
    raise ValueError(f'phases.{name} is grpo; it needs model.kind "checkpoint"')


def move_to(workbench: Workbench, device: Any) -> None:
    """Put every part on a device."""
    for part in (workbench.policy.model, workbench.segmentation, workbench.heads):
        part.to(device)


def round_weights(workbench: Workbench, dtype: str) -> None:
    """Give the weights the values that the checkpoint stores, so that its figures are its own."""
    import torch

    wanted = getattr(torch, dtype)
    with torch.no_grad():
        for part in (workbench.policy.model, workbench.segmentation):
            for tensor in (*part.parameters(), *part.buffers()):
                if tensor.is_floating_point():
                    tensor.copy_(tensor.to(wanted))
