"""Questions about a scene, clear by construction, with their answers and reasoning.

An expression is drafted at random towards some object, and kept if it resolves clearly to as many
targets as its kind has. The kinds:

    attribute    the striped red circle
    superlative  the leftmost circle; the largest red shape
    relation     the circle left of the blue star
    two_step     the circle left of the square that is above the blue star;
                 the circle left of the blue star and above the ring
    nearest      the circle nearest to the blue star
    ordinal      the second circle from the left
    several      all red circles; all red circles left of the blue star
    none         any of these with nothing that fits, or "the cat"
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
from coprs_deploy.data.synthetic.reasoning import write_reasoning, write_response
from coprs_deploy.data.synthetic.rng import Draws
from coprs_deploy.data.synthetic.scene import Scene, SceneObject
from coprs_deploy.data.synthetic.wording import write_instruction

DRAFTS_PER_KIND = 60
"""Drafts of one kind before another kind is tried."""

LONE_CANDIDATE_SHARE = 0.35
"""How often a question is kept whose description alone would give the answer."""

_SHARES = {"shape": 0.8, "color": 0.6, "texture": 0.3, "size": 0.25}
"""How often a description names each attribute."""

_NARROWING = ("superlative", "relation", "two_step", "nearest", "ordinal")
"""Kinds that say more than attributes, about one object."""

_FEW = {"shape": 0.65, "color": 0.35, "texture": 0.12, "size": 0.0}
"""The same, where several objects should fit."""


@dataclass(frozen=True)
class Question:
    """An instruction with its answer.

    Attributes:
        instruction: what the user writes.
        kind: one of ``tiers.QUESTION_TYPES``.
        targets: indices into the scene's objects, in reading order; empty for "none".
        reasoning: the thought, without its marks.
    """

    instruction: str
    kind: str
    targets: tuple[int, ...]
    reasoning: str

    @property
    def response(self) -> str:
        """The whole response: thought, then one ``<REF_POS>`` a target or "nothing matches"."""
        return write_response(self.reasoning, len(self.targets))


def ask(scene: Scene, tier: Preset, seed: int, count: int = 1) -> list[Question]:
    """Ask different questions about a scene.

    Args:
        scene: a scene of this tier.
        tier: kinds of question, their weights and wordings.
        seed: the same seed gives the same questions.
        count: how many; a poor scene may give fewer.

    Returns:
        At least one question, no two with the same instruction.

    Raises:
        ValueError: count is below 1.
    """
    if count < 1:
        raise ValueError(f"count is {count}; it must be at least 1")
    drafter = _Drafter(scene, tier, Draws(f"{tier.name} questions", seed))
    questions: dict[str, Question] = {}
    for _ in range(3 * count):
        question = drafter.question()
        questions.setdefault(question.instruction, question)
        if len(questions) == count:
            break
    return list(questions.values())


class _Drafter:
    """Drafts expressions about one scene."""

    def __init__(self, scene: Scene, tier: Preset, draws: Draws) -> None:
        self.objects = scene.objects
        self.tier = tier
        self.draws = draws
        self.clear_px = tier.clear_distance * tier.image_size
        self.drafts: Mapping[str, Callable[[], Expression | None]] = {
            "attribute": self._attribute,
            "superlative": self._superlative,
            "relation": self._relation,
            "two_step": self._two_step,
            "nearest": self._nearest,
            "ordinal": self._ordinal,
            "several": self._several,
            "none": self._nothing,
        }

    def question(self) -> Question:
        """Draw a kind, then drafts of it until one is clear; a kind that never is gives way."""
        weights = dict(self.tier.kinds)
        while any(weights.values()):
            kind = self.draws.weighted(list(weights), list(weights.values()))
            for _ in range(DRAFTS_PER_KIND):
                question = self._try(kind)
                if question:
                    return question
            weights[kind] = 0.0
        return self._finish("none", self._unknown_thing(), ())

    def _try(self, kind: str) -> Question | None:
        expression = self.drafts[kind]()
        targets = self._meaning(expression) if expression else None
        if expression is None or targets is None:
            return None
        accepted = {"none": range(1), "several": range(2, self.tier.max_targets + 1)}
        if len(targets) not in accepted.get(kind, range(1, 2)):
            return None
        return self._finish(kind, expression, targets)

    def _finish(self, kind: str, expression: Expression, targets: tuple[int, ...]) -> Question:
        instruction = write_instruction(expression, len(targets), self.tier, self.draws)
        reasoning = write_reasoning(
            expression,
            self.objects,
            self.clear_px,
            shows_comparisons=self.tier.shows_comparisons,
        )
        return Question(instruction, kind, targets, reasoning)

    def _attribute(self) -> Expression:
        return Expression(self._describe(self.draws.choice(self.objects), _SHARES))

    def _superlative(self) -> Expression | None:
        extreme = self.draws.choice([*EXTREMES, *SIZE_EXTREMES, *SIZE_EXTREMES])
        described = self._describe(self.draws.choice(self.objects), _FEW, may_be_empty=True)
        return self._if_several_fit(Expression(described, extreme=extreme))

    def _ordinal(self) -> Expression | None:
        described = self._describe(self.draws.choice(self.objects), _FEW, may_be_empty=True)
        rank, side = self.draws.integer(2, 4), self.draws.choice(list(SIDES))
        return self._if_several_fit(Expression(described, rank=rank, side=side))

    def _relation(self) -> Expression | None:
        pair = self._pair()
        words = self._directions(*pair) if pair else []
        if not pair or not words:
            return None
        anchor = Expression(self._describe(pair[1], _SHARES))
        return self._beside(pair[0], anchor, self.draws.choice(words))

    def _nearest(self) -> Expression | None:
        pair = self._pair()
        if not pair:
            return None
        return self._beside(pair[0], Expression(self._describe(pair[1], _SHARES)), NEAREST)

    def _two_step(self) -> Expression | None:
        return self._chain() if self.draws.chance(0.5) else self._conjunction()

    def _chain(self) -> Expression | None:
        inner = self._relation()
        found = self._meaning(inner) if inner else None
        if inner is None or not found:
            return None
        target, middle = self.draws.choice(self.objects), self.objects[found[0]]
        words = self._directions(target, middle)
        # "The ring left of the star that is right of the ring" would say the same thing twice.
        if not words or inner.relations[0][1].description.matches(target):
            return None
        return self._beside(target, inner, self.draws.choice(words))

    def _conjunction(self) -> Expression | None:
        first, second = self._relation(), self._relation()
        if first is None or second is None:
            return None
        both = (*first.relations, *second.relations)
        is_one_anchor = self._meaning(both[0][1]) == self._meaning(both[1][1])
        return None if is_one_anchor else self._if_several_fit(replace(first, relations=both))

    def _beside(self, target: SceneObject, anchor: Expression, relation: str) -> Expression | None:
        described = self._describe(target, _FEW, may_be_empty=True)
        return self._if_several_fit(Expression(described, ((relation, anchor),)))

    def _several(self) -> Expression | None:
        described = self._describe(self.draws.choice(self.objects), _FEW)
        relation = self._relation() if self.draws.chance(0.3) else None
        return Expression(
            described, relations=relation.relations if relation else (), is_plural=True
        )

    def _nothing(self) -> Expression | None:
        """Draft something that looks answerable: a part of a sound question is exchanged."""
        if self.draws.chance(0.2):
            return self._unknown_thing()
        kinds = [kind for kind in _NARROWING if self.tier.kinds.get(kind)]
        sound = (
            self.drafts[self.draws.choice(kinds)]() if kinds and self.draws.chance(0.7) else None
        )
        if sound is None:
            return Expression(self._absent())
        if self.draws.chance(0.35):
            has_size = sound.extreme in SIZE_EXTREMES
            absent = replace(self._absent(), size=None) if has_size else self._absent()
            return replace(sound, description=absent)
        if sound.relations:
            (relation, anchor), *others = sound.relations
            if self.draws.chance(0.5):
                anchor = Expression(self._absent())
            elif relation in DIRECTIONS:
                relation = self.draws.choice(list(DIRECTIONS))
            return replace(sound, relations=((relation, anchor), *others))
        if sound.rank:
            return replace(sound, rank=self.draws.integer(sound.rank + 1, 5))
        return None

    def _absent(self) -> Description:
        """Describe an object of the scene with one attribute of another kind."""
        described = self._describe(self.draws.choice(self.objects), _SHARES)
        named = [field.name for field in fields(described) if getattr(described, field.name)]
        choices: dict[str, Sequence[str]] = {
            "size": vocabulary.SIZES,
            "texture": self.tier.textures,
            "color": list(vocabulary.COLORS),
            "shape": self.tier.shapes,
        }
        field = self.draws.choice(named)
        return replace(described, **{field: self.draws.choice(choices[field])})

    def _unknown_thing(self) -> Expression:
        color = self.draws.choice(list(vocabulary.COLORS)) if self.draws.chance(0.25) else None
        return Expression(Description(color=color, shape=self.draws.choice(self.tier.things)))

    def _pair(self) -> tuple[SceneObject, SceneObject] | None:
        """Draw two different objects."""
        if len(self.objects) < 2:
            return None
        first = self.draws.integer(0, len(self.objects) - 1)
        second = self.draws.integer(0, len(self.objects) - 2)
        return self.objects[first], self.objects[second + (second >= first)]

    def _meaning(self, expression: Expression) -> tuple[int, ...] | None:
        """Resolve an expression; None where it is unclear."""
        try:
            return resolve(expression, self.objects, self.clear_px)
        except UnclearError:
            return None

    def _directions(self, target: SceneObject, anchor: SceneObject) -> list[str]:
        """Return the words for how the target clearly lies from the anchor."""
        return [
            word
            for word, (axis, sign) in DIRECTIONS.items()
            if sign * (target.center[axis] - anchor.center[axis]) >= self.clear_px
        ]

    def _describe(
        self, item: SceneObject, shares: Mapping[str, float], may_be_empty: bool = False
    ) -> Description:
        """Name some attributes of an object."""
        named = {
            field: getattr(item, field) for field in shares if self.draws.chance(shares[field])
        }
        if not named and not may_be_empty:
            field = self.draws.choice(("shape", "color"))
            named[field] = getattr(item, field)
        return Description(**named)

    def _if_several_fit(self, expression: Expression) -> Expression | None:
        """Let most expressions go whose description alone gives the answer: they teach nothing."""
        try:
            pool = candidates(expression, self.objects, self.clear_px)
        except UnclearError:
            return None
        if expression.extreme or expression.rank:
            is_trivial = len(pool) < 2
        else:
            is_trivial = len(pool) < 2 and not self.draws.chance(LONE_CANDIDATE_SHARE)
        return None if is_trivial else expression
