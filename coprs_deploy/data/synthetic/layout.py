"""The layout of a scene: which objects there are, where, and what of each stays visible."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coprs_deploy.data.synthetic import shapes, vocabulary
from coprs_deploy.data.synthetic.presets import Preset
from coprs_deploy.data.synthetic.rng import Draws

SAMPLES_PER_SIDE = 3
"""Samples along one side of a pixel; their number is odd, so no pixel is covered by one half."""

CELL_MARGIN = 0.1
"""Share of a grid cell along its border that holds no center, so that every place is clear."""

OBJECT_TRIES = 3
"""Objects drawn before the scene is taken to be full."""

PLACING_TRIES = 30
"""Positions tried for one object."""

GAP_PX = 1.5
"""Pixels between objects that do not overlap, and between any object and the image's border."""

CLOSEST_CENTERS = 0.75
"""Least distance of two centers over the sum of their radii."""


@dataclass(frozen=True)
class Sketch:
    """An object before it is painted.

    Attributes:
        shape: word.
        color: word.
        texture: word.
        size: word.
        center: x and y in pixels.
        radius: pixels.
        turn: cosine and sine of the angle by which it is turned.
    """

    shape: str
    color: str
    texture: str
    size: str
    center: tuple[float, float]
    radius: float
    turn: shapes.Turn

    @property
    def reach(self) -> float:
        """Pixels from the center to the farthest point of the outline."""
        return self.radius * shapes.measures(self.shape).reach


@dataclass(frozen=True)
class Stamp:
    """The pixels that a sketch covers, in the window around it.

    Attributes:
        rows: rows of the image.
        columns: columns of the image.
        x: (1, 3w) float32, samples in pixels from the center.
        y: (3h, 1) float32.
        inside: (3h, 3w) bool, samples inside the outline.
        coverage: (h, w) uint8, how many of a pixel's nine samples are inside.
    """

    rows: slice
    columns: slice
    x: NDArray[np.float32]
    y: NDArray[np.float32]
    inside: NDArray[np.bool_]
    coverage: NDArray[np.uint8]

    @property
    def mask(self) -> NDArray[np.bool_]:
        """(h, w) bool: pixels of which more than half is covered."""
        return self.coverage > SAMPLES_PER_SIDE**2 // 2


@dataclass(frozen=True)
class Layout:
    """Sketches in the order in which they are painted: later ones hide earlier ones.

    Attributes:
        sketches: the objects.
        stamps: their pixels.
        owners: (H, W) uint8; 0 is background, n is the visible part of ``sketches[n - 1]``.
    """

    sketches: list[Sketch]
    stamps: list[Stamp]
    owners: NDArray[np.uint8]


def lay_out(tier: Preset, draws: Draws) -> Layout:
    """Place objects one after the other, fewer than were drawn where no room is left."""
    layout = Layout([], [], np.zeros((tier.image_size, tier.image_size), dtype=np.uint8))
    for _ in range(draws.integer(*tier.num_objects)):
        if not any(_add_object(layout, tier, draws) for _ in range(OBJECT_TRIES)):
            break
    return layout


def cell_of(center: tuple[float, float], image_size: int) -> tuple[int, int]:
    """Return the row and column, from 1, of the grid cell that holds a point (x, y)."""
    cell = image_size / vocabulary.GRID_SIZE
    return int(center[1] / cell) + 1, int(center[0] / cell) + 1


