"""The outlines: which points of the plane a shape covers.

Every shape is centered on its center of mass and has the area of the unit circle, so that "large"
means the same for a star and a square. y points down. Points are given as a row of x and a column
of y, and polygons are turned by their corners: most of the arithmetic stays one-dimensional.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Corners: TypeAlias = tuple[tuple[float, float], ...]
Turn: TypeAlias = tuple[float, float]
"""Cosine and sine of an angle, clockwise on the screen."""

UPRIGHT: Turn = (1.0, 0.0)

_POLYGONS: dict[str, Corners] = {
    "square": ((-1, -1), (1, -1), (1, 1), (-1, 1)),
    "triangle": ((0, -1), (0.866, 0.5), (-0.866, 0.5)),
    "diamond": ((0, -1), (0.68, 0), (0, 1), (-0.68, 0)),
    "hexagon": ((1, 0), (0.5, 0.866), (-0.5, 0.866), (-1, 0), (-0.5, -0.866), (0.5, -0.866)),
    # Ten corners in turn on the unit circle and on one of radius 0.52.
    "star": (
        (0, -1),
        (0.306, -0.421),
        (0.951, -0.309),
        (0.495, 0.161),
        (0.588, 0.809),
        (0, 0.52),
        (-0.588, 0.809),
        (-0.495, 0.161),
        (-0.951, -0.309),
        (-0.306, -0.421),
    ),
    "cross": (
        (-0.36, -1),
        (0.36, -1),
        (0.36, -0.36),
        (1, -0.36),
        (1, 0.36),
        (0.36, 0.36),
        (0.36, 1),
        (-0.36, 1),
        (-0.36, 0.36),
        (-1, 0.36),
        (-1, -0.36),
        (-0.36, -0.36),
    ),
}
_HEART_TIP: Corners = ((0, -0.5), (0.707, 0.207), (0, 0.914), (-0.707, 0.207))
_HEART_LOBES = ((0.3535, -0.1465, 0.5), (-0.3535, -0.1465, 0.5))
_RING_HOLE = (0.0, 0.0, 0.55)
_CRESCENT_BITE = (0.52, -0.16, 0.8)
_UNIT_DISC = (0.0, 0.0, 1.0)

_MEASURING_STEPS = 500
"""Steps along the unit length of the grid on which outlines are measured."""


def _in_disc(
    x: NDArray[np.float32], y: NDArray[np.float32], disc: tuple[float, float, float], turn: Turn
) -> NDArray[np.bool_]:
    center_x, center_y = _turned((disc[:2],), turn)[0]
    inside: NDArray[np.bool_] = (x - center_x) ** 2 + (y - center_y) ** 2 < disc[2] ** 2
    return inside


def _in_polygon(
    x: NDArray[np.float32], y: NDArray[np.float32], corners: Corners, turn: Turn
) -> NDArray[np.bool_]:
    """Count, for each point, the edges to its right; inside, their number is odd."""
    inside = np.zeros((y.shape[0], x.shape[1]), dtype=np.bool_)
    turned = _turned(corners, turn)
    for (x0, y0), (x1, y1) in zip(turned, (*turned[1:], turned[0]), strict=True):
        if y0 == y1:
            continue
        is_level = (y0 > y) != (y1 > y)
        crossing = x0 + (y - y0) * ((x1 - x0) / (y1 - y0))
        inside ^= is_level & (x < crossing)
    return inside


def _turned(points: Corners, turn: Turn) -> Corners:
    cosine, sine = turn
    return tuple((cosine * x - sine * y, sine * x + cosine * y) for x, y in points)


def _covers_unscaled(
    shape: str, x: NDArray[np.float32], y: NDArray[np.float32], turn: Turn
) -> NDArray[np.bool_]:
    if shape in _POLYGONS:
        return _in_polygon(x, y, _POLYGONS[shape], turn)
    if shape == "heart":
        left, right = (_in_disc(x, y, lobe, turn) for lobe in _HEART_LOBES)
        return _in_polygon(x, y, _HEART_TIP, turn) | left | right
    inside = _in_disc(x, y, _UNIT_DISC, turn)
    if shape == "ring":
        return inside & ~_in_disc(x, y, _RING_HOLE, turn)
    if shape == "crescent":
        return inside & ~_in_disc(x, y, _CRESCENT_BITE, turn)
    assert shape == "circle", f"no outline for {shape!r}"
    return inside


@dataclass(frozen=True)
class Measures:
    """What normalizes an outline.

    Attributes:
        scale: factor that gives it the area of the unit circle.
        center: its center of mass before scaling.
        reach: greatest distance from the center of mass after scaling.
    """

    scale: float
    center: tuple[float, float]
    reach: float


@cache
def measures(shape: str) -> Measures:
    """Measure an outline by counting points of a fine grid, in integers, exact everywhere."""
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
    shape: str, x: NDArray[np.float32], y: NDArray[np.float32], turn: Turn = UPRIGHT
) -> NDArray[np.bool_]:
    """Say which points a shape of radius 1 around the origin covers.

    Args:
        shape: one of ``vocabulary.FULL_SHAPES``.
        x: (1, W) float32.
        y: (H, 1) float32, downwards.
        turn: cosine and sine of the angle by which the shape is turned.

    Returns:
        (H, W) bool.
    """
    measured = measures(shape)
    center_x, center_y = _turned((measured.center,), turn)[0]
    x_unscaled = x / measured.scale + np.float32(center_x)
    y_unscaled = y / measured.scale + np.float32(center_y)
    return _covers_unscaled(shape, x_unscaled, y_unscaled, turn)
