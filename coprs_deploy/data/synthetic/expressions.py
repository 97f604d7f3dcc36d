"""Referring expressions as data, and their resolution to objects.

An expression is a description of objects, narrowed down by relations to other expressions, then by
an extreme or a rank. It resolves to objects, or is unclear because two values are too close. Its
English is in :mod:`coprs_deploy.data.synthetic.wording`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise

from coprs_deploy.data.synthetic import vocabulary
from coprs_deploy.data.synthetic.scene import SceneObject

NEAREST = "nearest to"

CLEARLY_NOT_SHARE = 0.25
"""Share of the clear distance on the other side at which an object is clearly not "left of"."""

DIRECTIONS: dict[str, tuple[int, int]] = {
    "left of": (0, -1),
    "right of": (0, 1),
    "above": (1, -1),
    "below": (1, 1),
}
"""Relation to axis (0 is x) and sign of the object's position minus the anchor's."""

SIDES: dict[str, tuple[int, int]] = {
    "left": (0, 1),
    "right": (0, -1),
    "top": (1, 1),
    "bottom": (1, -1),
}
"""Side from which a rank counts to axis and sign of the count."""

EXTREMES = {f"{side}most": direction for side, direction in SIDES.items()}
"""Extreme of position to axis and sign; the extreme has the smallest signed value."""

SIZE_EXTREMES: dict[str, int] = {"largest": -1, "smallest": 1}


class UnclearError(Exception):
    """An expression is ambiguous: two values are too close, or several objects match."""


@dataclass(frozen=True)
class Description:
    """Attributes that an object must have; None accepts any value."""

    size: str | None = None
    texture: str | None = None
    color: str | None = None
    shape: str | None = None

    def matches(self, item: SceneObject) -> bool:
        """Return whether an object has all attributes of the description."""
        return all(
            getattr(self, field.name) in (None, getattr(item, field.name)) for field in fields(self)
        )

    @property
    def is_known(self) -> bool:
        """Whether scenes have objects of this shape."""
        return self.shape is None or self.shape in vocabulary.FULL_SHAPES


@dataclass(frozen=True)
class Expression:
    """A description with optional relations, extreme or rank.

    Attributes:
        description: attributes of the objects.
        relations: pairs of a key of ``DIRECTIONS`` or ``NEAREST`` and an anchor, which is singular.
        extreme: key of ``EXTREMES`` or ``SIZE_EXTREMES``.
        rank: position from 1, counted from ``side``.
        side: key of ``SIDES``.
        is_plural: whether all matching objects are targets, instead of exactly one.
    """

    description: Description
    relations: tuple[tuple[str, Expression], ...] = ()
    extreme: str | None = None
    rank: int | None = None
    side: str | None = None
    is_plural: bool = False

    @property
    def is_known(self) -> bool:
        """Whether scenes have objects of all shapes in the expression."""
        return self.description.is_known and all(anchor.is_known for _, anchor in self.relations)


def resolve(
    expression: Expression, objects: Sequence[SceneObject], clear_px: float
) -> tuple[int, ...]:
    """Resolve an expression to objects.

    Args:
        expression: the expression.
        objects: objects of the scene.
        clear_px: minimum difference in pixels of positions that are compared.

    Returns:
        Indices into ``objects``, ascending; empty if no object matches or an anchor does not exist.

    Raises:
        UnclearError: values differ by less than ``clear_px``, or several objects match a singular.
    """
    pool = candidates(expression, objects, clear_px)
    directions = []
    for relation, anchor in expression.relations:
        found = resolve(anchor, objects, clear_px)
        if not found:
            return ()
        origin = objects[found[0]]
        if relation == NEAREST:
            pool = _ranked(pool, 1, clear_px, [distance(item, origin) for item in objects])
        else:
            directions.append((DIRECTIONS[relation], origin))
    pool = [i for i in pool if _is_in_directions(objects[i], directions, clear_px)]
    if expression.extreme in SIZE_EXTREMES:
        sign = SIZE_EXTREMES[expression.extreme]
        sizes = [sign * vocabulary.SIZES.index(item.size) for item in objects]
        pool = _ranked(pool, 1, 1, sizes)
    elif side := EXTREMES.get(expression.extreme or "") or SIDES.get(expression.side or ""):
        pool = _ranked(pool, expression.rank or 1, clear_px, positions(side, objects))
    if len(pool) > 1 and not expression.is_plural:
        raise UnclearError("several objects match")
    return tuple(pool)


def candidates(
    expression: Expression, objects: Sequence[SceneObject], clear_px: float
) -> list[int]:
    """Return the indices of objects that match the description, without the anchors, ascending.

    Raises:
        UnclearError: an anchor is unclear.
    """
    anchors = {i for _, anchor in expression.relations for i in resolve(anchor, objects, clear_px)}
    return [
        i
        for i, item in enumerate(objects)
        if expression.description.matches(item) and i not in anchors
    ]


def _is_in_directions(
    item: SceneObject, directions: Sequence[tuple[tuple[int, int], SceneObject]], clear_px: float
) -> bool:
    is_unclear = False
    for (axis, sign), anchor in directions:
        offset = sign * (item.center[axis] - anchor.center[axis])
        if offset <= -CLEARLY_NOT_SHARE * clear_px:
            return False
        is_unclear |= offset < clear_px
    if is_unclear:
        raise UnclearError("an object is only just on that side")
    return True


def _ranked(pool: list[int], rank: int, margin: float, values: Sequence[float]) -> list[int]:
    """Return the object of a rank by the objects' values, clear up to the next object."""
    ordered = sorted(pool, key=values.__getitem__)
    if any(values[j] - values[i] < margin for i, j in pairwise(ordered[: rank + 1])):
        raise UnclearError("two objects have a similar position, distance or size")
    return ordered[rank - 1 : rank]


def positions(direction: tuple[int, int], objects: Sequence[SceneObject]) -> list[float]:
    """Return the position of each object, counted from a side of ``SIDES``."""
    axis, sign = direction
    return [sign * item.center[axis] for item in objects]


def distance(item: SceneObject, other: SceneObject) -> float:
    """Return the distance of two objects' centers in pixels."""
    return math.dist(item.center, other.center)
