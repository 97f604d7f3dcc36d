"""The interface between a phase and the trainer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import torch
from torch import nn

from coprs_deploy.training.losses import Mean
from coprs_deploy.training.settings import StageSettings as PhaseSettings

if TYPE_CHECKING:
    from accelerate import Accelerator


S = TypeVar("S", bound=PhaseSettings)


class StageOutput(NamedTuple):
    """What an objective gives for one batch.

    Attributes:
        losses: name to mean; the trainer adds them up with the phase's coefficients.
        metrics: name to mean, for the log.
    """

    losses: dict[str, Mean]
    metrics: dict[str, Mean]


class TrainingStage(ABC, Generic[S]):
    """One phase of a run.

    Attributes:
        name: of the phase in the recipe.
        settings: of the phase.
        objective: maps a batch to an :class:`StageOutput`; it holds every weight that moves.
    """

    name: str
    settings: S
    objective: nn.Module

    def prepare(self, accelerator: Accelerator) -> dict[str, float]:
        """Change weights before the first step, by other means than steps; say what came of it."""
        return {}

    @abstractmethod
    def batch(self, step: int, rank: int, num_ranks: int) -> Any:
        """Return one process's part of a step's batch: tensors in tuples, lists or dictionaries."""

    @abstractmethod
    def coefficients(self, relative_rate: float) -> dict[str, float]:
        """Weigh the losses.

        Args:
            relative_rate: the learning rate as a share of its peak, for losses that fade with it.

        Returns:
            Loss to factor; a loss whose name is missing counts under ``"*"``, or fully.
        """

    @abstractmethod
    def evaluate(self, accelerator: Accelerator, num_scenes: int) -> dict[str, float]:
        """Judge the weights as they are on held-out scenes; the same result in every process."""


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
            outcome: StageOutput = objective(batch)
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
