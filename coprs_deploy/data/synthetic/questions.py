"""Questions about a scene, unambiguous by construction, with targets and reasoning.

A random expression is drafted around an object, and kept if it resolves to as many targets as its
question type has. The types:

    attribute    the striped red circle
    superlative  the leftmost circle; the largest red shape
    relation     the circle left of the blue star
    two_step     the circle left of the square that is above the blue star;
                 the circle left of the blue star and above the ring
    nearest      the circle nearest to the blue star
    ordinal      the second circle from the left
    several      all red circles; all red circles left of the blue star
    none         any of these without a match, or "the cat"
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace

from coprs_deploy.data.synthetic import vocabulary
from coprs_deploy.data.synthetic.expressions import (
    DIRECTIONS,
    EXTREMES,
    NEAREST,
    SIDES,
    SIZE_EXTREMES,
    Description,
    Expression,
    UnclearError,
    candidates,
    resolve,
)
from coprs_deploy.data.synthetic.presets import Preset
from coprs_deploy.data.synthetic.reasoning import write_reasoning
from coprs_deploy.data.synthetic.rng import PortableRng
from coprs_deploy.data.synthetic.scene import Scene, SceneObject
from coprs_deploy.data.synthetic.wording import write_instruction
from coprs_deploy.prompts import REFERENCE_TOKEN

DRAFTS_PER_TYPE = 60
"""Drafts of one question type before another type is tried."""

LONE_CANDIDATE_SHARE = 0.35
"""Share of questions that are kept although the description alone has a single match."""

_ATTRIBUTE_SHARES = {"shape": 0.8, "color": 0.6, "texture": 0.3, "size": 0.25}
"""Probability that a description has an attribute."""

_NARROWING = ("superlative", "relation", "two_step", "nearest", "ordinal")
"""Question types with one target and more than attributes."""

_BROAD_SHARES = {"shape": 0.65, "color": 0.35, "texture": 0.12, "size": 0.0}
"""Probability that a description has an attribute, if several objects should match."""


@dataclass(frozen=True)
class Question:
    """An instruction with its targets and reasoning.

    Attributes:
        instruction: the user's text.
        question_type: one of ``QUESTION_TYPES``.
        targets: indices into the scene's objects, in reading order; empty for "none".
        reasoning: text inside the ``<think>`` tags.
    """

    instruction: str
    question_type: str
    targets: tuple[int, ...]
    reasoning: str

    @property
    def response(self) -> str:
        """Whole response: reasoning, then one ``<REF_POS>`` per target or "nothing matches"."""
        ending = " ".join([REFERENCE_TOKEN] * len(self.targets)) or "nothing matches"
        return f"<think>{self.reasoning}</think> {ending}"


def ask_questions(scene: Scene, preset: Preset, seed: int, count: int = 1) -> list[Question]:
    """Generate at least one question about a scene, no two with the same instruction.

    Args:
        scene: a scene of the preset.
        preset: question types with their weights, and wording.
        seed: seed of the questions.
        count: maximum number of questions; a scene with few objects may have fewer.

    Raises:
        ValueError: count is below 1.
    """
    if count < 1:
        raise ValueError(f"count is {count}; it must be at least 1")
    drafter = _Drafter(scene, preset, PortableRng(f"{preset.name} questions", seed))
    questions: dict[str, Question] = {}
    for _ in range(3 * count):
        question = drafter.question()
        questions.setdefault(question.instruction, question)
        if len(questions) == count:
            break
    return list(questions.values())


class _Drafter:
    """Drafts expressions about one scene."""

    def __init__(self, scene: Scene, preset: Preset, rng: PortableRng) -> None:
        self.objects = scene.objects
        self.preset = preset
        self.rng = rng
        self.clear_px = preset.clear_distance * preset.image_size
        self.drafts: Mapping[str, Callable[[], Expression | None]] = {
            "attribute": self._attribute,
            "superlative": self._superlative,
            "relation": self._relation,
            "two_step": self._two_step,
            "nearest": self._nearest,
            "ordinal": self._ordinal,
            "several": self._several,
            "none": self._no_match,
        }

    def question(self) -> Question:
        """Draw a question type, then drafts until one is clear; without one, draw another type."""
        weights = dict(self.preset.question_type_weights)
        accepted = {"none": range(1), "several": range(2, self.preset.max_targets + 1)}
        while any(weights.values()):
            question_type = self.rng.weighted(list(weights), list(weights.values()))
            num_targets = accepted.get(question_type, range(1, 2))
            for _ in range(DRAFTS_PER_TYPE):
                expression = self.drafts[question_type]()
                targets = self._resolve(expression) if expression else None
                if expression and targets is not None and len(targets) in num_targets:
                    return self._finish(question_type, expression, targets)
            weights[question_type] = 0.0
        return self._finish("none", self._unknown_object(), ())

    def _finish(
        self, question_type: str, expression: Expression, targets: tuple[int, ...]
    ) -> Question:
        instruction = write_instruction(expression, len(targets), self.preset, self.rng)
        comparisons = self.preset.shows_comparisons
        reasoning = write_reasoning(
            expression, self.objects, self.clear_px, shows_comparisons=comparisons
        )
        return Question(instruction, question_type, targets, reasoning)

    def _attribute(self) -> Expression:
        return Expression(self._describe(self.rng.choice(self.objects), _ATTRIBUTE_SHARES))

    def _superlative(self) -> Expression | None:
        extreme = self.rng.choice([*EXTREMES, *SIZE_EXTREMES, *SIZE_EXTREMES])
        described = self._describe(self.rng.choice(self.objects), _BROAD_SHARES, may_be_empty=True)
        return self._if_several_match(Expression(described, extreme=extreme))

    def _ordinal(self) -> Expression | None:
        described = self._describe(self.rng.choice(self.objects), _BROAD_SHARES, may_be_empty=True)
        rank, side = self.rng.integer(2, 4), self.rng.choice(list(SIDES))
        return self._if_several_match(Expression(described, rank=rank, side=side))

    def _relation(self) -> Expression | None:
        pair = self._pair()
        directions = self._directions(*pair) if pair else []
        if not pair or not directions:
            return None
        anchor = Expression(self._describe(pair[1], _ATTRIBUTE_SHARES))
        return self._related(pair[0], anchor, self.rng.choice(directions))

    def _nearest(self) -> Expression | None:
        pair = self._pair()
        if not pair:
            return None
        anchor = Expression(self._describe(pair[1], _ATTRIBUTE_SHARES))
        return self._related(pair[0], anchor, NEAREST)

    def _two_step(self) -> Expression | None:
        return self._chain() if self.rng.chance(0.5) else self._conjunction()

    def _chain(self) -> Expression | None:
        inner = self._relation()
        found = self._resolve(inner) if inner else None
        if inner is None or not found:
            return None
        target, middle = self.rng.choice(self.objects), self.objects[found[0]]
        directions = self._directions(target, middle)
        # "The ring left of the star that is right of the ring" would be redundant.
        if not directions or inner.relations[0][1].description.matches(target):
            return None
        return self._related(target, inner, self.rng.choice(directions))

    def _conjunction(self) -> Expression | None:
        first, second = self._relation(), self._relation()
        if first is None or second is None:
            return None
        both = (*first.relations, *second.relations)
        is_one_anchor = self._resolve(both[0][1]) == self._resolve(both[1][1])
        return None if is_one_anchor else self._if_several_match(replace(first, relations=both))

    def _related(self, target: SceneObject, anchor: Expression, relation: str) -> Expression | None:
        described = self._describe(target, _BROAD_SHARES, may_be_empty=True)
        return self._if_several_match(Expression(described, ((relation, anchor),)))

    def _several(self) -> Expression | None:
        described = self._describe(self.rng.choice(self.objects), _BROAD_SHARES)
        related = self._relation() if self.rng.chance(0.3) else None
        return Expression(described, related.relations if related else (), is_plural=True)

    def _no_match(self) -> Expression | None:
        """Draft a plausible no-match question: replace one part of an answerable one."""
        if self.rng.chance(0.2):
            return self._unknown_object()
        types = [name for name in _NARROWING if self.preset.question_type_weights.get(name)]
        is_answerable = types and self.rng.chance(0.7)
        answerable = self.drafts[self.rng.choice(types)]() if is_answerable else None
        if answerable is None:
            return Expression(self._mismatch())
        if self.rng.chance(0.35):
            has_size = answerable.extreme in SIZE_EXTREMES
            mismatch = replace(self._mismatch(), size=None) if has_size else self._mismatch()
            return replace(answerable, description=mismatch)
        if answerable.relations:
            (relation, anchor), *others = answerable.relations
            if self.rng.chance(0.5):
                anchor = Expression(self._mismatch())
            elif relation in DIRECTIONS:
                relation = self.rng.choice(list(DIRECTIONS))
            return replace(answerable, relations=((relation, anchor), *others))
        if answerable.rank:
            return replace(answerable, rank=self.rng.integer(answerable.rank + 1, 5))
        return None

    def _mismatch(self) -> Description:
        """Describe an object of the scene with one attribute replaced."""
        described = self._describe(self.rng.choice(self.objects), _ATTRIBUTE_SHARES)
        named = [field.name for field in fields(described) if getattr(described, field.name)]
        choices: dict[str, Sequence[str]] = {
            "size": vocabulary.SIZES,
            "texture": self.preset.textures,
            "color": list(vocabulary.COLORS),
            "shape": self.preset.shapes,
        }
        field = self.rng.choice(named)
        return replace(described, **{field: self.rng.choice(choices[field])})

    def _unknown_object(self) -> Expression:
        color = self.rng.choice(list(vocabulary.COLORS)) if self.rng.chance(0.25) else None
        return Expression(Description(color=color, shape=self.rng.choice(self.preset.things)))

    def _pair(self) -> tuple[SceneObject, SceneObject] | None:
        """Draw two different objects."""
        if len(self.objects) < 2:
            return None
        first = self.rng.integer(0, len(self.objects) - 1)
        second = self.rng.integer(0, len(self.objects) - 2)
        return self.objects[first], self.objects[second + (second >= first)]

    def _resolve(self, expression: Expression) -> tuple[int, ...] | None:
        """Resolve an expression; None where it is unclear."""
        try:
            return resolve(expression, self.objects, self.clear_px)
        except UnclearError:
            return None

    def _directions(self, target: SceneObject, anchor: SceneObject) -> list[str]:
        """Return the directions in which the target clearly lies from the anchor."""
        return [
            word
            for word, (axis, sign) in DIRECTIONS.items()
            if sign * (target.center[axis] - anchor.center[axis]) >= self.clear_px
        ]

    def _describe(
        self, item: SceneObject, shares: Mapping[str, float], may_be_empty: bool = False
    ) -> Description:
        """Describe an object by a random subset of its attributes."""
        named = {field: getattr(item, field) for field in shares if self.rng.chance(shares[field])}
        if not named and not may_be_empty:
            field = self.rng.choice(("shape", "color"))
            named[field] = getattr(item, field)
        return Description(**named)

    def _if_several_match(self, expression: Expression) -> Expression | None:
        """Drop most expressions whose description alone has a single match."""
        try:
            pool = candidates(expression, self.objects, self.clear_px)
        except UnclearError:
            return None
        if len(pool) > 1:
            return expression
        is_selected = expression.extreme or expression.rank
        return expression if not is_selected and self.rng.chance(LONE_CANDIDATE_SHARE) else None