def sum_samples(samples: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Count the samples of each pixel that are set: (3h, 3w) zeros and ones to (h, w)."""
    n = SAMPLES_PER_SIDE
    columns = sum((samples[:, i::n] for i in range(1, n)), samples[:, ::n])
    total: NDArray[np.uint8] = sum((columns[i::n] for i in range(1, n)), columns[::n])
    return total


def _add_object(layout: Layout, tier: Preset, draws: Draws) -> bool:
    """Draw an object and find room for it; say whether there was some."""
    shape, color, texture = _draw_attributes(layout, tier, draws)
    size = draws.choice(vocabulary.SIZES)
    radius = tier.image_size * draws.uniform(*tier.radii[vocabulary.SIZES.index(size)])
    turn = _draw_turn(tier, draws)
    for _ in range(PLACING_TRIES):
        reach = radius * shapes.measures(shape).reach
        center = _draw_center(layout, radius, reach, tier, draws)
        sketch = Sketch(shape, color, texture, size, center, radius, turn)
        if not _is_free(sketch, layout, tier):
            continue
        stamp = _stamp(sketch, tier.image_size)
        if tier.min_visible_share == 1 or _leaves_enough(stamp, layout, tier.min_visible_share):
            layout.sketches.append(sketch)
            layout.stamps.append(stamp)
            layout.owners[stamp.rows, stamp.columns][stamp.mask] = len(layout.sketches)
            return True
    return False


def _draw_attributes(layout: Layout, tier: Preset, draws: Draws) -> tuple[str, str, str]:
    shape, color = draws.choice(tier.shapes), draws.choice(list(vocabulary.COLORS))
    # Half of all objects are of the first texture: the others are easier to tell when rarer.
    is_plain = draws.chance(0.5)
    texture = tier.textures[0] if is_plain else draws.choice(tier.textures[1:] or tier.textures)
    if layout.sketches and draws.chance(tier.kinship):
        relative = draws.choice(layout.sketches)
        if draws.chance(0.7):
            shape = relative.shape
        if draws.chance(0.55):
            color = relative.color
        if draws.chance(0.4):
            texture = relative.texture
    return shape, color, texture


def _draw_turn(tier: Preset, draws: Draws) -> shapes.Turn:
    tangent = draws.uniform(-tier.max_turn, tier.max_turn)
    length = 1 + tangent * tangent
    return (1 - tangent * tangent) / length, 2 * tangent / length


def _draw_center(
    layout: Layout, radius: float, reach: float, tier: Preset, draws: Draws
) -> tuple[float, float]:
    low, high = reach + GAP_PX, tier.image_size - reach - GAP_PX
    if layout.sketches and draws.chance(tier.overlap):
        neighbor = draws.choice(layout.sketches)
        x, y = draws.direction()
        distance = (neighbor.radius + radius) * draws.uniform(CLOSEST_CENTERS, 1.1)
        center_x, center_y = neighbor.center[0] + x * distance, neighbor.center[1] + y * distance
        return min(max(center_x, low), high), min(max(center_y, low), high)
    return draws.uniform(low, high), draws.uniform(low, high)


def _is_free(sketch: Sketch, layout: Layout, tier: Preset) -> bool:
    """Check the grid cell, the distance and the color against everything placed before."""
    cell = tier.image_size / vocabulary.GRID_SIZE
    for value in sketch.center:
        if not CELL_MARGIN <= value / cell % 1 <= 1 - CELL_MARGIN:
            return False
    place = cell_of(sketch.center, tier.image_size)
    for other in layout.sketches:
        x, y = sketch.center[0] - other.center[0], sketch.center[1] - other.center[1]
        squared = x * x + y * y
        if cell_of(other.center, tier.image_size) == place:
            return False
        if squared >= (sketch.reach + other.reach + GAP_PX) ** 2:
            continue
        # What may touch differs in color, so that an outline is always seen.
        if tier.min_visible_share == 1 or sketch.color == other.color:
            return False
        if squared < (CLOSEST_CENTERS * (sketch.radius + other.radius)) ** 2:
            return False
    return True


def _stamp(sketch: Sketch, image_size: int) -> Stamp:
    columns, x = _samples(sketch.center[0], sketch.reach, image_size)
    rows, y = _samples(sketch.center[1], sketch.reach, image_size)
    x, y = x[None], y[:, None]
    inside = shapes.covers(sketch.shape, x / sketch.radius, y / sketch.radius, sketch.turn)
    return Stamp(rows, columns, x, y, inside, sum_samples(inside.view(np.uint8)))


def _samples(center: float, reach: float, image_size: int) -> tuple[slice, NDArray[np.float32]]:
    """Return the pixels of one side of the window, and their samples' distances to the center."""
    first, last = max(0, int(center - reach) - 1), min(image_size, int(center + reach) + 2)
    number = np.arange(first * SAMPLES_PER_SIDE, last * SAMPLES_PER_SIDE)
    samples = (number + 0.5) / SAMPLES_PER_SIDE - center
    return slice(first, last), samples.astype(np.float32)


def _leaves_enough(stamp: Stamp, layout: Layout, min_visible_share: float) -> bool:
    window = layout.owners[stamp.rows, stamp.columns]
    hidden = np.bincount(window[stamp.mask], minlength=len(layout.stamps) + 1)
    for number, earlier in enumerate(layout.stamps, start=1):
        if not hidden[number]:
            continue
        seen = layout.owners[earlier.rows, earlier.columns] == number
        left = np.count_nonzero(seen) - hidden[number]
        if left < min_visible_share * np.count_nonzero(earlier.mask):
            return False
    return True
