"""Saved states of a run as checkpoints, while it trains or after it was stopped.

Nothing here takes the lock of a run: states are complete as soon as they have their names.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from coprs_deploy.checkpoint import read_checkpoint
from coprs_deploy.demo import CHECKPOINT
from coprs_deploy.training.recipe import Recipe
from coprs_deploy.training.runs.progress import RESULT_FILE, WEIGHTS_FILE, saved_states, step_of
from coprs_deploy.training.runs.run_directory import RunDirectory
from coprs_deploy.training.settings import GrpoSettings, SupervisedSettings
from coprs_deploy.training.state import (
    TrainingState,
    freeze_unused,
    state_from_checkpoint,
    vision_tower,
)
from coprs_deploy.training.supervised_stage import ExampleObjective, freeze_untrained


@dataclass(frozen=True)
class SavedState:
    """Weights of a stage after some of its steps; of a finished stage if ``folder`` is the stage's.

    Attributes:
        stage: name of the stage.
        step: number of steps.
        folder: folder of the files.
        is_finished: whether the stage ended with these weights.
    """

    stage: str
    step: int
    folder: Path
    is_finished: bool


def find_states(run: Path, stages: Sequence[str]) -> list[SavedState]:
    """Return the states of a run, oldest first."""
    found = []
    for name in stages:
        folder = RunDirectory(run).stage(name)
        if (folder / RESULT_FILE).is_file():
            result = json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))
            found.append(SavedState(name, result["steps"], folder, is_finished=True))
        else:
            states = saved_states(folder)
            found += [SavedState(name, step_of(each), each, is_finished=False) for each in states]
    return found


def choose_state(run: Path, stages: Sequence[str], step: int | None) -> SavedState:
    """Return the newest state after ``step`` steps of its stage; None takes the newest of all.

    Raises:
        ValueError: there is none.
    """
    states = find_states(run, stages)
    if not states:
        raise ValueError(
            f"{run} has no saved state; one is saved every save_steps steps and when a signal "
            "stops the run"
        )
    chosen = [each for each in states if step in (None, each.step)]
    if not chosen:
        known = ", ".join(f"{each.step} ({each.stage})" for each in states)
        raise ValueError(
            f"--step is {step}; accepted, as {run} has these states: {known}. save_total_limit is "
            "the number of states that are kept"
        )
    return chosen[-1]


def export_state(recipe: Recipe, run: Path, saved: SavedState, out: Path) -> None:
    """Write the checkpoint of a state.

    Raises:
        ValueError: the checkpoint from which the run started has changed.
        ArtifactError: ``out`` exists.
    """
    checkpoint = read_checkpoint(recipe.model.path or CHECKPOINT)
    source = RunDirectory(run).check_start(checkpoint)
    state = state_from_checkpoint(checkpoint)
    for name, settings in recipe.stages.items():
        select_trained(recipe, settings, state)
        folder = RunDirectory(run).stage(name)
        if name == saved.stage and not saved.is_finished:
            if isinstance(settings, SupervisedSettings):
                load_objective(saved.folder, ExampleObjective(state, settings))
            else:
                load_grpo(saved.folder, state, settings)
            break
        state.load_state_dict(torch.load(folder / WEIGHTS_FILE, weights_only=True))
        if name == saved.stage:
            break
    position = {"stage": saved.stage, "step": saved.step}
    provenance = {"recipe": recipe.description, "from": source, **position}
    state.save_checkpoint(out, recipe.save_dtype, provenance, overwrite=True)


def select_trained(
    recipe: Recipe, settings: SupervisedSettings | GrpoSettings, state: TrainingState
) -> None:
    """Let the weights that a stage trains need a gradient, and add them to ``state.trained``."""
    state.policy.model.requires_grad_(True)
    state.segmentation.requires_grad_(True)
    if recipe.model.freeze_vision_tower:
        vision_tower(state.policy.model).requires_grad_(False)
    if isinstance(settings, SupervisedSettings):
        freeze_untrained(state.segmentation, settings)
        state.add_trained()
    else:
        freeze_unused(state.segmentation)
        state.add_trained(settings.trains)


def load_objective(folder: Path, objective: torch.nn.Module) -> None:
    """Load the weights of a state of :class:`~coprs_deploy.training.trainer.Trainer`."""
    weights = torch.load(folder / "pytorch_model.bin", map_location="cpu", mmap=True)
    objective.load_state_dict({n.removeprefix("module."): t for n, t in weights.items()})


def load_grpo(folder: Path, state: TrainingState, settings: GrpoSettings) -> None:
    """Load the weights of a state of a GRPO stage; adapters are merged."""
    from coprs_deploy.training.grpo.arguments import lora_config
    from coprs_deploy.training.grpo.attachment import ATTRIBUTE, SegmentationHead
    from coprs_deploy.training.grpo.distribution import load_trainable_weights

    policy, head = state.policy.model, SegmentationHead(state.segmentation)
    head.requires_grad_(settings.mode != "rl")
    trained = [weight for weight in head.parameters() if weight.requires_grad]
    policy.add_module(ATTRIBUTE, head)
    adapters = lora_config(settings.lora)
    if adapters is None:
        load_trainable_weights(folder, policy)
    else:
        from peft import get_peft_model

        model = get_peft_model(policy, adapters)
        for weight in trained:  # PEFT froze everything but the adapters
            weight.requires_grad_(True)
        load_trainable_weights(folder, model)
        model.merge_and_unload()
    delattr(policy, ATTRIBUTE)
