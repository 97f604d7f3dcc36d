"""Scenes: an image, its instance map and a table of its objects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from coprs_deploy.data.synthetic.layout import Layout, ObjectAttributes, cell_of, make_layout
from coprs_deploy.data.synthetic.presets import Preset
from coprs_deploy.data.synthetic.rendering import render
from coprs_deploy.data.synthetic.rng import PortableRng
from coprs_deploy.images import RgbArray


@dataclass(frozen=True)
class SceneObject(ObjectAttributes):
    """One object of a scene.

    Attributes:
        row: row of the grid cell of the center, 1..8.
        column: column of the grid cell of the center, 1..8.
        box: left, top, right, bottom of the visible pixels; right and bottom are exclusive.
        visible_share: visible pixels over all pixels of the object.
    """

    row: int
    column: int
    box: tuple[int, int, int, int]
    visible_share: float

    @property
    def location(self) -> str:
        """Grid cell of the center, as in ``row3 col5``."""
        return f"row{self.row} col{self.column}"

    @property
    def name(self) -> str:
        """All attributes, as in ``large striped red circle``."""
        return f"{self.size} {self.texture} {self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """An image with its ground truth.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        instance_map: (H, W) uint8; 0 is background, n is the visible part of ``objects[n - 1]``.
        objects: the objects in reading order (row, then column), each at its own location.
    """

    image: RgbArray
    instance_map: NDArray[np.uint8]
    objects: tuple[SceneObject, ...]

    def masks(self, targets: Sequence[int]) -> NDArray[np.bool_]:
        """Return the visible pixels of N objects, (N, H, W) bool; N may be 0."""
        numbers = np.asarray(targets, dtype=np.int64).reshape(-1, 1, 1) + 1
        masks: NDArray[np.bool_] = self.instance_map == numbers
        return masks


def make_scene(preset: Preset, seed: int) -> Scene:
    """Generate the scene of a seed, with at least one object: the same pixels on every machine."""
    layout = make_layout(preset, PortableRng(f"{preset.name} layout", seed))
    image = render(layout, preset, PortableRng(f"{preset.name} paint", seed))
    items = [_describe(layout, n, preset.image_size) for n in range(1, len(layout.specs) + 1)]
    order = sorted(range(len(items)), key=lambda i: (items[i].row, items[i].column))
    numbers = np.zeros(len(items) + 1, dtype=np.uint8)
    numbers[np.array(order) + 1] = np.arange(len(items)) + 1
    return Scene(image, numbers[layout.instance_map], tuple(items[i] for i in order))


def _describe(layout: Layout, number: int, image_size: int) -> SceneObject:
    spec, footprint = layout.specs[number - 1], layout.footprints[number - 1]
    visible = layout.instance_map[footprint.rows, footprint.columns] == number
    rows, columns = (np.flatnonzero(visible.any(axis)).tolist() for axis in (1, 0))
    top, left = footprint.rows.start, footprint.columns.start
    row, column = cell_of(spec.center, image_size)
    attributes = {field.name: getattr(spec, field.name) for field in fields(ObjectAttributes)}
    return SceneObject(
        **attributes,
        row=row,
        column=column,
        box=(left + columns[0], top + rows[0], left + columns[-1] + 1, top + rows[-1] + 1),
        visible_share=float(np.count_nonzero(visible) / np.count_nonzero(footprint.mask)),
    )
