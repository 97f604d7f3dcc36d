"""Layout of a scene: objects, their positions, and the instance map of their visible parts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coprs_deploy.data.synthetic import shapes, vocabulary
from coprs_deploy.data.synthetic.presets import Preset
from coprs_deploy.data.synthetic.rng import PortableRng

SAMPLES_PER_SIDE = 3
"""Samples along one side of a pixel; an odd number, so that no pixel is half covered."""

CELL_MARGIN = 0.1
"""Share of a grid cell along its border without object centers, so that locations are clear."""

OBJECT_TRIES = 3
"""Objects tried before the scene counts as full."""

POSITION_TRIES = 30
"""Positions tried for one object."""

GAP_PX = 1.5
"""Pixels between objects that do not overlap, and between any object and the image's border."""

MIN_CENTER_DISTANCE = 0.75
"""Minimum distance of two centers relative to the sum of their radii."""


@dataclass(frozen=True)
class ObjectAttributes:
    """Attributes of one object, hidden parts included.

    Attributes:
        shape: name of the shape, as in "circle".
        color: name of the color, as in "red".
        texture: name of the texture, as in "striped".
        size: "small", "medium" or "large".
        center: x and y in pixels of the center of mass.
        radius: radius in pixels of a circle of the same area.
    """

    shape: str
    color: str
    texture: str
    size: str
    center: tuple[float, float]
    radius: float


@dataclass(frozen=True)
class ObjectSpec(ObjectAttributes):
    """An object before rendering; ``rotation`` is the cosine and sine of its angle."""

    rotation: shapes.Rotation

    @property
    def reach(self) -> float:
        """Distance in pixels from the center to the farthest point of the outline."""
        return self.radius * shapes.measures(self.shape).reach


@dataclass(frozen=True)
class Footprint:
    """Pixels that an object covers, in the window around it.

    Attributes:
        rows: rows of the image.
        columns: columns of the image.
        x: (1, 3w) float32, samples in pixels from the center.
        y: (3h, 1) float32.
        inside: (3h, 3w) bool, samples inside the outline.
        coverage: (h, w) uint8, number of a pixel's nine samples that are inside.
    """

    rows: slice
    columns: slice
    x: NDArray[np.float32]
    y: NDArray[np.float32]
    inside: NDArray[np.bool_]
    coverage: NDArray[np.uint8]

    @property
    def mask(self) -> NDArray[np.bool_]:
        """(h, w) bool: pixels that are more than half covered."""
        return self.coverage > SAMPLES_PER_SIDE**2 // 2


@dataclass(frozen=True)
class Layout:
    """Objects in drawing order: later ones cover earlier ones.

    Attributes:
        specs: attributes of each object.
        footprints: pixels of each object.
        instance_map: (H, W) uint8; 0 is background, n is the visible part of ``specs[n - 1]``.
    """

    specs: list[ObjectSpec]
    footprints: list[Footprint]
    instance_map: NDArray[np.uint8]


def make_layout(preset: Preset, rng: PortableRng) -> Layout:
    """Place objects one by one; fewer than drawn if no room is left."""
    layout = Layout([], [], np.zeros((preset.image_size, preset.image_size), dtype=np.uint8))
    for _ in range(rng.integer(*preset.num_objects)):
        if not any(_add_object(layout, preset, rng) for _ in range(OBJECT_TRIES)):
            break
    return layout


def cell_of(center: tuple[float, float], image_size: int) -> tuple[int, int]:
    """Return the row and column, from 1, of the grid cell of a point (x, y)."""
    cell = image_size / vocabulary.GRID_SIZE
    return int(center[1] / cell) + 1, int(center[0] / cell) + 1


