"""Optimizers: Muon for hidden matrices, AdamW for the rest."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from coprs_deploy.training.settings import Optimizer

HIDDEN_PARTS = ("blocks.", "layers.", "merger.mlp.", "transformer.", "prior.q_proj")
"""Parts of the names of matrices that map hidden states to hidden states."""

MIN_MUON_SIDE = 8
"""AdamW updates matrices with a side of at most this."""

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic Newton-Schulz iteration: singular values end in 0.7..1.2."""

ADAMW_RMS = 0.2
"""Typical root mean square of an AdamW step, so that both optimizers share a learning rate."""

MOMENTUM = 0.95
"""Decay of Muon's momentum."""

NUM_ITERATIONS = 4
"""Newton-Schulz iterations per step of Muon."""

_SMALLEST_NORM = 1e-7


def build_optimizers(objective: nn.Module, settings: Optimizer) -> list[torch.optim.Optimizer]:
    """Build one or two optimizers of the trainable parameters of a stage's module.

    Each group keeps its peak learning rate under ``"peak_lr"``.
    """
    # A sharded policy and the segmentation path, which is never sharded, must not share a group.
    groups: dict[tuple[bool, float, bool], list[nn.Parameter]] = {}
    for name, weight in objective.named_parameters():
        if weight.requires_grad:
            parts = name.split(".")
            is_muon = settings.name == "muon" and is_hidden(name, weight)
            multipliers = settings.lr_multipliers
            factors = [multipliers[part] for part in parts if part in multipliers] or [1.0]
            key = (is_muon, settings.learning_rate * factors[-1], "segmentation" in parts)
            groups.setdefault(key, []).append(weight)
    adamw, muon = (
        [
            {"params": weights, "lr": peak, "peak_lr": peak}
            for (kind, peak, _), weights in groups.items()
            if kind == is_muon
        ]
        for is_muon in (False, True)
    )
    optimizers: list[torch.optim.Optimizer] = []
    if adamw:
        optimizers.append(
            torch.optim.AdamW(adamw, betas=settings.betas, weight_decay=settings.weight_decay)
        )
    if muon:
        optimizers.append(Muon(muon, weight_decay=settings.weight_decay))
    return optimizers


def is_hidden(name: str, weight: nn.Parameter) -> bool:
    """Return whether a parameter is a matrix between hidden states."""
    return (
        weight.ndim == 2
        and min(weight.shape) > MIN_MUON_SIDE
        and any(part in name for part in HIDDEN_PARTS)
        and "rel_pos" not in name
    )


def set_lr_factor(optimizers: Iterable[Any], factor: float) -> None:
    """Set the learning rate of every group to this share of its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor


def group_settings(optimizers: Iterable[Any]) -> list[list[dict[str, Any]]]:
    """Return the settings of all groups of parameters: rates, betas, weight decay."""
    return [
        [{key: value for key, value in group.items() if key != "params"} for group in each]
        for each in (optimizer.param_groups for optimizer in optimizers)
    ]


def set_group_settings(optimizers: Iterable[Any], settings: list[list[dict[str, Any]]]) -> None:
    """Undo what loading a state did to the settings: those of the recipe count."""
    for optimizer, groups in zip(optimizers, settings, strict=True):
        for group, kept in zip(optimizer.param_groups, groups, strict=True):
            group.update(kept)


class Muon(torch.optim.Optimizer):
    """Muon: updates matrices by orthogonalized Nesterov momentum.

    Args:
        groups: parameter groups, each with its ``lr`` on AdamW's scale; every parameter is a
            matrix.
        weight_decay: decoupled weight decay.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], weight_decay: float = 0.0) -> None:
        super().__init__(groups, {"weight_decay": weight_decay})
        for group in self.param_groups:
            for weight in group["params"]:
                assert weight.ndim == 2, f"Muon updates matrices, not shape {tuple(weight.shape)}"

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for weight in group["params"]:
                if weight.grad is not None:
                    by_shape.setdefault(weight.shape, []).append(weight)
            for shape, weights in by_shape.items():
                steps = orthogonalize(torch.stack([self._direction(w) for w in weights]))
                scale = group["lr"] * ADAMW_RMS * max(shape) ** 0.5
                for weight, step in zip(weights, steps, strict=True):
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    weight.add_(step, alpha=-scale)

    def _direction(self, weight: Tensor) -> Tensor:
        state = self.state[weight]
        assert weight.grad is not None, "only matrices with a gradient are updated"
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        buffer: Tensor = state["momentum_buffer"]
        buffer.lerp_(weight.grad, 1 - MOMENTUM)
        return weight.grad.lerp(buffer, MOMENTUM)


def orthogonalize(matrices: Tensor) -> Tensor:
    """Orthogonalize matrices by Newton-Schulz iterations, (N, R, C) float to float32.

    All singular values end near 1.
    """
    a, b, c = COEFFICIENTS
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.float()
    x = x.mT if is_tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=_SMALLEST_NORM)
    for _ in range(NUM_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    result: Tensor = x.mT if is_tall else x
    return result
