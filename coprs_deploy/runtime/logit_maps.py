"""Logits at the size of the model, and at the size of the picture once somebody looks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from coprs_deploy.images import Placed, resize_logits
from coprs_deploy.specs import Geometry


@dataclass(frozen=True, eq=False, repr=False)
class LogitMaps:
    """The logits of N targets on one picture.

    Attributes:
        logits: (N, 1, M, M) float32, as the graph gives them.
        unpadded_size: int64 (2,), height and width of the picture in the padded image.
        original_size: height and width of the picture in pixels.
        geometry: sizes of the model.
    """

    logits: NDArray[np.float32]
    unpadded_size: NDArray[np.int64]
    original_size: tuple[int, int]
    geometry: Geometry

    @classmethod
    def of(cls, logits: NDArray[np.float32], placed: Placed, geometry: Geometry) -> LogitMaps:
        """Keep logits with the sizes of their picture, without its pixels."""
        return cls(logits, placed.unpadded_size, placed.original_size, geometry)

    @cached_property
    def at_original_size(self) -> NDArray[np.float32]:
        """(N, H, W) float32 logits, computed when they are first asked for."""
        return resize_logits(self.logits, self, self.geometry)