def sum_samples(samples: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Sum the samples of each pixel: (3h, 3w) zeros and ones to (h, w)."""
    n = SAMPLES_PER_SIDE
    columns = sum((samples[:, i::n] for i in range(1, n)), samples[:, ::n])
    total: NDArray[np.uint8] = sum((columns[i::n] for i in range(1, n)), columns[::n])
    return total


def _add_object(layout: Layout, preset: Preset, rng: PortableRng) -> bool:
    """Draw an object and add it to the layout; return False if no position is free."""
    shape, color, texture = _draw_attributes(layout, preset, rng)
    size = rng.choice(vocabulary.SIZES)
    radius = preset.image_size * rng.uniform(*preset.radii[vocabulary.SIZES.index(size)])
    rotation = _draw_rotation(preset, rng)
    for _ in range(POSITION_TRIES):
        reach = radius * shapes.measures(shape).reach
        center = _draw_center(layout, radius, reach, preset, rng)
        spec = ObjectSpec(shape, color, texture, size, center, radius, rotation)
        if not _is_free(spec, layout, preset):
            continue
        footprint = _rasterize(spec, preset.image_size)
        share = preset.min_visible_share
        if share == 1 or _leaves_enough(footprint, layout, share):
            layout.specs.append(spec)
            layout.footprints.append(footprint)
            window = layout.instance_map[footprint.rows, footprint.columns]
            window[footprint.mask] = len(layout.specs)
            return True
    return False


def _draw_attributes(layout: Layout, preset: Preset, rng: PortableRng) -> tuple[str, str, str]:
    shape, color = rng.choice(preset.shapes), rng.choice(list(vocabulary.COLORS))
    # Half of all objects have the first texture, so that the others are distinctive.
    is_plain = rng.chance(0.5)
    texture = preset.textures[0] if is_plain else rng.choice(preset.textures[1:] or preset.textures)
    if layout.specs and rng.chance(preset.attribute_reuse):
        earlier = rng.choice(layout.specs)
        if rng.chance(0.7):
            shape = earlier.shape
        if rng.chance(0.55):
            color = earlier.color
        if rng.chance(0.4):
            texture = earlier.texture
    return shape, color, texture


def _draw_rotation(preset: Preset, rng: PortableRng) -> shapes.Rotation:
    tangent = rng.uniform(-preset.max_rotation, preset.max_rotation)
    length = 1 + tangent * tangent
    return (1 - tangent * tangent) / length, 2 * tangent / length


def _draw_center(
    layout: Layout, radius: float, reach: float, preset: Preset, rng: PortableRng
) -> tuple[float, float]:
    low, high = reach + GAP_PX, preset.image_size - reach - GAP_PX
    if layout.specs and rng.chance(preset.overlap_probability):
        neighbor = rng.choice(layout.specs)
        x, y = rng.direction()
        distance = (neighbor.radius + radius) * rng.uniform(MIN_CENTER_DISTANCE, 1.1)
        center_x, center_y = neighbor.center[0] + x * distance, neighbor.center[1] + y * distance
        return min(max(center_x, low), high), min(max(center_y, low), high)
    return rng.uniform(low, high), rng.uniform(low, high)


def _is_free(spec: ObjectSpec, layout: Layout, preset: Preset) -> bool:
    """Check grid cell, distance and color against the objects of the layout."""
    cell = preset.image_size / vocabulary.GRID_SIZE
    for value in spec.center:
        if not CELL_MARGIN <= value / cell % 1 <= 1 - CELL_MARGIN:
            return False
    location = cell_of(spec.center, preset.image_size)
    for other in layout.specs:
        x, y = spec.center[0] - other.center[0], spec.center[1] - other.center[1]
        squared = x * x + y * y
        if cell_of(other.center, preset.image_size) == location:
            return False
        if squared >= (spec.reach + other.reach + GAP_PX) ** 2:
            continue
        # Touching objects differ in color, so that every outline is visible.
        if preset.min_visible_share == 1 or spec.color == other.color:
            return False
        if squared < (MIN_CENTER_DISTANCE * (spec.radius + other.radius)) ** 2:
            return False
    return True


def _rasterize(spec: ObjectSpec, image_size: int) -> Footprint:
    columns, x = _samples(spec.center[0], spec.reach, image_size)
    rows, y = _samples(spec.center[1], spec.reach, image_size)
    x, y = x[None], y[:, None]
    inside = shapes.covers(spec.shape, x / spec.radius, y / spec.radius, spec.rotation)
    return Footprint(rows, columns, x, y, inside, sum_samples(inside.view(np.uint8)))


def _samples(center: float, reach: float, image_size: int) -> tuple[slice, NDArray[np.float32]]:
    """Return the pixel range of a window axis and the distances of its samples to the center."""
    first, last = max(0, int(center - reach) - 1), min(image_size, int(center + reach) + 2)
    number = np.arange(first * SAMPLES_PER_SIDE, last * SAMPLES_PER_SIDE)
    samples = (number + 0.5) / SAMPLES_PER_SIDE - center
    return slice(first, last), samples.astype(np.float32)


def _leaves_enough(footprint: Footprint, layout: Layout, min_visible_share: float) -> bool:
    window = layout.instance_map[footprint.rows, footprint.columns]
    hidden = np.bincount(window[footprint.mask], minlength=len(layout.footprints) + 1)
    for number, earlier in enumerate(layout.footprints, start=1):
        if not hidden[number]:
            continue
        seen = layout.instance_map[earlier.rows, earlier.columns] == number
        left = np.count_nonzero(seen) - hidden[number]
        if left < min_visible_share * np.count_nonzero(earlier.mask):
            return False
    return True
