"""Optimizers (Muon for hidden matrices, AdamW for the rest) and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
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

_SMALLEST_NORM = 1e-7


def build_optimizers(objective: nn.Module, settings: Optimizer) -> list[torch.optim.Optimizer]:
    """Build one or two optimizers of the trainable parameters of a stage's module.

    Each group keeps its peak learning rate under ``"peak_lr"``.
    """
    # A sharded policy and the segmentation path, which is never sharded, must not share a group.
    groups: dict[tuple[bool, float, bool], list[nn.Parameter]] = {}
    for name, weight in objective.named_parameters():
        if weight.requires_grad:
            is_segmentation = "segmentation" in name.split(".")
            is_muon = settings.name == "muon" and is_hidden(name, weight)
            peak = settings.learning_rate * _lr_multiplier(name, settings)
            key = (is_muon, peak, is_segmentation)
            groups.setdefault(key, []).append(weight)
    optimizers: list[torch.optim.Optimizer] = []
    for is_muon in (False, True):
        chosen = [
            {"params": weights, "lr": peak, "peak_lr": peak}
            for (kind, peak, _), weights in groups.items()
            if kind == is_muon
        ]
        if chosen and is_muon:
            optimizers.append(Muon(chosen, weight_decay=settings.weight_decay))
        elif chosen:
            optimizers.append(
                torch.optim.AdamW(chosen, betas=settings.betas, weight_decay=settings.weight_decay)
            )
    return optimizers


def is_hidden(name: str, weight: nn.Parameter) -> bool:
    """Return whether a parameter is a matrix between hidden states."""
    return (
        weight.ndim == 2
        and min(weight.shape) > MIN_MUON_SIDE
        and any(part in name for part in HIDDEN_PARTS)
        and "rel_pos" not in name
    )


def lr_factor(settings: Optimizer, step: int, max_steps: int) -> float:
    """Return the learning rate of a step, counted from 0, as a share of its peak."""
    warmup = min(1.0, (step + 1) / settings.warmup_steps) if settings.warmup_steps else 1.0
    left = 1 - step / max_steps
    decay = min(1.0, left / settings.lr_decay_ratio) if settings.lr_decay_ratio else 1.0
    if settings.lr_decay_type == "cosine":
        decay = 0.5 - 0.5 * math.cos(math.pi * decay)
        return warmup * (settings.min_lr_ratio + (1 - settings.min_lr_ratio) * decay)
    return max(settings.min_lr_ratio, warmup * decay)


def set_lr_factor(optimizers: Iterable[Any], factor: float) -> None:
    """Set the learning rate of every group to this share of its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor


def _lr_multiplier(name: str, settings: Optimizer) -> float:
    multipliers = settings.lr_multipliers
    found = [multipliers[part] for part in name.split(".") if part in multipliers]
    return found[-1] if found else 1.0


class Muon(torch.optim.Optimizer):
    """Muon: updates matrices by orthogonalized Nesterov momentum.

    Args:
        groups: parameter groups; every parameter is a matrix.
        lr: learning rate on AdamW's scale.
        momentum: decay of the momentum.
        weight_decay: decoupled weight decay.
        num_iterations: Newton-Schulz iterations per step.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        num_iterations: int = 4,
    ) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for group in self.param_groups:
            for weight in group["params"]:
                assert weight.ndim == 2, f"Muon updates matrices, not shape {tuple(weight.shape)}"
        self._num_iterations = num_iterations

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every matrix that has a gradient."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for weight in group["params"]:
                if weight.grad is not None:
                    by_shape.setdefault(weight.shape, []).append(weight)
            for shape, weights in by_shape.items():
                directions = torch.stack([self._direction(w, group["momentum"]) for w in weights])
                steps = orthogonalize(directions, self._num_iterations)
                scale = group["lr"] * ADAMW_RMS * max(shape) ** 0.5
                for weight, step in zip(weights, steps, strict=True):
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    weight.add_(step, alpha=-scale)
        return loss

    def _direction(self, weight: Tensor, momentum: float) -> Tensor:
        state = self.state[weight]
        assert weight.grad is not None, "only matrices with a gradient are updated"
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        buffer: Tensor = state["momentum_buffer"]
        buffer.lerp_(weight.grad, 1 - momentum)
        return weight.grad.lerp(buffer, momentum)


def orthogonalize(matrices: Tensor, num_iterations: int) -> Tensor:
    """Orthogonalize matrices by Newton-Schulz iterations, (N, R, C) float to float32.

    All singular values end near 1.
    """
    a, b, c = COEFFICIENTS
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.float()
    x = x.mT if is_tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=_SMALLEST_NORM)
    for _ in range(num_iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    result: Tensor = x.mT if is_tall else x
    return result
