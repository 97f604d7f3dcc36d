"""Order of the training examples, data loader of a stage, and padded token ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from coprs_deploy.training.stage import TrainingStage


class EpochOrder:
    """Position in the run to index of the example; the seed alone determines the order."""

    def __init__(self, length: int, seed: int) -> None:
        self._length = length
        self._seed = seed
        self._order: tuple[int, NDArray[np.int64]] | None = None

    def __getitem__(self, position: int) -> int:
        epoch, offset = divmod(position, self._length)
        if self._order is None or self._order[0] != epoch:
            generator = np.random.default_rng([self._seed, epoch])
            self._order = (epoch, generator.permutation(self._length))
        return int(self._order[1][offset])


def pad_tokens(
    rows: Sequence[Sequence[int]], pad: int, side: Literal["left", "right"] = "right"
) -> tuple[Tensor, Tensor]:
    """Pad rows of token ids to one length.

    Returns:
        Token ids and attention mask, int64 (B, L) each.
    """
    ids = [torch.tensor(row, dtype=torch.int64) for row in rows]
    padded = pad_sequence(ids, batch_first=True, padding_value=pad, padding_side=side)
    ones = [torch.ones_like(row) for row in ids]
    return padded, pad_sequence(ones, batch_first=True, padding_side=side)


def step_batches(
    stage: TrainingStage[Any], first_step: int, rank: int, num_ranks: int, num_workers: int
) -> Iterator[Any]:
    """Prepare the batches of the remaining steps, in order.

    A batch depends on its step alone, so the number of worker processes changes no value; with 0,
    this process prepares each batch on demand.
    """
    loader = DataLoader(
        _StepBatches(stage, rank, num_ranks),
        batch_size=None,
        sampler=range(first_step, stage.settings.max_steps),
        num_workers=num_workers,
        collate_fn=lambda batch: batch,
        # A stage holds the model: forking avoids a copy of it, which no batch needs.
        multiprocessing_context="fork" if num_workers else None,
        # Otherwise the loader's seed would be drawn from the random stream of the training.
        generator=torch.Generator(),
    )
    return iter(loader)


class _StepBatches(Dataset[Any]):
    """Batches of one process by step."""

    def __init__(self, stage: TrainingStage[Any], rank: int, num_ranks: int) -> None:
        self._stage, self._rank, self._num_ranks = stage, rank, num_ranks

    def __getitem__(self, step: int) -> Any:
        return self._stage.batch(step, self._rank, self._num_ranks)
