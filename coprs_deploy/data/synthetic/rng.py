"""Portable random numbers: the same on every machine and with every version of Python and numpy.

Only outputs with a compatibility promise are used: ``random.Random.random`` for an integer seed,
and the raw output of numpy's PCG64. Values are derived from them with + - * / and the square root,
which IEEE 754 defines to the last bit; sine, logarithm and others differ between libraries.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")

BYTE_SPREAD = math.sqrt(2.0)
"""Standard deviation of the number of ones in a random byte."""


class PortableRng:
    """Random stream of a purpose and a seed; different streams are independent."""

    def __init__(self, purpose: str, seed: int) -> None:
        digest = hashlib.blake2b(f"{purpose}:{seed}".encode(), digest_size=8).digest()
        self._number = int.from_bytes(digest, "big")
        self._random = random.Random(self._number)

    def uniform(self, low: float, high: float) -> float:
        """Draw a number in [low, high)."""
        return low + (high - low) * self._random.random()

    def chance(self, probability: float) -> bool:
        """Return True with a probability."""
        return self._random.random() < probability

    def integer(self, low: int, high: int) -> int:
        """Draw an integer in low..high, inclusive."""
        return low + int(self._random.random() * (high - low + 1))

    def choice(self, items: Sequence[T]) -> T:
        """Draw one of the items uniformly."""
        return items[self.integer(0, len(items) - 1)]

    def weighted(self, items: Sequence[T], weights: Sequence[float]) -> T:
        """Draw one of the items with probabilities proportional to the weights."""
        left = self._random.random() * sum(weights)
        for item, weight in zip(items, weights, strict=True):
            left -= weight
            if left < 0:
                return item
        return next(item for item, weight in zip(items, weights, strict=True) if weight > 0)

    def direction(self) -> tuple[float, float]:
        """Draw a unit vector (x, y) of uniform direction."""
        while True:
            x, y = self.uniform(-1, 1), self.uniform(-1, 1)
            length = math.sqrt(x * x + y * y)
            if 0.1 < length < 1:
                return x / length, y / length

    def array(self, *shape: int) -> NDArray[np.float32]:
        """Draw uniform numbers in [-1, 1) as float32; slow, for small shapes."""
        values = [self.uniform(-1, 1) for _ in range(math.prod(shape))]
        return np.array(values, dtype=np.float32).reshape(shape)

    def noise(self, *shape: int) -> NDArray[np.float32]:
        """Draw approximately normal noise as float32, with mean 0 and standard deviation 1.

        It is the number of ones in a random byte: nine levels, much faster than a normal
        distribution.
        """
        count = math.prod(shape)
        # A new seed for each call, so that two calls return different noise.
        generator = np.random.PCG64(self._number ^ int(self._random.random() * 2**53))
        raw = np.asarray(generator.random_raw(-(-count // 8)), dtype="<u8")
        ones = np.bitwise_count(raw.view(np.uint8)[:count])
        values: NDArray[np.float32] = (ones.astype(np.float32) - 4) / np.float32(BYTE_SPREAD)
        return values.reshape(shape)
