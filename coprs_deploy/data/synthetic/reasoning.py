"""Reasoning from an instruction to its targets.

The order makes it learnable: the noun phrase is repeated, each candidate is listed with its
location first and its attributes second, and the conclusion repeats the location of the target. A
location can be read from the image; attributes before it would be guesses that constrain the
location. Comparisons are explicit: the distance of each candidate to the anchor for "nearest", and,
if the preset shows comparisons, which candidates fulfill a relation and the size of the largest.
The conclusion is then a lookup.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from coprs_deploy.data.synthetic.expressions import (
    NEAREST,
    SIDES,
    SIZE_EXTREMES,
    Expression,
    candidates,
    distance,
    positions,
    resolve,
)
from coprs_deploy.data.synthetic.scene import SceneObject
from coprs_deploy.data.synthetic.wording import noun, phrase

MATCHES = " matches"
"""Mark of a candidate that fulfills the relations."""


def write_reasoning(
    expression: Expression,
    objects: Sequence[SceneObject],
    clear_px: float,
    *,
    shows_comparisons: bool = False,
) -> str:
    """Write the reasoning from an expression to its targets, without ``<think>`` tags.

    Args:
        expression: an unambiguous expression; see :func:`expressions.resolve`.
        objects: objects of the scene.
        clear_px: minimum difference in pixels of positions that are compared.
        shows_comparisons: see :class:`~coprs_deploy.data.synthetic.presets.Preset`.
    """
    targets = [objects[i] for i in resolve(expression, objects, clear_px)]
    if not expression.is_known:
        sentences = ["There is no such shape."]
    elif not (
        expression.relations or expression.extreme or expression.rank or expression.is_plural
    ):
        sentences = [_locate(expression, targets)]
    else:
        sentences = _locate_anchors(expression, objects, clear_px)
        if all(resolve(anchor, objects, clear_px) for _, anchor in expression.relations):
            sentences.append(_list_candidates(expression, objects, clear_px, shows_comparisons))
        if shows_comparisons and targets and expression.extreme in SIZE_EXTREMES:
            sentences.append(f"The {expression.extreme} is {targets[0].size}.")
    return " ".join([*sentences, _conclude(targets)])


def _locate(expression: Expression, found: Sequence[SceneObject]) -> str:
    location = f"at {found[0].location}" if found else "nowhere"
    text = phrase(expression)
    return f"{text[0].upper()}{text[1:]} is {location}."


def _locate_anchors(
    expression: Expression, objects: Sequence[SceneObject], clear_px: float
) -> list[str]:
    """Locate the anchors, inner ones first; stop at one that does not exist."""
    sentences: list[str] = []
    for _, anchor in expression.relations:
        inner = _locate_anchors(anchor, objects, clear_px)
        sentences += inner
        if inner and inner[-1].endswith("nowhere."):
            break
        found = [objects[i] for i in resolve(anchor, objects, clear_px)]
        sentences.append(_locate(anchor, found))
        if not found:
            break
    return sentences


def _list_candidates(
    expression: Expression,
    objects: Sequence[SceneObject],
    clear_px: float,
    shows_comparisons: bool,
) -> str:
    pool = candidates(expression, objects, clear_px)
    order = ""
    if expression.side:
        pool.sort(key=positions(SIDES[expression.side], objects).__getitem__)
        order = f" from the {expression.side}"
    origins = [
        objects[resolve(anchor, objects, clear_px)[0]]
        for relation, anchor in expression.relations
        if relation == NEAREST
    ]
    marked: tuple[int, ...] = ()
    if shows_comparisons and expression.relations and not origins:
        marked = resolve(replace(expression, is_plural=True), objects, clear_px)
    # In clear distances, rounded down, only the nearest has the smallest number.
    entries = [
        f"at {objects[i].location} {objects[i].name}"
        + "".join(f" {int(distance(objects[i], origin) / clear_px)} away" for origin in origins)
        + (MATCHES if i in marked else "")
        for i in pool
    ]
    listed = ", ".join(entries) or "none"
    return f"The {noun(expression.description)} candidates{order} are: {listed}."


def _conclude(targets: Sequence[SceneObject]) -> str:
    if not targets:
        return "The target is nowhere."
    listed = ", ".join(f"at {item.location}, the {item.name}" for item in targets)
    return f"The target is {listed}." if len(targets) == 1 else f"The targets are {listed}."
