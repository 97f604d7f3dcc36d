"""Wording: expressions and instructions in English.

Every term has a list of synonyms. The first is canonical: the preset ``plain`` and all reasoning
use it; the preset ``full`` samples from the list. The tests read these texts with an independent
grammar.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from coprs_deploy.data.synthetic.expressions import Description, Expression
from coprs_deploy.data.synthetic.presets import Preset
from coprs_deploy.data.synthetic.rng import PortableRng

Pick = Callable[[Sequence[str]], str]
"""Chooses one of several synonyms."""

SYNONYMS: dict[str, tuple[str, ...]] = {
    "shape": ("shape", "object", "figure", "thing"),  # codespell:ignore figure
    "circle": ("circle", "disc"),
    "cross": ("cross", "plus sign"),
    "diamond": ("diamond", "rhombus"),
    "ring": ("ring", "hoop"),
    "crescent": ("crescent", "half moon"),
    "small": ("small", "little", "tiny"),
    "medium": ("medium", "medium-sized", "mid-sized"),
    "large": ("large", "big"),
    "plain": ("plain", "solid", "untextured"),
    "dotted": ("dotted", "spotted"),
    "checkered": ("checkered", "checked"),
    "cyan": ("cyan", "turquoise"),
    "purple": ("purple", "violet"),
    "leftmost": ("leftmost", "furthest left"),
    "rightmost": ("rightmost", "furthest right"),
    "topmost": ("topmost", "highest", "uppermost"),
    "bottommost": ("bottommost", "lowest"),
    "largest": ("largest", "biggest"),
    "smallest": ("smallest", "tiniest"),
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "higher up than"),
    "below": ("below", "lower down than"),
    "nearest to": ("nearest to", "closest to"),
}
"""Canonical term to synonyms; a missing term has none."""

PLURALS = {"cross": "crosses"}
RANKS = ("first", "second", "third", "fourth", "fifth", "sixth")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")

_PATTERNS = {"striped": "with stripes", "dotted": "with dots", "checkered": "with checks"}

_TEMPLATES = (
    "{phrase}",
    "segment {phrase}",
    "Segment {phrase}.",
    "Please segment {phrase}.",
    "please mark {phrase}",
    "Where {be} {phrase}?",
    "where {be} {phrase} in this picture?",  # codespell:ignore picture
    "Find {phrase}.",
    "can you find {phrase}?",
    "Show me {phrase}.",
    "Highlight {phrase}, please.",
    "Could you outline {phrase}?",
    "I am looking for {phrase}.",
    "point out {phrase}",
    "Which pixels belong to {phrase}?",
    "Cut out {phrase}.",
    "Give me the mask of {phrase}.",
    "I need {phrase} only.",
)
"""Whole instructions; ``{be}`` is "is" or "are"."""


def first(words: Sequence[str]) -> str:
    """Pick the canonical term."""
    return words[0]


def write_instruction(
    expression: Expression, num_targets: int, preset: Preset, rng: PortableRng
) -> str:
    """Write an instruction: the noun phrase, or a paraphrase if the preset has them.

    A plural may state ``num_targets``.
    """
    if not preset.has_paraphrases:
        return phrase(expression)
    # A third of the wordings are canonical, so that canonical terms are the most frequent.
    pick = first if rng.chance(0.33) else rng.choice
    determiner = _plural_determiner(expression, num_targets, rng)
    words = phrase(expression, pick, determiner)
    if _can_have_clause(expression) and rng.chance(0.25):
        words = _with_clause(expression, pick)
    is_singular = not expression.is_plural or determiner in ("each", "every")
    return rng.choice(_TEMPLATES).format(phrase=words, be="is" if is_singular else "are")


def phrase(
    expression: Expression, pick: Pick = first, determiner: str = "", is_anchor: bool = False
) -> str:
    """Write an expression as a noun phrase, as in "the red circle left of the star".

    Args:
        expression: the expression.
        pick: chooses synonyms.
        determiner: replaces "the" or "all".
        is_anchor: whether the phrase is inside another phrase.
    """
    is_plural = expression.is_plural and determiner not in ("each", "every")
    words = [determiner or ("all" if expression.is_plural else "the")]
    if expression.rank:
        words.append(RANKS[expression.rank - 1])
    if expression.extreme:
        words.append(pick(SYNONYMS[expression.extreme]))
    words.append(noun(expression.description, pick, is_plural))
    if expression.side:
        words.append(pick(("from", "counting from", "counted from")) + f" the {expression.side}")
    for number, (relation, anchor) in enumerate(expression.relations):
        words.append("and" if number else _link(is_plural, is_anchor, pick))
        words.append(f"{pick(SYNONYMS[relation])} {phrase(anchor, pick, is_anchor=True)}")
    return " ".join(word for word in words if word)


def noun(description: Description, pick: Pick = first, is_plural: bool = False) -> str:
    """Write a description without an article, as in "small red circles"."""
    attributes = [description.size, description.texture, description.color]
    words = [pick(SYNONYMS.get(word, (word,))) for word in attributes if word]
    shape = description.shape or "shape"
    name = pick(SYNONYMS.get(shape, (shape,)))
    if is_plural:
        name = PLURALS.get(name, f"{name}s")
    return " ".join([*words, name])


def _link(is_plural: bool, is_anchor: bool, pick: Pick) -> str:
    """Return the words that link a noun to the relation after it."""
    be = "are" if is_plural else "is"
    # Inside another phrase "that is" attaches the relation to the nearer noun.
    return f"that {be}" if is_anchor else pick(("", "", f"that {be}", f"which {be}"))


def _plural_determiner(expression: Expression, num_targets: int, rng: PortableRng) -> str:
    if not expression.is_plural:
        return ""
    choices = ["all", "all", "all the", "each", "every", "the"]
    if num_targets == 2:
        choices += ["both", "the two"]
    elif num_targets > 2:
        choices.append(f"the {NUMBERS[num_targets]}")
    return rng.choice(choices)


def _can_have_clause(expression: Expression) -> bool:
    """Return whether nothing follows the noun, so that a clause can only refer to it."""
    described = expression.description
    return (
        not expression.relations
        and not expression.side
        and not expression.is_plural
        and (described.color is not None or described.texture in _PATTERNS)
    )


def _with_clause(expression: Expression, pick: Pick) -> str:
    """Move the color or the texture behind the noun: "the circle that is red"."""
    described = expression.description
    kept = {"size": described.size, "shape": described.shape}
    if described.texture in _PATTERNS:
        shorter = Description(color=described.color, **kept)
        clause = _PATTERNS[described.texture]
    else:
        assert described.color, "a clause needs a color or a texture"
        shorter = Description(texture=described.texture, **kept)
        clause = f"that is {pick(SYNONYMS.get(described.color, (described.color,)))}"
    return f"{phrase(Expression(shorter, extreme=expression.extreme), pick)} {clause}"
