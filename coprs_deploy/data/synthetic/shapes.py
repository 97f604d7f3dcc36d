"""Outlines of shapes as point-in-shape tests.

Every shape is centered on its center of mass and has the area of the unit circle, so that "large"
means the same for a star and a square. y points down. Points are given as a row of x and a column
of y, and polygons are rotated by their corners: most of the arithmetic stays one-dimensional.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Corners: TypeAlias = tuple[tuple[float, float], ...]
Rotation: TypeAlias = tuple[float, float]
"""Cosine and sine of an angle, clockwise on the screen."""

UPRIGHT: Rotation = (1.0, 0.0)

# fmt: off
_POLYGONS: dict[str, Corners] = {
    "square": ((-1, -1), (1, -1), (1, 1), (-1, 1)),
    "triangle": ((0, -1), (0.866, 0.5), (-0.866, 0.5)),
    "diamond": ((0, -1), (0.68, 0), (0, 1), (-0.68, 0)),
    "hexagon": ((1, 0), (0.5, 0.866), (-0.5, 0.866), (-1, 0), (-0.5, -0.866), (0.5, -0.866)),
    # Corners alternate between the unit circle and one of radius 0.52.
    "star": (
        (0, -1), (0.306, -0.421), (0.951, -0.309), (0.495, 0.161), (0.588, 0.809),
        (0, 0.52), (-0.588, 0.809), (-0.495, 0.161), (-0.951, -0.309), (-0.306, -0.421),
    ),
    "cross": (
        (-0.36, -1), (0.36, -1), (0.36, -0.36), (1, -0.36), (1, 0.36), (0.36, 0.36),
        (0.36, 1), (-0.36, 1), (-0.36, 0.36), (-1, 0.36), (-1, -0.36), (-0.36, -0.36),
    ),
}
# fmt: on
_HEART_TIP: Corners = ((0, -0.5), (0.707, 0.207), (0, 0.914), (-0.707, 0.207))
_HEART_LOBES = ((0.3535, -0.1465, 0.5), (-0.3535, -0.1465, 0.5))
_RING_HOLE = (0.0, 0.0, 0.55)
_CRESCENT_BITE = (0.52, -0.16, 0.8)
_UNIT_DISC = (0.0, 0.0, 1.0)

_MEASURING_STEPS = 500
"""Grid steps per unit length for measuring outlines."""


def _in_disc(
    x: NDArray[np.float32],
    y: NDArray[np.float32],
    disc: tuple[float, float, float],
    rotation: Rotation,
) -> NDArray[np.bool_]:
    center_x, center_y = _rotated((disc[:2],), rotation)[0]
    inside: NDArray[np.bool_] = (x - center_x) ** 2 + (y - center_y) ** 2 < disc[2] ** 2
    return inside


def _in_polygon(
    x: NDArray[np.float32], y: NDArray[np.float32], corners: Corners, rotation: Rotation
) -> NDArray[np.bool_]:
    """Count the edges to the right of each point; inside, their number is odd."""
    inside = np.zeros((y.shape[0], x.shape[1]), dtype=np.bool_)
    rotated = _rotated(corners, rotation)
    for (x0, y0), (x1, y1) in zip(rotated, (*rotated[1:], rotated[0]), strict=True):
        if y0 == y1:
            continue
        is_level = (y0 > y) != (y1 > y)
        crossing = x0 + (y - y0) * ((x1 - x0) / (y1 - y0))
        inside ^= is_level & (x < crossing)
    return inside


def _rotated(points: Corners, rotation: Rotation) -> Corners:
    cosine, sine = rotation
    return tuple((cosine * x - sine * y, sine * x + cosine * y) for x, y in points)


def _covers_unscaled(
    shape: str, x: NDArray[np.float32], y: NDArray[np.float32], rotation: Rotation
) -> NDArray[np.bool_]:
    if shape in _POLYGONS:
        return _in_polygon(x, y, _POLYGONS[shape], rotation)
    if shape == "heart":
        left, right = (_in_disc(x, y, lobe, rotation) for lobe in _HEART_LOBES)
        return _in_polygon(x, y, _HEART_TIP, rotation) | left | right
    inside = _in_disc(x, y, _UNIT_DISC, rotation)
    if shape == "ring":
        return inside & ~_in_disc(x, y, _RING_HOLE, rotation)
    if shape == "crescent":
        return inside & ~_in_disc(x, y, _CRESCENT_BITE, rotation)
    assert shape == "circle", f"no outline for {shape!r}"
    return inside


@dataclass(frozen=True)
class Measures:
    """Normalization of an outline.

    Attributes:
        scale: factor to the area of the unit circle.
        center: center of mass before scaling, x and y.
        reach: maximum distance from the center of mass after scaling.
    """

    scale: float
    center: tuple[float, float]
    reach: float


@cache
def measures(shape: str) -> Measures:
    """Measure an outline on a fine grid in integers, which is exact on every machine."""
    half = _MEASURING_STEPS * 3 // 2
    steps = np.arange(-half, half + 1)
    axis = (steps / _MEASURING_STEPS).astype(np.float32)
    rows, columns = np.nonzero(_covers_unscaled(shape, axis[None], axis[:, None], UPRIGHT))
    count = len(rows)
    center_row, center_column = round(rows.sum() / count), round(columns.sum() / count)
    farthest = int(((rows - center_row) ** 2 + (columns - center_column) ** 2).max())
    scale = math.sqrt(math.pi / count) * _MEASURING_STEPS
    center = ((center_column - half) / _MEASURING_STEPS, (center_row - half) / _MEASURING_STEPS)
    return Measures(scale, center, math.sqrt(farthest) / _MEASURING_STEPS * scale)


def covers(
    shape: str, x: NDArray[np.float32], y: NDArray[np.float32], rotation: Rotation = UPRIGHT
) -> NDArray[np.bool_]:
    """Test which points a shape of radius 1 around the origin covers.

    Args:
        shape: one of ``vocabulary.FULL_SHAPES``.
        x: (1, W) float32.
        y: (H, 1) float32, downwards.
        rotation: cosine and sine of the angle by which the shape is turned.

    Returns:
        (H, W) bool.
    """
    measured = measures(shape)
    center_x, center_y = _rotated((measured.center,), rotation)[0]
    x_unscaled = x / measured.scale + np.float32(center_x)
    y_unscaled = y / measured.scale + np.float32(center_y)
    return _covers_unscaled(shape, x_unscaled, y_unscaled, rotation)
