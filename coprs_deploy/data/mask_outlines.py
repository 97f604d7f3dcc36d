"""COCO polygons of a mask: outlines along the edges of its pixels.

pycocotools fills them to exactly the mask; :func:`coprs_deploy.data.rle.decode_mask` reads them. A
COCO polygon has no holes: a mask that has some is cut into parts without, at the top row of each
hole. (:mod:`coprs_deploy.data.polygon_tracing` is for readers that fill as OpenCV does.)
"""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

_STEPS = np.array([(1, 0), (0, 1), (-1, 0), (0, -1)])
"""Steps (x, y) along an edge: right, down, left, up. The mask is at their right-hand side."""


def polygons_from_mask(mask: NDArray[np.bool_]) -> list[list[int]]:
    """Return the polygons of a mask (H, W).

    Returns:
        ``[x1, y1, x2, y2, ...]`` in pixels, clockwise, without repeating the first point; x and y
        are those of pixel edges, 0 to W and 0 to H. None for an empty mask.
    """
    rows = np.flatnonzero(mask.any(axis=1))
    if not len(rows):
        return []
    columns = np.flatnonzero(mask.any(axis=0))
    top, left = int(rows[0]), int(columns[0])
    inside = mask[top : rows[-1] + 1, left : columns[-1] + 1]
    outlines = _outlines(inside)
    if holes := {int(each[:, 1].min()) for each in outlines if _area(each) < 0}:
        cuts = [0, *sorted(holes), len(inside)]
        outlines = [
            np.add(outline, (0, first))
            for first, end in itertools.pairwise(cuts)
            for outline in _outlines(inside[first:end])
        ]
    return [np.add(outline, (left, top)).ravel().tolist() for outline in outlines]


def _outlines(mask: NDArray[np.bool_]) -> list[NDArray[np.int64]]:
    """Return the corners (K, 2) of each outline, clockwise around the mask, else around a hole."""
    starts, directions = _edges(mask)
    following = _following(starts, directions, mask.shape[1] + 1)
    left = np.ones(len(starts), dtype=np.bool_)
    found = []
    for first in range(len(starts)):
        if not left[first]:
            continue
        ring, edge = [first], following[first]
        while edge != first:
            ring.append(edge)
            edge = following[edge]
        left[ring] = False
        turns = directions[ring] != np.roll(directions[ring], 1)
        found.append(starts[ring][turns])
    return found


def _edges(mask: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return start (x, y) and direction of each pixel edge between the mask and the rest."""
    padded = np.pad(mask, 1)
    neighbors = (padded[:-2, 1:-1], padded[1:-1, 2:], padded[2:, 1:-1], padded[1:-1, :-2])
    corners = ((0, 0), (1, 0), (1, 1), (0, 1))
    starts, directions = [], []
    for direction, (neighbor, corner) in enumerate(zip(neighbors, corners, strict=True)):
        y, x = np.nonzero(mask & ~neighbor)
        starts.append(np.stack([x, y], axis=1) + corner)
        directions.append(np.full(len(x), direction))
    return np.concatenate(starts), np.concatenate(directions)


def _following(
    starts: NDArray[np.int64], directions: NDArray[np.int64], num_columns: int
) -> list[int]:
    """Return the edge after each edge: to the right, so that pixels that touch at a corner part."""

    def keys(points: NDArray[np.int64], towards: NDArray[np.int64]) -> NDArray[np.int64]:
        return 4 * (points[:, 1] * num_columns + points[:, 0]) + towards

    order = np.argsort(known := keys(starts, directions))
    known, ends = known[order], starts + _STEPS[directions]
    following = np.full(len(starts), -1)
    for turn in (3, 0, 1):  # the last one that exists
        wanted = keys(ends, (directions + turn) % 4)
        place = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
        following = np.where(known[place] == wanted, order[place], following)
    assert (following >= 0).all(), "outlines are closed"
    indices: list[int] = following.tolist()
    return indices


def _area(corners: NDArray[np.int64]) -> float:
    """Return the signed area of an outline; negative for a hole."""
    x, y = corners.T
    return float(np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y)) / 2
