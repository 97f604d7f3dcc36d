"""Weights on their way: into states and back, between processes, and to a rollout engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coprs_deploy.errors import ArtifactError
from coprs_deploy.training.grpo.attachment import ATTRIBUTE
from coprs_deploy.training.settings import GrpoSettings

WEIGHTS_FILE = "trained.safetensors"
"""The weights that move, in the folder of a state."""


def moving_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name the parameters that are trained; two names of one parameter count once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def save_moving_weights(state: Path, model: nn.Module) -> None:
    """Write the weights that move into the folder of a state, under their names in memory."""
    from safetensors.torch import save_file

    state.mkdir(parents=True, exist_ok=True)
    weights = {name: p.detach().contiguous() for name, p in moving_weights(model).items()}
    save_file(weights, state / WEIGHTS_FILE)


def load_moving_weights(state: Path, model: nn.Module) -> None:
    """Put the weights of a state back; every name must be there, and no other.

    Raises:
        ArtifactError: the state belongs to another model or recipe.
    """
    from safetensors.torch import load_file

    stored = load_file(state / WEIGHTS_FILE)
    moving = moving_weights(model)
    differing = stored.keys() ^ moving.keys()
    if differing:
        raise ArtifactError(
            f"{state} does not hold the weights that this recipe trains: {sorted(differing)[:5]} "
            "are on one side only; remove it, or start in another folder with --out"
        )
    with torch.no_grad():
        for name, weight in moving.items():
            weight.copy_(stored[name])


def keep_segmentation_out(engine: Any) -> None:
    """Let a rollout engine have the policy's weights only, under the policy's names."""
    everything = engine._iter_named_params

    def policy_only() -> Iterator[tuple[str, Tensor]]:
        for name, weight in everything():
            if not name.startswith(f"{ATTRIBUTE}."):
                yield name, weight

    engine._iter_named_params = policy_only


def average_gradients(replicated: nn.Module) -> None:
    """Average the gradients of a module that every process holds whole, over the processes."""
    from torch import distributed

    count = distributed.get_world_size()
    for weight in replicated.parameters():
        if not weight.requires_grad:
            continue
        if weight.grad is None:  # this process had no row with a target
            weight.grad = torch.zeros_like(weight)
        distributed.all_reduce(weight.grad)
        weight.grad.div_(count)


def require_sharding_settings(settings: GrpoSettings) -> None:
    """Refuse what sharded training cannot do.

    Raises:
        ValueError: adapters, or no gradient clip.
    """
    if settings.lora.rank:
        raise ValueError(
            "lora.rank is set and the policy is sharded (FSDP); adapters are merged from whole "
            "weights: start without an FSDP configuration"
        )
    if settings.optimizer.clip <= 0:
        raise ValueError(
            f"optimizer.clip is {settings.optimizer.clip}; sharded training needs one above 0"
        )


def whole_policy(model: nn.Module, accelerator: Any) -> dict[str, Tensor]:
    """Gather a sharded policy's weights, without the segmentation head; all processes take part.

    Returns:
        Name to whole tensor in the main process, nothing in the others.
    """
    gathered: dict[str, Tensor] = accelerator.get_state_dict(model)
    return {n: t for n, t in gathered.items() if not n.startswith(f"{ATTRIBUTE}.")}
