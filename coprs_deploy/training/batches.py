"""The order in which training sees its examples: shuffled afresh in each epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from coprs_deploy.training.stage import TrainingStage


class EpochOrder:
    """Maps the position of an example in a run to its index; a function of the seed alone.

    Args:
        length: examples of one epoch.
        seed: of the order.
    """

    def __init__(self, length: int, seed: int) -> None:
        self._length = length
        self._seed = seed
        self._order: tuple[int, NDArray[np.int64]] | None = None

    def __getitem__(self, position: int) -> int:
        epoch, place = divmod(position, self._length)
        if self._order is None or self._order[0] != epoch:
            generator = np.random.default_rng([self._seed, epoch])
            self._order = (epoch, generator.permutation(self._length))
        return int(self._order[1][place])


def step_batches(
    phase: TrainingStage[Any], first: int, rank: int, num_ranks: int, workers: int
) -> Iterator[Any]:
    """Prepare the batches of the steps that are left, in their order.

    A batch depends on its step alone, so the number of workers changes no value.

    Args:
        phase: what makes them.
        first: the first step that is left.
        rank: the process that they are for.
        num_ranks: processes that train together.
        workers: processes that prepare them; 0 does it in this one, when a batch is asked for.
    """
    loader = DataLoader(
        _Batches(phase, rank, num_ranks),
        batch_size=None,
        sampler=range(first, phase.settings.steps),
        num_workers=workers,
        collate_fn=_as_it_is,
        # Forked, since a phase holds the model: it is not to be copied, and no batch needs it.
        multiprocessing_context="fork" if workers else None,
        # Its seed would else come from the numbers that the training draws.
        generator=torch.Generator(),
    )
    return iter(loader)


class _Batches(Dataset[Any]):
    """A phase's part of one process, as a data loader takes it: step to batch."""

    def __init__(self, phase: TrainingStage[Any], rank: int, num_ranks: int) -> None:
        self._phase, self._rank, self._num_ranks = phase, rank, num_ranks

    def __len__(self) -> int:
        steps: int = self._phase.settings.steps
        return steps

    def __getitem__(self, step: int) -> Any:
        return self._phase.batch(step, self._rank, self._num_ranks)


def _as_it_is(batch: Any) -> Any:
    return batch
