"""Optimizers: Muon for hidden matrices, AdamW for the rest, one rate that follows the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from coprs_deploy.training.settings import Optimizer

HIDDEN_PARTS = ("blocks.", "layers.", "merger.mlp.", "transformer.", "prior.q_proj")
"""Where a matrix maps hidden states to hidden states, and not pixels, tokens or labels."""


SMALLEST_HIDDEN_SIDE = 8
"""A matrix with a shorter side is left to AdamW."""


def build_optimizers(objective: nn.Module, settings: Optimizer) -> list[torch.optim.Optimizer]:
    """Build the optimizers of everything in ``objective`` that learns.

    Args:
        objective: the module of a phase.
        settings: how weights move.

    Returns:
        One or two optimizers; each group has its peak rate under ``"peak_rate"``.
    """
    # Where the policy is sharded, the segmentation path is not: they never share a group.
    groups: dict[tuple[bool, float, bool], list[nn.Parameter]] = {}
    for name, weight in objective.named_parameters():
        if weight.requires_grad:
            is_segmentation = "segmentation" in name.split(".")
            is_muon = settings.muon and is_hidden(name, weight)
            key = (is_muon, _rate_factor(name, settings), is_segmentation)
            groups.setdefault(key, []).append(weight)
    optimizers: list[torch.optim.Optimizer] = []
    for is_muon in (False, True):
        chosen = [
            {"params": weights, "lr": settings.rate * factor, "peak_rate": settings.rate * factor}
            for (kind, factor, _), weights in groups.items()
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
    """Say whether a parameter is a matrix between hidden states."""
    return (
        weight.ndim == 2
        and min(weight.shape) > SMALLEST_HIDDEN_SIDE
        and any(part in name for part in HIDDEN_PARTS)
        and "rel_pos" not in name
    )


def relative_rate(settings: Optimizer, step: int, num_steps: int) -> float:
    """Return the rate of a step as a share of its peak: a rise, a plateau and a fall.

    Args:
        settings: lengths and shape.
        step: from 0.
        num_steps: of the phase.
    """
    rise = min(1.0, (step + 1) / settings.warmup_steps) if settings.warmup_steps else 1.0
    left = 1 - step / num_steps
    fall = min(1.0, left / settings.lr_decay_ratio) if settings.lr_decay_ratio else 1.0
    if settings.decay == "cosine":
        fall = 0.5 - 0.5 * math.cos(math.pi * fall)
        return rise * (settings.floor + (1 - settings.floor) * fall)
    return max(settings.floor, rise * fall)


def set_rate(optimizers: Iterable[Any], relative: float) -> None:
    """Give every group this share of its peak rate."""
    for group in _groups(optimizers):
        group["lr"] = group["peak_rate"] * relative


def _groups(optimizers: Iterable[Any]) -> Iterator[dict[str, Any]]:
    for optimizer in optimizers:
        yield from optimizer.param_groups


def _rate_factor(name: str, settings: Optimizer) -> float:
    named = [
        settings.lr_multipliers[part] for part in name.split(".") if part in settings.lr_multipliers
    ]
    return named[-1] if named else 1.0


COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic Newton-Schulz iteration: singular values end between 0.7 and 1.2."""


RMS_OF_ADAMW = 0.2
"""Root of the mean square that an AdamW step has in practice, for shared learning rates."""


_SMALLEST_NORM = 1e-7


class Muon(torch.optim.Optimizer):
    """Moves matrices by orthogonalized Nesterov momentum.

    Args:
        groups: parameter groups; every parameter is a matrix.
        lr: learning rate, on AdamW's scale.
        momentum: decay of the momentum.
        weight_decay: decoupled weight decay.
        num_iterations: Newton-Schulz iterations of a step.
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
                assert weight.ndim == 2, f"Muon moves matrices, not shape {tuple(weight.shape)}"
        self._num_iterations = num_iterations

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move every matrix that has a gradient."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for weight in group["params"]:
                if weight.grad is not None:
                    by_shape.setdefault(weight.shape, []).append(weight)
            for shape, weights in by_shape.items():
                directions = torch.stack([self._direction(w, group["momentum"]) for w in weights])
                steps = orthogonalize(directions, self._num_iterations)
                scale = group["lr"] * RMS_OF_ADAMW * max(shape) ** 0.5
                for weight, step in zip(weights, steps, strict=True):
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    weight.add_(step, alpha=-scale)
        return loss

    def _direction(self, weight: Tensor, momentum: float) -> Tensor:
        state = self.state[weight]
        assert weight.grad is not None, "only matrices with a gradient are moved"
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        buffer: Tensor = state["momentum_buffer"]
        buffer.lerp_(weight.grad, 1 - momentum)
        return weight.grad.lerp(buffer, momentum)


def orthogonalize(matrices: Tensor, num_iterations: int) -> Tensor:
    """Bring all singular values near 1 by Newton-Schulz iterations.

    Args:
        matrices: (N, R, C) float.
        num_iterations: of the quintic iteration.

    Returns:
        (N, R, C) float32.
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
