"""Verifier: an independent reading of instructions and reasoning.

It imports nothing of the generator: vocabulary, grammar and rules are its own, and no rule has a
margin. It gets the text and the objects of the scene. If it agrees with the generator over many
scenes, the questions are unambiguous and their targets right. It also finds false statements in a
reasoning, generated ones included.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import pairwise

from coprs_deploy.data.synthetic.scene import SceneObject

_SYNONYMS: dict[str, dict[str, str]] = {
    "size": {
        **dict.fromkeys(("small", "little", "tiny"), "small"),
        **dict.fromkeys(("medium", "medium-sized", "mid-sized"), "medium"),
        **dict.fromkeys(("large", "big"), "large"),
    },
    "texture": {
        **dict.fromkeys(("plain", "solid", "untextured"), "plain"),
        **dict.fromkeys(("striped", "stripes"), "striped"),
        **dict.fromkeys(("dotted", "spotted", "dots"), "dotted"),
        **dict.fromkeys(("checkered", "checked", "checks"), "checkered"),
    },
    "color": {
        **{word: word for word in ("red", "orange", "yellow", "green", "blue", "white")},
        **dict.fromkeys(("cyan", "turquoise"), "cyan"),
        **dict.fromkeys(("purple", "violet"), "purple"),
    },
    "shape": {
        **{word: word for word in ("square", "triangle", "star", "hexagon", "heart")},
        **dict.fromkeys(("circle", "disc"), "circle"),
        **dict.fromkeys(("cross", "plus-sign"), "cross"),
        **dict.fromkeys(("diamond", "rhombus"), "diamond"),
        **dict.fromkeys(("ring", "hoop"), "ring"),
        **dict.fromkeys(("crescent", "half-moon"), "crescent"),
    },
}
_ANY_SHAPE = ("shape", "object", "figure", "thing")  # codespell:ignore figure
_FILLERS = ("the", "that", "which", "is", "are", "with")
_NEAREST = ("nearest to", "closest to")
_ALL = ("all", "each", "every", "both")
_NUMBERS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6}
_RANKS = {"first": 1, "second": 2, "third": 3, "fourth": 4, "fifth": 5, "sixth": 6}

_CARRIER = re.compile(
    r"^(?:please |can you |could you |i am |i )*"
    r"(?:segment|mark|where (?:is|are)|find|show me|highlight|outline|looking for|point out|need"
    r"|which pixels belong to|cut out|give me the mask of) "
)
_CLOSING = re.compile(r"(?: in this picture| please| only)*$")  # codespell:ignore picture
_RELATION = re.compile(
    r" (?:(?:that|which) (?:is|are) )?(?:and )?(?:(?:to|on) the )?"
    r"(left of|right of|above|higher up than|below|lower down than|nearest to|closest to) "
)
_FROM_SIDE = re.compile(r" (?:counting |counted )?from the (left|right|top|bottom)$")

_VALUES: dict[str, Callable[[SceneObject], float]] = {
    **dict.fromkeys(("leftmost", "left"), lambda item: item.center[0]),
    **dict.fromkeys(("rightmost", "right"), lambda item: -item.center[0]),
    **dict.fromkeys(("topmost", "highest", "uppermost", "top"), lambda item: item.center[1]),
    **dict.fromkeys(("bottommost", "lowest", "bottom"), lambda item: -item.center[1]),
    **dict.fromkeys(("largest", "biggest"), lambda item: -item.radius),
    **dict.fromkeys(("smallest", "tiniest"), lambda item: item.radius),
}
"""Extreme or side to a value that is smallest for its object."""


class AmbiguousError(ValueError):
    """A singular matches several objects, or a stated number differs from the matches."""


def read_instruction(instruction: str, objects: Sequence[SceneObject]) -> tuple[int, ...]:
    """Resolve an instruction, in any wording of the generator, to objects.

    Returns:
        Indices into ``objects``, ascending; empty if nothing matches.

    Raises:
        AmbiguousError: several objects match a singular, or a stated number is wrong.
    """
    text = re.sub(r"[.,?!]", "", instruction.lower()).strip()
    text = _CLOSING.sub("", _CARRIER.sub("", text))
    text = re.sub(r"\b(plus|half) (?=sign|moon)", r"\1-", text)
    text = re.sub(r"\bfurthest (left|right)\b", r"\1most", text)
    return tuple(_read_phrase(text, objects))


def _read_phrase(text: str, objects: Sequence[SceneObject]) -> list[int]:
    """Read "the ring left of the star ...": the text before the first relation, then the rest."""
    head, *rest = _RELATION.split(text)
    if not rest:
        return _read_head(head, objects, range(len(objects)))
    if f" {rest[0]} " and " and " in text:
        pairs = list(zip(rest[::2], rest[1::2], strict=True))
    else:  # a chain: the rest belongs to the anchor
        anchor_text = text[len(head) :]
        found = _RELATION.match(anchor_text)
        assert found, "the text was split at this pattern"
        pairs = [(found[1], anchor_text[found.end() :])]
    pool = list(range(len(objects)))
    steps = []
    for relation, anchor_text in pairs:
        anchor = _read_phrase(anchor_text, objects)
        if not anchor:
            return []
        pool = [i for i in pool if i not in anchor]
        steps.append((relation, objects[anchor[0]]))
    for relation, item in steps:
        if relation not in _NEAREST:
            pool = [i for i in pool if _is_in_direction(relation, objects[i], item)]
    for relation, item in steps:
        if relation in _NEAREST:
            fitting = _select(head.split(), objects, pool)
            return sorted(fitting, key=lambda i: _squared_distance(objects[i], item))[:1]
    return _read_head(head, objects, pool)


def _read_head(text: str, objects: Sequence[SceneObject], pool: Sequence[int]) -> list[int]:
    """Read a noun with its attributes, and check the number of matches."""
    side = _FROM_SIDE.search(text)
    words = _FROM_SIDE.sub("", text).split()
    fitting = _select(words, objects, pool)
    rank = next((_RANKS[word] for word in words if word in _RANKS), 0)
    if side and rank:
        return sorted(fitting, key=lambda i: _VALUES[side[1]](objects[i]))[rank - 1 : rank]
    extreme = next((word for word in words if word in _VALUES), None)
    if extreme:
        return sorted(fitting, key=lambda i: _VALUES[extreme](objects[i]))[:1]
    number = next((_NUMBERS[word] for word in words if word in _NUMBERS), 2 * ("both" in words))
    if number and len(fitting) != number:
        raise AmbiguousError(f"{text!r} matches {len(fitting)} objects")
    is_plural = number or any(word in _ALL for word in words) or _has_plural_noun(words)
    if len(fitting) > 1 and not is_plural:
        raise AmbiguousError(f"{text!r} matches {len(fitting)} objects")
    return fitting


def _select(words: Sequence[str], objects: Sequence[SceneObject], pool: Sequence[int]) -> list[int]:
    """Keep the objects that have all attributes; an unknown word matches none."""
    pool = list(pool)
    for word in words:
        if word in (*_FILLERS, *_ALL, *_NUMBERS, *_RANKS, *_VALUES):
            continue
        forms = _singulars(word)
        if any(form in _ANY_SHAPE for form in forms):
            continue
        meanings = [
            (field, meanings[form])
            for field, meanings in _SYNONYMS.items()
            for form in forms
            if form in meanings
        ]
        if not meanings:
            return []
        field, value = meanings[0]
        pool = [i for i in pool if getattr(objects[i], field) == value]
    return pool


def _singulars(word: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys((word, word.removesuffix("s"), word.removesuffix("es"))))


def _has_plural_noun(words: Sequence[str]) -> bool:
    nouns = (*_ANY_SHAPE, *_SYNONYMS["shape"])
    return any(word not in nouns and set(_singulars(word)) & set(nouns) for word in words)


def _is_in_direction(relation: str, item: SceneObject, anchor: SceneObject) -> bool:
    (x, y), (anchor_x, anchor_y) = item.center, anchor.center
    return {
        "left of": x < anchor_x,
        "right of": x > anchor_x,
        "above": y < anchor_y,
        "higher up than": y < anchor_y,
        "below": y > anchor_y,
        "lower down than": y > anchor_y,
    }[relation]


def _squared_distance(item: SceneObject, other: SceneObject) -> float:
    x, y = item.center[0] - other.center[0], item.center[1] - other.center[1]
    return x * x + y * y


_LOCATION = re.compile(r"\bat (row\d+ col\d+)(?:,? (?:the )?((?:\w+ ){3}\w+))?")
_DISTANT = re.compile(r"\bat (row\d+ col\d+) (?:\w+ ){4}(\d+) away")
_STATED = re.compile(r"^(the .+) is (?:at (row\d+ col\d+)|(nowhere))$")
_MATCHING = re.compile(r"\bat (row\d+ col\d+) (?:\w+ ){4}matches")
_SIZED = re.compile(r"^the (largest|smallest) is (small|medium|large)$")
_CONCLUDED = re.compile(r"^the targets? (?:is|are) ")
_LISTED = re.compile(r"^the (.+?) candidates(?: from the (?:left|right|top|bottom))? are: (.+)$")


def false_statements(reasoning: str, objects: Sequence[SceneObject]) -> list[str]:
    """Find false statements of a reasoning.

    Checked are: locations (an object has its center there), attributes after a location, the
    location of a noun phrase, that a list of candidates has all matching objects and no others
    except the anchors, that its distances are in the right order, the size of the largest, and that
    the targets are the candidates marked as matching.

    Returns:
        One line per false statement.
    """
    reader = _ReasoningReader(objects)
    for sentence in reasoning.lower().split("."):
        reader.read(sentence.strip())
    return reader.found


class _ReasoningReader:
    """Reads a reasoning sentence by sentence and collects false statements in ``found``."""

    def __init__(self, objects: Sequence[SceneObject]) -> None:
        self.objects = objects
        self.at_location = {f"row{item.row} col{item.column}": i for i, item in enumerate(objects)}
        self.anchors: set[int] = set()
        self.listed: list[str] = []  # locations of the candidates
        self.matching: list[str] = []  # those marked as matching
        self.found: list[str] = []

    def read(self, sentence: str) -> None:
        """Check a sentence against the objects and the sentences before it."""
        locations = [location for location, _ in _LOCATION.findall(sentence)]
        self._check_attributes(sentence)
        if _CONCLUDED.match(sentence):
            if self.matching and locations != self.matching:
                self.found.append("the targets are not those that match")
        elif sized := _SIZED.match(sentence):
            known = [self.objects[i] for i in self._at(self.listed)]
            meant = min(known, key=_VALUES[sized[1]], default=None)
            if meant is None or meant.size != sized[2]:
                self.found.append(f"the {sized[1]} is not {sized[2]}")
        elif stated := _STATED.match(sentence):
            self._check_stated(stated)
        elif listed := _LISTED.match(sentence):
            self.listed, self.matching = locations, _MATCHING.findall(sentence)
            fitting = set(_select(listed[1].split(), self.objects, range(len(self.objects))))
            if not fitting - self.anchors <= set(self._at(locations)) <= fitting:
                self.found.append(f"the {listed[1]} candidates are others")
            self._check_distances(sentence)

    def _at(self, locations: Sequence[str]) -> list[int]:
        """Return the objects at locations; those without an object are left out."""
        return [self.at_location[each] for each in locations if each in self.at_location]

    def _check_attributes(self, sentence: str) -> None:
        for location, attributes in _LOCATION.findall(sentence):
            if location not in self.at_location:
                self.found.append(f"nothing is at {location}")
                continue
            item = self.objects[self.at_location[location]]
            name = f"{item.size} {item.texture} {item.color} {item.shape}"
            if attributes and attributes != name:
                self.found.append(f"at {location} is a {name}, not a {attributes}")

    def _check_stated(self, sentence: re.Match[str]) -> None:
        try:
            meant = _read_phrase(sentence[1], self.objects)
        except AmbiguousError as error:
            self.found.append(str(error))
            return
        stated = self._at([sentence[2]])
        if meant != stated and (sentence[3] or stated):
            self.found.append(f"{sentence[1]} is not there")
        self.anchors.update(meant)

    def _check_distances(self, sentence: str) -> None:
        stated = [(i, int(far)) for at, far in _DISTANT.findall(sentence) for i in self._at([at])]
        if stated and len(self.anchors) != 1:
            self.found.append(f"distances from {len(self.anchors)} anchors")
        elif stated:
            origin = self.objects[next(iter(self.anchors))]
            stated.sort(key=lambda pair: _squared_distance(self.objects[pair[0]], origin))
            self.found += [
                f"{self.objects[i].shape} {near} away is not nearer than "
                f"{self.objects[j].shape} {far} away"
                for (i, near), (j, far) in pairwise(stated)
                if near > far
            ]
