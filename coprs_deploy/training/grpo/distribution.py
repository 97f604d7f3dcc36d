"""Weights and gradients across files and processes: states, sharding, rollout engines."""

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
"""Trainable weights in the directory of a training state."""


def trainable_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Map names to trainable parameters; a shared parameter is listed once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def save_trainable_weights(state: Path, model: nn.Module) -> None:
    """Write the trainable weights to a state directory, under their names in memory."""
    from safetensors.torch import save_file

    state.mkdir(parents=True, exist_ok=True)
    weights = {name: p.detach().contiguous() for name, p in trainable_weights(model).items()}
    save_file(weights, state / WEIGHTS_FILE)


def load_trainable_weights(state: Path, model: nn.Module) -> None:
    """Load the trainable weights of a state; names must match exactly.

    Raises:
        ArtifactError: the state belongs to another model or recipe.
    """
    from safetensors.torch import load_file

    stored = load_file(state / WEIGHTS_FILE)
    trainable = trainable_weights(model)
    differing = stored.keys() ^ trainable.keys()
    if differing:
        raise ArtifactError(
            f"the weights in {state} do not match this recipe: {sorted(differing)[:5]} exist on "
            "one side only; remove it, or choose another directory with --out"
        )
    with torch.no_grad():
        for name, weight in trainable.items():
            weight.copy_(stored[name])


def exclude_segmentation(engine: Any) -> None:
    """Restrict weight synchronization of a rollout engine to the policy's own weights."""
    iter_all = engine._iter_named_params

    def policy_only() -> Iterator[tuple[str, Tensor]]:
        for name, weight in iter_all():
            if not name.startswith(f"{ATTRIBUTE}."):
                yield name, weight

    engine._iter_named_params = policy_only


def average_gradients(replicated: nn.Module) -> None:
    """Average over the processes the gradients of a module that is replicated, not sharded."""
    from torch import distributed

    count = distributed.get_world_size()  # codespell:ignore world
    for weight in filter(lambda weight: weight.requires_grad, replicated.parameters()):
        if weight.grad is None:  # no row with a target in this process
            weight.grad = torch.zeros_like(weight)
        distributed.all_reduce(weight.grad)
        weight.grad.div_(count)


def check_sharding_settings(settings: GrpoSettings) -> None:
    """Refuse adapters, and training without gradient clipping, for a sharded policy (FSDP)."""
    if settings.lora.r:
        raise ValueError(
            f"lora.r is {settings.lora.r}; accepted with a sharded policy (FSDP): 0; adapters are "
            "merged from whole weights, so start without an FSDP configuration"
        )
    if settings.optimizer.max_grad_norm <= 0:
        raise ValueError(
            f"optimizer.max_grad_norm is {settings.optimizer.max_grad_norm}; accepted with a "
            "sharded policy (FSDP): a value above 0"
        )


def policy_weights(trainer: Any) -> dict[str, Tensor]:
    """Return the policy's current weights under the names of the plain policy (collective call).

    Shards are gathered (only in the main process), adapters are merged into copies.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    if trainer.is_fsdp_enabled:
        weights: dict[str, Tensor] = trainer.accelerator.get_state_dict(trainer.model)
    elif hasattr(model, "peft_config"):
        model, weights = model.get_base_model(), {}
        for name, module in model.named_modules():
            if hasattr(module, "get_delta_weight"):
                with torch.no_grad():
                    delta = module.get_delta_weight(module.active_adapters[0])
                    weights[f"{name}.weight"] = module.base_layer.weight + delta
        for name, weight in model.state_dict().items():
            if ".lora_" not in name:
                weights.setdefault(name.replace(".base_layer.", "."), weight)
    else:
        weights = model.state_dict()
    return {n: t for n, t in weights.items() if not n.startswith(f"{ATTRIBUTE}.")}
