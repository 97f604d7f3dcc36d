"""The order in which training sees its examples: shuffled afresh in each epoch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


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
