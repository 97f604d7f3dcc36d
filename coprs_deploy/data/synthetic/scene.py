"""A scene: a picture, who owns each pixel, and a table of its objects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coprs_deploy.data.synthetic.layout import Layout, cell_of, lay_out
from coprs_deploy.data.synthetic.presets import Preset
from coprs_deploy.data.synthetic.rendering import paint
from coprs_deploy.data.synthetic.rng import Draws
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


def make_scene(tier: Preset, seed: int) -> Scene:
    """Draw the scene of a seed: the same pixels on every machine.

    Args:
        tier: the world that it comes from.
        seed: any integer.

    Returns:
        The picture with its truth; it holds at least one object.
    """
    layout = lay_out(tier, Draws(f"{tier.name} layout", seed))
    image = paint(layout, tier, Draws(f"{tier.name} paint", seed))
    numbered = [
        (_describe(layout, number, tier.image_size), number)
        for number in range(1, len(layout.sketches) + 1)
    ]
    numbered.sort(key=lambda pair: (pair[0].row, pair[0].column))
    new_numbers = np.zeros(len(numbered) + 1, dtype=np.uint8)
    for position, (_, number) in enumerate(numbered, start=1):
        new_numbers[number] = position
    return Scene(image, new_numbers[layout.owners], tuple(item for item, _ in numbered))


def _describe(layout: Layout, number: int, image_size: int) -> SceneObject:
    sketch, stamp = layout.sketches[number - 1], layout.stamps[number - 1]
    visible = layout.owners[stamp.rows, stamp.columns] == number
    rows, columns = np.flatnonzero(visible.any(axis=1)), np.flatnonzero(visible.any(axis=0))
    top, left = stamp.rows.start, stamp.columns.start
    row, column = cell_of(sketch.center, image_size)
    return SceneObject(
        shape=sketch.shape,
        color=sketch.color,
        texture=sketch.texture,
        size=sketch.size,
        center=sketch.center,
        radius=sketch.radius,
        row=row,
        column=column,
        box=(
            int(left + columns[0]),
            int(top + rows[0]),
            int(left + columns[-1] + 1),
            int(top + rows[-1] + 1),
        ),
        visible_share=float(np.count_nonzero(visible) / np.count_nonzero(stamp.mask)),
    )
