"""Judging an objective on held-out scenes, spread over the processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from coprs_deploy.training.losses import Mean
from coprs_deploy.training.phases.phase import Outcome

if TYPE_CHECKING:
    from accelerate import Accelerator

ROWS_AT_ONCE = 32
"""Scenes of one forward pass, unless a phase says otherwise."""


def mean_metrics(
    accelerator: Accelerator,
    objective: nn.Module,
    collect: Callable[[list[int]], Any],
    num_scenes: int,
    rows_at_once: int = ROWS_AT_ONCE,
) -> dict[str, float]:
    """Average an objective's metrics over the first scenes, without gradient.

    Args:
        accelerator: spreads the scenes over the processes.
        objective: what gives the metrics.
        collect: indices to a batch.
        num_scenes: how many scenes.
        rows_at_once: scenes of one forward pass.

    Returns:
        Metric to mean, the same in every process.
    """
    from accelerate.utils import send_to_device

    mine = list(range(num_scenes))[accelerator.process_index :: accelerator.num_processes]
    sums: dict[str, Mean] = {}
    objective.eval()
    with torch.no_grad(), accelerator.autocast():
        for start in range(0, len(mine), rows_at_once):
            batch = send_to_device(collect(mine[start : start + rows_at_once]), accelerator.device)
            outcome: Outcome = objective(batch)
            for name, mean in outcome.metrics.items():
                known = sums.get(name)
                sums[name] = mean if known is None else Mean(*map(torch.add, known, mean))
    objective.train()
    return reduce_means(accelerator, sums)


def reduce_means(accelerator: Accelerator, means: dict[str, Mean]) -> dict[str, float]:
    """Bring the parts of means together over all processes."""
    if not means:
        return {}
    names = sorted(means)
    parts = torch.stack([torch.stack([means[n].total, means[n].weight]) for n in names])
    total: torch.Tensor = accelerator.reduce(parts.detach().double(), "sum")
    return {
        name: float(part[0] / part[1]) if part[1] else float("nan")
        for name, part in zip(names, total, strict=True)
    }
