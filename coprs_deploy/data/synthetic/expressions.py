"""Expressions: what a question points at, apart from its words.

An expression is one pattern: objects of a description, narrowed down by relations to other
expressions, then by an extreme or a rank. Resolving it says which objects it means, or that
something in it lies too close to call.
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
"""Share of the clear distance on the other side from which an object is clearly not "left of"."""

DIRECTIONS: dict[str, tuple[int, int]] = {
    "left of": (0, -1),
    "right of": (0, 1),
    "above": (1, -1),
    "below": (1, 1),
}
"""Relation to the axis (0 is x) and to the sign of the object's position minus the anchor's."""

EXTREMES: dict[str, tuple[int, int]] = {
    "leftmost": (0, 1),
    "rightmost": (0, -1),
    "topmost": (1, 1),
    "bottommost": (1, -1),
}
"""Extreme of position to the axis and to the factor that makes it a least value."""

SIZE_EXTREMES: dict[str, int] = {"largest": -1, "smallest": 1}

SIDES: dict[str, tuple[int, int]] = {
    "left": (0, 1),
    "right": (0, -1),
    "top": (1, 1),
    "bottom": (1, -1),
}
"""Side from which a rank counts to the axis and the sign of the count."""


class UnclearError(Exception):
    """An expression means nothing clear: two values are too close, or two objects fit."""


@dataclass(frozen=True)
class Description:
    """Attributes that an object must have; None leaves one open."""

    size: str | None = None
    texture: str | None = None
    color: str | None = None
    shape: str | None = None

    def matches(self, item: SceneObject) -> bool:
        """Say whether an object has every attribute that is named."""
        return all(
            getattr(self, field.name) in (None, getattr(item, field.name)) for field in fields(self)
        )

    @property
    def is_known(self) -> bool:
        """Whether its noun belongs to this world."""
        return self.shape is None or self.shape in vocabulary.FULL_SHAPES


@dataclass(frozen=True)
class Expression:
    """A description and what narrows it down.

    Attributes:
        description: attributes of the objects meant.
        relations: each a word of ``DIRECTIONS`` or ``NEAREST``, and the anchor, which is singular.
        extreme: a word of ``EXTREMES`` or ``SIZE_EXTREMES``.
        rank: from 1, counted from ``side``.
        side: a word of ``SIDES``.
        is_plural: whether all objects that fit are meant, not the only one.
    """

    description: Description
    relations: tuple[tuple[str, Expression], ...] = ()
    extreme: str | None = None
    rank: int | None = None
    side: str | None = None
    is_plural: bool = False

    @property
    def is_known(self) -> bool:
        """Whether all its nouns belong to this world."""
        return self.description.is_known and all(anchor.is_known for _, anchor in self.relations)


def resolve(
    expression: Expression, objects: Sequence[SceneObject], clear_px: float
) -> tuple[int, ...]:
    """Find what an expression means.

    Args:
        expression: what is asked for.
        objects: the table of the scene.
        clear_px: by how much positions must differ to be told apart.

    Returns:
        Indices into ``objects`` in ascending order; nothing where nothing fits, or where an anchor
        is missing.

    Raises:
        UnclearError: values lie within ``clear_px``, or several objects fit a singular.
    """
    pool = candidates(expression, objects, clear_px)
    for relation, anchor in expression.relations:
        found = resolve(anchor, objects, clear_px)
        if not found:
            return ()
        if relation == NEAREST:
            pool = _nearest(pool, objects[found[0]], objects, clear_px)
    directions = [
        (DIRECTIONS[relation], objects[resolve(anchor, objects, clear_px)[0]])
        for relation, anchor in expression.relations
        if relation in DIRECTIONS
    ]
    pool = [i for i in pool if _lies_so(objects[i], directions, clear_px)]
    if expression.extreme in SIZE_EXTREMES:
        pool = _extreme_size(pool, expression.extreme, objects)
    elif expression.extreme in EXTREMES:
        pool = _ranked(pool, 1, EXTREMES[expression.extreme], objects, clear_px)
    elif expression.rank and expression.side:
        pool = _ranked(pool, expression.rank, SIDES[expression.side], objects, clear_px)
    if len(pool) > 1 and not expression.is_plural:
        raise UnclearError("several objects fit")
    return tuple(pool)


def candidates(
    expression: Expression, objects: Sequence[SceneObject], clear_px: float
) -> list[int]:
    """Return the objects that fit the description, the anchors left out, ascending.

    Raises:
        UnclearError: an anchor is unclear.
    """
    anchors = {i for _, anchor in expression.relations for i in resolve(anchor, objects, clear_px)}
    return [
        i
        for i, item in enumerate(objects)
        if expression.description.matches(item) and i not in anchors
    ]


def _lies_so(
    item: SceneObject, directions: Sequence[tuple[tuple[int, int], SceneObject]], clear_px: float
) -> bool:
    is_unclear = False
    for (axis, sign), anchor in directions:
        offset = sign * (item.center[axis] - anchor.center[axis])
        if offset <= -CLEARLY_NOT_SHARE * clear_px:
            return False
        is_unclear |= offset < clear_px
    if is_unclear:
        raise UnclearError("an object lies hardly on the side that is asked for")
    return True


def _nearest(
    pool: Sequence[int], origin: SceneObject, objects: Sequence[SceneObject], clear_px: float
) -> list[int]:
    ordered = sorted(pool, key=lambda i: distance(objects[i], origin))
    nearest = [distance(objects[i], origin) for i in ordered[:2]]
    if len(nearest) > 1 and nearest[1] - nearest[0] < clear_px:
        raise UnclearError("two objects are about as near")
    return ordered[:1]


def _extreme_size(pool: list[int], extreme: str, objects: Sequence[SceneObject]) -> list[int]:
    def order(i: int) -> int:
        return SIZE_EXTREMES[extreme] * vocabulary.SIZES.index(objects[i].size)

    ordered = sorted(pool, key=order)
    if len(ordered) > 1 and order(ordered[0]) == order(ordered[1]):
        raise UnclearError("two objects are about as large")
    return ordered[:1]


def _ranked(
    pool: list[int],
    rank: int,
    direction: tuple[int, int],
    objects: Sequence[SceneObject],
    clear_px: float,
) -> list[int]:
    """Return the object of a rank; the order must be clear up to the one after it."""
    ordered = in_order(pool, direction, objects)
    axis, sign = direction
    values = [sign * objects[i].center[axis] for i in ordered[: rank + 1]]
    gaps = [later - earlier for earlier, later in pairwise(values)]
    if gaps and min(gaps) < clear_px:
        raise UnclearError("two objects are about as far to that side")
    return ordered[rank - 1 : rank]


def in_order(
    pool: Sequence[int], direction: tuple[int, int], objects: Sequence[SceneObject]
) -> list[int]:
    """Sort indices from a side; see ``SIDES``."""
    axis, sign = direction
    return sorted(pool, key=lambda i: sign * objects[i].center[axis])


def distance(item: SceneObject, other: SceneObject) -> float:
    """Measure how far the centers of two objects lie apart, in pixels."""
    return math.dist(item.center, other.center)
