"""Optimizers: Muon for hidden matrices, AdamW for the rest, one rate that follows the step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from coprs_deploy.training.muon import Muon
from coprs_deploy.training.phase_settings import Optimizer

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
    rise = min(1.0, (step + 1) / settings.warm_up_steps) if settings.warm_up_steps else 1.0
    left = 1 - step / num_steps
    fall = min(1.0, left / settings.decay_share) if settings.decay_share else 1.0
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
        settings.rate_factors[part] for part in name.split(".") if part in settings.rate_factors
    ]
    return named[-1] if named else 1.0
