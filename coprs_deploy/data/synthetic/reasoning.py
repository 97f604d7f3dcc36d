"""Reasoning: the text that leads from an instruction to its targets.

The order is what makes it learnable: the noun phrase is repeated, then each candidate is given by
its place first and its attributes after, and the target by its place again. A place is read off the
picture; attributes written before it would be guesses that the place then has to follow. What has
to be compared is written down: the distance of each candidate where the nearest is asked for, and
in a tier that shows its comparisons which candidates lie as a relation says, and of what size the
largest is. Choosing is then looking a word up.
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
    in_order,
    resolve,
)
from coprs_deploy.data.synthetic.scene import SceneObject
from coprs_deploy.data.synthetic.wording import noun, phrase
from coprs_deploy.prompts import REFERENCE_TOKEN

NOTHING_MATCHES = "nothing matches"
"""What follows the thought in place of ``<REF_POS>`` when there is no target."""


MATCHES = " matches"
"""What follows a candidate that lies as the relations say."""


def write_reasoning(
    expression: Expression,
    objects: Sequence[SceneObject],
    clear_px: float,
    *,
    shows_comparisons: bool = False,
) -> str:
    """Explain how an expression leads to its targets.

    Args:
        expression: a clear one; see :func:`expressions.resolve`.
        objects: the table of the scene.
        clear_px: by how much positions must differ to be told apart.
        shows_comparisons: whether candidates that lie as a relation says are marked, and the size
            of the largest or smallest is said.

    Returns:
        Sentences in canonical words, without the marks of a thought.
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


def write_response(reasoning: str, num_targets: int) -> str:
    """Put a reasoning into the form of a whole response, one ``<REF_POS>`` for each target."""
    ending = " ".join([REFERENCE_TOKEN] * num_targets) or NOTHING_MATCHES
    return f"<think>{reasoning}</think> {ending}"


def _locate(expression: Expression, found: Sequence[SceneObject]) -> str:
    place = f"at {found[0].place}" if found else "nowhere"
    words = phrase(expression)
    return f"{words[0].upper()}{words[1:]} is {place}."


def _locate_anchors(
    expression: Expression, objects: Sequence[SceneObject], clear_px: float
) -> list[str]:
    """Say where each anchor is, those that another needs first; stop at one that is missing."""
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
        pool = in_order(pool, SIDES[expression.side], objects)
        order = f" from the {expression.side}"
    origins = [
        objects[resolve(anchor, objects, clear_px)[0]]
        for relation, anchor in expression.relations
        if relation == NEAREST
    ]
    marked: tuple[int, ...] = ()
    if shows_comparisons and expression.relations and not origins:
        marked = resolve(replace(expression, is_plural=True), objects, clear_px)
    # Counted in clear distances and rounded down, the nearest has the smallest number alone.
    entries = [
        f"at {objects[i].place} {objects[i].name}"
        + "".join(f" {int(distance(objects[i], origin) / clear_px)} away" for origin in origins)
        + (MATCHES if i in marked else "")
        for i in pool
    ]
    listed = ", ".join(entries) or "none"
    return f"The {noun(expression.description)} candidates{order} are: {listed}."


def _conclude(targets: Sequence[SceneObject]) -> str:
    if not targets:
        return "The target is nowhere."
    listed = ", ".join(f"at {item.place}, the {item.name}" for item in targets)
    return f"The target is {listed}." if len(targets) == 1 else f"The targets are {listed}."
