"""Polygons filled as OpenCV fills them: ``fillPoly`` with its outline, to the pixel.

The masks of ReasonSeg are defined by the pixels that OpenCV draws. Its two algorithms are simple:
a line of Bresenham for each side, and for each row the pixels between pairs of sides, in 16-bit
fixed point, from the first whole pixel to the last. Both are written here for whole arrays, so that
the masks need no OpenCV. Tests compare them with masks that OpenCV drew, and with OpenCV itself
where it is installed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_SHIFT = 16
_ALMOST_ONE = (1 << _SHIFT) - 1

Point = tuple[int, int]


def fill_polygon(
    points: Sequence[tuple[float, float]], height: int, width: int
) -> NDArray[np.bool_]:
    """Fill a closed polygon, its outline included, which is one pixel wide.

    Args:
        points: x and y of at least one point, in pixels, also outside of the image; fractions are
            cut off.
        height: height of the image in pixels.
        width: width of the image in pixels.

    Returns:
        (height, width) bool.
    """
    whole = [(int(x), int(y)) for x, y in points]
    mask = np.zeros((height, width), dtype=np.bool_)
    rows: list[NDArray[np.int64]] = []
    crossings: list[NDArray[np.int64]] = []
    for start, end in zip([whole[-1], *whole[:-1]], whole, strict=True):
        is_inside, clipped_start, clipped_end = _clip(start, end, height, width)
        if is_inside:
            _draw_line(mask, clipped_start, clipped_end)
        if start[1] != end[1]:
            at, x = _cross(start, end, clipped_start, clipped_end, height)
            rows.append(at)
            crossings.append(x)
    if rows:
        mask |= _between(np.concatenate(rows), np.concatenate(crossings), height, width)
    return mask


def _cross(
    start: Point, end: Point, clipped_start: Point, clipped_end: Point, height: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the rows of the image that a side crosses, and x there in fixed point.

    A side crosses the row of its upper end, and not that of its lower end.

    The slope is that of the clipped side, or of the unclipped rows if clipping leaves only one.
    """
    x0, x1 = clipped_start[0] << _SHIFT, clipped_end[0] << _SHIFT
    y0, y1 = clipped_start[1], clipped_end[1]
    if y0 == y1:
        y0, y1 = start[1], end[1]
    slope = _quotient(x1 - x0, y1 - y0)
    upper, lower = sorted((start[1], end[1]))
    at = np.arange(max(upper, 0), min(lower, height), dtype=np.int64)
    origin_x, origin_y = (x0, y0) if start[1] < end[1] else (x1, y1)
    return at, origin_x + (at - origin_y) * slope


def _between(
    rows: NDArray[np.int64], crossings: NDArray[np.int64], height: int, width: int
) -> NDArray[np.bool_]:
    """Fill each row between the first and second crossing, the third and fourth, and so on."""
    order = np.lexsort((crossings, rows))
    rows, crossings = rows[order][::2], crossings[order]
    first, last = (crossings[::2] + _ALMOST_ONE) >> _SHIFT, crossings[1::2] >> _SHIFT
    is_seen = (first < width) & (last >= 0) & (first <= last)
    rows, first, last = rows[is_seen], first[is_seen], last[is_seen]
    changes = np.zeros((height, width + 1), dtype=np.int32)
    np.add.at(changes, (rows, np.maximum(first, 0)), 1)
    np.add.at(changes, (rows, np.minimum(last, width - 1) + 1), -1)
    filled: NDArray[np.bool_] = np.cumsum(changes, axis=1, dtype=np.int32)[:, :-1] > 0
    return filled


def _draw_line(mask: NDArray[np.bool_], start: Point, end: Point) -> None:
    """Draw a line from left to right, as Bresenham does."""
    if end[0] < start[0]:
        start, end = end, start
    (x, y), width, height = start, end[0] - start[0], end[1] - start[1]
    step_y = 1 if height >= 0 else -1
    height = abs(height)
    long, short = max(width, height), min(width, height)
    along = np.arange(long + 1)
    across = (2 * short * along + long - 1) // (2 * long) if long else along
    if height > width:
        mask[y + step_y * along, x + across] = True
    else:
        mask[y + step_y * across, x + along] = True


def _clip(start: Point, end: Point, height: int, width: int) -> tuple[bool, Point, Point]:
    """Clip a line to the image as OpenCV's ``clipLine``; whether a part of it is inside.

    The ends are also moved if no part is inside.
    """
    (x1, y1), (x2, y2) = start, end
    right, bottom = width - 1, height - 1

    def code(x: int, y: int) -> int:
        return (x < 0) + 2 * (x > right) + 4 * (y < 0) + 8 * (y > bottom)

    code1, code2 = code(x1, y1), code(x2, y2)
    if not code1 & code2 and code1 | code2:
        if code1 & 12:
            edge = 0 if code1 < 8 else bottom
            x1 += int((edge - y1) * (x2 - x1) / (y2 - y1))
            y1 = edge
            code1 = code(x1, edge)
        if code2 & 12:
            edge = 0 if code2 < 8 else bottom
            x2 += int((edge - y2) * (x2 - x1) / (y2 - y1))
            y2 = edge
            code2 = code(x2, edge)
        if not code1 & code2 and code1 | code2:
            if code1:
                edge = 0 if code1 == 1 else right
                y1 += int((edge - x1) * (y2 - y1) / (x2 - x1))
                x1, code1 = edge, 0
            if code2:
                edge = 0 if code2 == 1 else right
                y2 += int((edge - x2) * (y2 - y1) / (x2 - x1))
                x2, code2 = edge, 0
    return not code1 | code2, (x1, y1), (x2, y2)


def _quotient(numerator: int, denominator: int) -> int:
    """Divide and round toward zero, as C does."""
    quotient = abs(numerator) // abs(denominator)
    return quotient if (numerator < 0) == (denominator < 0) else -quotient
