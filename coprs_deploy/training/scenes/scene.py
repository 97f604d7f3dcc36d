"""A scene: a picture, who owns each pixel, and a table of its objects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coprs_deploy.images import RgbArray


@dataclass(frozen=True)
class SceneObject:
    """One row of the table.

    Attributes:
        shape: word, as in "circle".
        color: word, as in "red".
        texture: word, as in "striped".
        size: "small", "medium" or "large".
        center: x and y in pixels of the whole shape's center of mass, hidden parts included.
        radius: pixels; that of a circle of the whole shape's area.
        row: 1..8, row of the grid cell that holds the center.
        column: 1..8.
        box: left, top, right, bottom of the visible pixels; right and bottom lie outside.
        visible_share: visible pixels over all pixels of the shape.
    """

    shape: str
    color: str
    texture: str
    size: str
    center: tuple[float, float]
    radius: float
    row: int
    column: int
    box: tuple[int, int, int, int]
    visible_share: float

    @property
    def place(self) -> str:
        """The grid cell in words, as in ``row3 col5``."""
        return f"row{self.row} col{self.column}"

    @property
    def name(self) -> str:
        """All attributes in words, as in ``large striped red circle``."""
        return f"{self.size} {self.texture} {self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """A picture with its truth.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        owners: (H, W) uint8; 0 is background, n the pixel of ``objects[n - 1]`` that is seen there.
        objects: in reading order (row, then column); no two have the same place.
    """

    image: RgbArray
    owners: NDArray[np.uint8]
    objects: tuple[SceneObject, ...]

    def masks(self, targets: Sequence[int]) -> NDArray[np.bool_]:
        """Return the visible pixels of some objects.

        Args:
            targets: indices into ``objects``.

        Returns:
            (N, H, W) bool, N may be 0.
        """
        numbers = np.asarray(targets, dtype=np.int64).reshape(-1, 1, 1) + 1
        masks: NDArray[np.bool_] = self.owners == numbers
        return masks
