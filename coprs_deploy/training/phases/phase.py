"""The interface between a phase and the trainer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from torch import nn

from coprs_deploy.training.losses import Mean
from coprs_deploy.training.phase_settings import Phase as PhaseSettings

if TYPE_CHECKING:
    from accelerate import Accelerator

S = TypeVar("S", bound=PhaseSettings)


class Outcome(NamedTuple):
    """What an objective gives for one batch.

    Attributes:
        losses: name to mean; the trainer adds them up with the phase's coefficients.
        metrics: name to mean, for the log.
    """

    losses: dict[str, Mean]
    metrics: dict[str, Mean]


class TrainingPhase(ABC, Generic[S]):
    """One phase of a run.

    Attributes:
        name: of the phase in the recipe.
        settings: of the phase.
        objective: maps a batch to an :class:`Outcome`; it holds every weight that moves.
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
