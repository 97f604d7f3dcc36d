"""Scenes from seeds."""

from __future__ import annotations

import numpy as np

from coprs_deploy.training.scenes.draws import Draws
from coprs_deploy.training.scenes.layout import Layout, cell_of, lay_out
from coprs_deploy.training.scenes.painting import paint
from coprs_deploy.training.scenes.scene import Scene, SceneObject
from coprs_deploy.training.scenes.tiers import Tier


def make_scene(tier: Tier, seed: int) -> Scene:
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
