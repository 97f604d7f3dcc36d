"""Polygons of a mask that cover exactly its pixels when they are filled as OpenCV fills them.

The reverse of :func:`coprs_deploy.data.readers.polygon_fill.fill_polygon`. A polygon runs through
the centers of the pixels on the border of a region, so that its outline and its fill are the
region. A polygon has no holes: a region that has one is cut into parts without.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from coprs_deploy.data.readers.polygon_fill import Point, fill_polygon

_CLOCKWISE = ((1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1))
"""Steps (x, y) to the eight neighbors of a pixel, from the right one."""

_LEFT = 4


def trace_mask(mask: NDArray[np.bool_]) -> list[list[Point]]:
    """Trace a mask (H, W).

    Returns:
        Polygons of at least one point (x, y); the union of what ``fill_polygon`` covers is the
        mask. None for an empty mask.
    """
    height, width = mask.shape
    polygons: list[list[Point]] = []
    left = mask.copy()
    while left.any():
        outline = _trace_border(left)
        covered = fill_polygon(outline, height, width)
        if (covered & ~mask).any():
            for half in _halves(left & covered):
                polygons += trace_mask(half)
        else:
            polygons.append(_corners(outline))
        left &= ~covered
    return polygons


def _trace_border(mask: NDArray[np.bool_]) -> list[Point]:
    """Return the outer border of the first region (8-connected), clockwise, pixel by pixel."""
    pixels = np.pad(mask, 1)
    first = int(np.argmax(pixels))
    y, x = divmod(first, pixels.shape[1])
    start, border, outside = (x, y), list[Point](), _LEFT
    step: int | None
    first_step = None
    while True:
        around = ((outside + turn) % 8 for turn in range(1, 9))
        step = next((d for d in around if pixels[y + _CLOCKWISE[d][1], x + _CLOCKWISE[d][0]]), None)
        if step is None:
            return [(x - 1, y - 1)]
        if (x, y) == start:
            if step == first_step:  # the same pixel may be passed several times
                return border
            first_step = step if first_step is None else first_step
        border.append((x - 1, y - 1))
        x, y = x + _CLOCKWISE[step][0], y + _CLOCKWISE[step][1]
        # The neighbor that was looked at last is outside; it also touches the next pixel.
        before, now = _CLOCKWISE[step - 1], _CLOCKWISE[step]
        outside = _CLOCKWISE.index((before[0] - now[0], before[1] - now[1]))


def _corners(border: list[Point]) -> list[Point]:
    """Leave out the pixels between two equal steps."""
    count = len(border)
    steps = [
        (border[(i + 1) % count][0] - border[i][0], border[(i + 1) % count][1] - border[i][1])
        for i in range(count)
    ]
    kept = [point for i, point in enumerate(border) if steps[i - 1] != steps[i]]
    return kept or border[:1]


def _halves(mask: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
    """Cut a mask in the middle of the longer side of its box."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    halves = [mask.copy(), mask.copy()]
    if np.ptp(rows) >= np.ptp(columns):
        middle = int(rows[0] + rows[-1] + 1) // 2
        halves[0][middle:], halves[1][:middle] = False, False
    else:
        middle = int(columns[0] + columns[-1] + 1) // 2
        halves[0][:, middle:], halves[1][:, :middle] = False, False
    return halves
