"""Interface between a stage and the trainer, and averaging over processes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import torch
from torch import nn

from coprs_deploy.training.losses import Mean
from coprs_deploy.training.runs.gallery import Sample
from coprs_deploy.training.settings import StageSettings

if TYPE_CHECKING:
    from accelerate import Accelerator

S = TypeVar("S", bound=StageSettings)


class StageOutput(NamedTuple):
    """Losses of a batch, which the trainer adds by the stage's coefficients, and its metrics."""

    losses: dict[str, Mean]
    metrics: dict[str, Mean]


class TrainingStage(ABC, Generic[S]):
    """One stage of a run.

    ``objective`` maps a batch to a :class:`StageOutput` and holds every parameter that is trained.
    """

    name: str
    settings: S
    objective: nn.Module

    def prepare(self, accelerator: Accelerator) -> dict[str, float]:
        """Initialize weights before the first step; return metrics of the initialization."""
        return {}

    @abstractmethod
    def batch(self, step: int, rank: int, num_ranks: int) -> Any:
        """Return one process's part of a step's batch: tensors in tuples, lists or dictionaries."""

    @abstractmethod
    def loss_coefficients(self, lr_factor: float) -> dict[str, float]:
        """Return the coefficient of every loss.

        Args:
            lr_factor: learning rate as a share of its peak, for losses that decay with it.

        Returns:
            Loss name to coefficient; ``"X.*"`` stands for all losses ``X.NAME`` without their own.
        """

    def held_out_samples(self) -> list[Sample]:
        """Return responses to held-out examples for the report; called in the main process."""
        return []

    @abstractmethod
    def evaluate(self, accelerator: Accelerator, num_examples: int) -> dict[str, float]:
        """Evaluate the current weights on held-out examples; same result in every process."""


def mean_metrics(
    accelerator: Accelerator,
    objective: nn.Module,
    collect: Callable[[list[int]], Any],
    num_examples: int,
    batch_size: int = 32,
) -> dict[str, float]:
    """Average an objective's metrics over the first examples, without gradient.

    ``collect`` maps indices to a batch. All processes take part and return the same means; each
    calls the objective equally often, as a sharded one requires.
    """
    from accelerate.utils import send_to_device

    rank, num_ranks = accelerator.process_index, accelerator.num_processes
    mine, most = range(rank, num_examples, num_ranks), -(-num_examples // num_ranks)
    sums: dict[str, Mean] = {}
    objective.eval()
    with torch.no_grad():
        for start in range(0, most, batch_size):
            own = mine[start : start + batch_size]
            # Without an example left, the first one is evaluated again and not counted.
            batch = send_to_device(collect(list(own) or [0]), accelerator.device)
            with accelerator.autocast():  # on a CPU it cannot stack float16 embeddings
                output: StageOutput = objective(batch)
            for name, mean in output.metrics.items():
                add_mean(sums, name, mean if own else Mean(*map(torch.zeros_like, mean)))
    objective.train()
    return reduce_means(accelerator, sums)


def add_mean(sums: dict[str, Mean], name: str, mean: Mean) -> None:
    """Add a mean to the one of the same name, in place."""
    sums[name] = Mean(*map(torch.add, sums[name], mean)) if name in sums else mean


def reduce_means(accelerator: Accelerator, means: dict[str, Mean]) -> dict[str, float]:
    """Combine means over all processes; one without weight is undefined and left out."""
    if not means:
        return {}
    names = sorted(means)
    parts = torch.stack([torch.stack([means[n].total, means[n].weight]) for n in names])
    total: torch.Tensor = accelerator.reduce(parts.detach().double(), "sum")
    return {
        name: float(part[0] / part[1]) for name, part in zip(names, total, strict=True) if part[1]
    }
