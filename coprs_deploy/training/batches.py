"""Order of the training examples, and padded token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


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
