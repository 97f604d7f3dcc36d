"""Questions, reasoning and their verifier: each question of many scenes is read back."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coprs_deploy.data.synthetic import (
    FULL,
    PLAIN,
    PRESETS,
    make_scene,
    vocabulary,
)
from coprs_deploy.data.synthetic import (
    scene as scene_module,
)
from coprs_deploy.data.synthetic.expressions import Description, Expression, UnclearError, resolve
from coprs_deploy.data.synthetic.presets import QUESTION_TYPES
from coprs_deploy.data.synthetic.questions import ask_questions
from coprs_deploy.data.synthetic.reasoning import write_reasoning
from coprs_deploy.data.synthetic.rng import PortableRng
from coprs_deploy.data.synthetic.scene import SceneObject
from coprs_deploy.data.synthetic.wording import SYNONYMS, phrase, write_instruction
from coprs_deploy.prompts import REFERENCE_TOKEN
from tests.unit.data.synthetic.verifier import AmbiguousError, false_statements, read_instruction

# fmt: off
UNKNOWN_THINGS = (
    "elephant", "guitar", "sandwich", "airplane", "umbrella", "kite", "zebra", "pizza",
    "suitcase", "robot", "candle", "ladder", "bear", "truck", "keyboard", "mirror", "rabbit",
    "tower", "cylinder", "octagon",
)
# fmt: on
"""Nouns that no scene and no generated question has."""

NUM_SCENES = {"plain": 1600, "full": 700}
QUESTIONS_PER_SCENE = 3


@pytest.fixture(scope="module")
def questions():
    """Scenes, not rendered to save time, with their questions: a list of pairs by preset."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            scene_module, "render", lambda layout, preset, rng: np.zeros((1, 1, 3), np.uint8)
        )
        for preset in (PLAIN, FULL):
            found[preset.name] = [
                (scene, question)
                for seed in range(NUM_SCENES[preset.name])
                for scene in [make_scene(preset, seed)]
                for question in ask_questions(scene, preset, seed, QUESTIONS_PER_SCENE)
            ]
    return found


GOLDEN = {"plain": "a2a8fa86dc901b95", "full": "1b7ea08bf869c0c1"}


@pytest.mark.parametrize("preset", [PLAIN, FULL], ids=lambda preset: preset.name)
def test_seeds_give_the_recorded_questions(preset):
    """Questions must not change with the machine or with the version of Python or numpy."""
    rows = [
        [question.instruction, question.question_type, question.targets, question.reasoning]
        for seed in range(50)
        for question in ask_questions(make_scene(preset, seed), preset, seed)
    ]
    assert len(rows) == 50
    digest = hashlib.blake2b(msgspec.json.encode(rows), digest_size=8).hexdigest()
    assert digest == GOLDEN[preset.name]


preset_names = pytest.mark.parametrize("name", ["plain", "full"])


@preset_names
def test_verifier_finds_the_targets_of_every_question(questions, name):
    assert len(questions[name]) > 2.5 * NUM_SCENES[name]
    for scene, question in questions[name]:
        found = read_instruction(question.instruction, scene.objects)
        assert found == question.targets, question.instruction


@preset_names
def test_verifier_finds_no_false_statement_in_the_reasoning(questions, name):
    for scene, question in questions[name]:
        assert false_statements(question.reasoning, scene.objects) == [], question.reasoning


@preset_names
def test_questions_stay_unambiguous_after_small_shifts_of_objects(questions, name):
    """Shifts by an eighth of the clear distance must not change the targets."""
    preset = PRESETS[name]
    shift = preset.clear_distance * preset.image_size / 8
    random = np.random.default_rng(1)
    for scene, question in questions[name][::3]:
        moved = [
            replace(item, center=tuple(np.add(item.center, random.uniform(-shift, shift, 2))))
            for item in scene.objects
        ]
        assert read_instruction(question.instruction, moved) == question.targets


@preset_names
def test_question_has_as_many_targets_as_its_type(questions, name):
    for _, question in questions[name]:
        accepted = {"none": (0,), "several": (2, 3, 4)}.get(question.question_type, (1,))
        assert len(question.targets) in accepted
        assert list(question.targets) == sorted(set(question.targets))


@preset_names
def test_response_has_reasoning_then_one_reference_per_target(questions, name):
    for _, question in questions[name]:
        reasoning, _, ending = question.response.partition("</think> ")
        assert reasoning == f"<think>{question.reasoning}" and "<" not in question.reasoning
        references = [REFERENCE_TOKEN] * len(question.targets)
        assert ending == (" ".join(references) or "nothing matches")


@preset_names
def test_reasoning_ends_with_location_and_attributes_of_the_targets(questions, name):
    for scene, question in questions[name]:
        targets = [scene.objects[i] for i in question.targets]
        listed = ", ".join(f"at {item.location}, the {item.name}" for item in targets)
        verb = "targets are" if len(targets) > 1 else "target is"
        assert question.reasoning.endswith(f"The {verb} {listed or 'nowhere'}.")


@preset_names
def test_preset_asks_each_of_its_question_types(questions, name):
    weights = PRESETS[name].question_type_weights
    counts = Counter(question.question_type for _, question in questions[name])
    assert set(counts) == set(weights)
    assert min(counts.values()) > 0.04 * len(questions[name])


def test_presets_cover_all_question_types():
    assert (
        set(FULL.question_type_weights) == set(QUESTION_TYPES) >= set(PLAIN.question_type_weights)
    )


def test_plain_instructions_are_noun_phrases_in_canonical_terms(questions):
    others = {word for words in SYNONYMS.values() for word in words[1:]}
    for _, question in questions["plain"]:
        assert re.fullmatch(r"the [a-z ]+", question.instruction)
        assert not others & set(question.instruction.split())


def test_full_instructions_use_every_wording(questions):
    texts = [question.instruction for _, question in questions["full"]]
    joined = " ".join(texts).lower()
    assert not [word for words in SYNONYMS.values() for word in words if word not in joined]
    for start in ("the ", "Segment ", "Where is ", "Where are ", "Could you ", "I need "):
        assert any(text.startswith(start) for text in texts), start
    for part in (
        "all ",
        "every ",
        "each ",
        "both ",
        "the two ",
        "the three ",
        " that is ",
        " with ",
    ):
        assert part in joined, part
    assert len(set(texts)) > 0.9 * len(texts)


def test_reasoning_uses_canonical_terms_only(questions):
    others = {word for words in SYNONYMS.values() for word in words[1:]}
    for _, question in questions["full"]:
        assert not others & set(re.findall(r"[a-z-]+", question.reasoning.lower()))


def test_two_step_questions_have_chains_and_conjunctions(questions):
    texts = [q.instruction for _, q in questions["full"] if q.question_type == "two_step"]
    joined = [" and " in text for text in texts]
    assert 0.2 < sum(joined) / len(joined) < 0.8


def test_no_match_questions_fail_in_every_way(questions):
    reasonings = [q.reasoning for _, q in questions["full"] if q.question_type == "none"]
    ways = {
        "an unknown noun": r"There is no such shape\.",
        "no such object": r"The [a-z ]+ is nowhere\. The target",
        "no candidates": r"candidates are: none\.",
        "candidates elsewhere": r"candidates are: at .*\. The target",
        "too few to count": r"candidates from the \w+ are: at ",
    }
    for way, pattern in ways.items():
        assert any(re.search(pattern, text) for text in reasonings), way


@settings(max_examples=25, derandomize=True, deadline=None)
@given(st.integers(0, 2**40), st.integers(1, 6))
def test_ask_questions_is_repeatable_and_returns_different_questions(seed, count):
    scene = make_scene(PLAIN, seed)
    questions = ask_questions(scene, PLAIN, seed, count)
    assert questions == ask_questions(scene, PLAIN, seed, count)
    assert 1 <= len(questions) <= count
    assert len({question.instruction for question in questions}) == len(questions)


def test_ask_questions_with_count_0_is_refused():
    with pytest.raises(ValueError, match="count is 0"):
        ask_questions(make_scene(PLAIN, 1), PLAIN, 1, 0)


@pytest.mark.parametrize("question_type", QUESTION_TYPES)
def test_preset_with_one_question_type_asks_only_that(question_type):
    preset = msgspec.structs.replace(FULL, question_type_weights={question_type: 1.0})
    found = [ask_questions(make_scene(preset, seed), preset, seed)[0] for seed in range(8)]
    # A scene without such a question gives a no-match question.
    assert {question.question_type for question in found} <= {question_type, "none"}
    assert question_type in {question.question_type for question in found}


def test_unknown_nouns_match_nothing():
    everything = {*vocabulary.FULL_SHAPES, *(w for words in SYNONYMS.values() for w in words)}
    assert not everything & {*vocabulary.THINGS, *UNKNOWN_THINGS}
    assert not set(vocabulary.THINGS) & set(UNKNOWN_THINGS)
    objects = make_scene(FULL, 1).objects
    for thing in UNKNOWN_THINGS:
        assert read_instruction(f"Where is the {thing}?", objects) == ()


def item(name: str, x: float, y: float) -> SceneObject:
    """Make an object from a name such as "large striped red circle" and its center in pixels."""
    size, texture, color, shape = name.split()
    radius = {"small": 10.0, "medium": 14.0, "large": 20.0}[size]
    row, column = int(y // 16) + 1, int(x // 16) + 1
    return SceneObject(shape, color, texture, size, (x, y), radius, row, column, (0, 0, 1, 1), 1.0)


TABLE = (
    item("small plain red circle", 20, 20),
    item("large plain blue star", 70, 24),
    item("small striped red circle", 110, 40),
    item("medium plain red square", 64, 70),
    item("large striped green circle", 24, 100),
    item("medium plain blue circle", 90, 108),
)
"""In reading order; distances of less than 14 pixels are unclear."""

BLUE_STAR = Expression(Description(color="blue", shape="star"))
CIRCLE = Description(shape="circle")


@pytest.mark.parametrize(
    ("expression", "text", "targets"),
    [
        (Expression(Description(shape="square")), "the square", (3,)),
        (Expression(Description(texture="striped", color="red")), "the striped red shape", (2,)),
        (Expression(CIRCLE, extreme="rightmost"), "the rightmost circle", (2,)),
        (Expression(CIRCLE, extreme="largest"), "the largest circle", (4,)),
        (Expression(CIRCLE, rank=2, side="top"), "the second circle from the top", (2,)),
        (
            Expression(Description(shape="square"), rank=2, side="top"),
            "the second square from the top",
            (),
        ),
        (
            Expression(Description(color="red"), (("left of", BLUE_STAR),)),
            "the red shape left of the blue star",
            None,  # the red square lies 6 pixels left of it
        ),
        (
            Expression(Description(shape="square"), (("left of", BLUE_STAR),)),
            "the square left of the blue star",
            None,  # the same one
        ),
        (
            Expression(
                Description(shape="star"),
                (("left of", Expression(Description("medium", color="red"))),),
            ),
            "the star left of the medium red shape",
            (),  # 6 pixels right of it is clearly not left
        ),
        (
            Expression(Description(color="red"), (("nearest to", BLUE_STAR),)),
            "the red shape nearest to the blue star",
            None,  # 43 and 46 pixels
        ),
        (
            Expression(Description(shape="square"), (("nearest to", BLUE_STAR),)),
            "the square nearest to the blue star",
            (3,),
        ),
        (
            Expression(
                CIRCLE,
                (
                    ("right of", BLUE_STAR),
                    ("above", Expression(Description("medium", "plain", "red"))),
                ),
            ),
            "the circle right of the blue star and above the medium plain red shape",
            (2,),
        ),
        (
            Expression(
                CIRCLE,
                (("left of", Expression(Description(shape="square"), (("below", BLUE_STAR),))),),
            ),
            "the circle left of the square that is below the blue star",
            None,  # two circles are
        ),
        (
            Expression(
                CIRCLE, (("left of", Expression(Description(shape="square"))),), is_plural=True
            ),
            "all circle left of the square",
            (0, 4),
        ),
        (
            Expression(CIRCLE, (("left of", Expression(Description(shape="ring"))),)),
            "the circle left of the ring",
            (),
        ),
        (Expression(CIRCLE), "the circle", None),
        (Expression(Description(shape="cat")), "the cat", ()),
    ],
)
def test_resolve_and_verifier_agree_on_an_expression(expression, text, targets):
    assert phrase(expression).replace("circles", "circle") == text
    if targets is None:
        with pytest.raises(UnclearError):
            resolve(expression, TABLE, 14)
    else:
        assert resolve(expression, TABLE, 14) == targets
        assert read_instruction(phrase(expression), TABLE) == targets


def test_reasoning_of_a_chain_starts_at_its_end():
    square = Expression(Description(shape="square"), (("below", BLUE_STAR),))
    chain = Expression(Description("small", shape="circle"), (("left of", square),))
    assert phrase(chain) == "the small circle left of the square that is below the blue star"
    assert resolve(chain, TABLE, 14) == (0,)
    assert write_reasoning(chain, TABLE, 14) == (
        "The blue star is at row2 col5. The square below the blue star is at row5 col5. "
        "The small circle candidates are: at row2 col2 small plain red circle, at row3 col7 small "
        "striped red circle. The target is at row2 col2, the small plain red circle."
    )


def test_reasoning_of_a_plural_lists_all_targets():
    expression = Expression(
        Description(color="red"), (("above", Expression(Description(shape="square"))),)
    )
    plural = replace(expression, is_plural=True)
    assert write_reasoning(plural, TABLE, 14) == (
        "The square is at row5 col5. The red shape candidates are: at row2 col2 small plain red "
        "circle, at row3 col7 small striped red circle. The targets are at row2 col2, the small "
        "plain red circle, at row3 col7, the small striped red circle."
    )


@pytest.mark.parametrize(
    ("instruction", "targets"),
    [
        ("Where are the red circles?", (0, 2)),
        ("I need both red circles only.", (0, 2)),
        ("mark every circle, please", (0, 2, 4, 5)),
        ("Show me the disc with stripes that is green.", (4,)),
        ("can you find the furthest left thing?", (0,)),
        ("the little object to the right of the big azure star", ()),
        ("the little object to the right of the big blue star", (2,)),
    ],
)
def test_read_instruction_of_a_paraphrase_returns_its_targets(instruction, targets):
    assert read_instruction(instruction, TABLE) == targets


@pytest.mark.parametrize("instruction", ["the circle", "the three red circles", "both circles"])
def test_read_instruction_of_an_ambiguous_text_is_refused(instruction):
    with pytest.raises(AmbiguousError, match="matches"):
        read_instruction(instruction, TABLE)


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("The square is at row5 col5.", None),
        ("The square is at row4 col5.", "nothing is at row4 col5"),
        ("The square is at row2 col2.", "the square is not there"),
        ("The square is nowhere.", "the square is not there"),
        ("The ring is nowhere.", None),
        ("The ring is at row2 col2.", "the ring is not there"),
        ("The circle is at row2 col2.", "matches 4 objects"),
        ("The star candidates are: at row2 col5 large plain blue star.", None),
        ("The star candidates are: at row2 col5 small plain blue star.", "is a large plain"),
        ("The star candidates are: none.", "the star candidates are others"),
        ("The ring candidates are: none.", None),
        ("The target is at row2 col5, the large plain red star.", "is a large plain blue star"),
    ],
)
def test_false_statements_finds_a_wrong_statement(statement, expected):
    found = false_statements(statement, TABLE)
    assert found == [] if expected is None else expected in " ".join(found)


def test_paraphrases_of_one_expression_have_the_same_targets():
    expression = Expression(Description("small", "striped", "red", "circle"))
    texts = {
        write_instruction(expression, 1, FULL, PortableRng("test", seed)) for seed in range(200)
    }
    assert len(texts) > 60
    assert {read_instruction(text, TABLE) for text in texts} == {(2,)}


def test_reasoning_of_nearest_states_the_distances():
    green = Expression(Description(color="green"))
    nearest = Expression(Description(color="red"), (("nearest to", green),))
    assert write_reasoning(nearest, TABLE, 14) == (
        "The green shape is at row7 col2. The red shape candidates are: at row2 col2 small plain "
        "red circle 5 away, at row3 col7 small striped red circle 7 away, at row5 col5 medium "
        "plain red square 3 away. The target is at row5 col5, the medium plain red square."
    )


def test_reasoning_states_comparisons_if_the_preset_shows_them():
    square = Expression(Description(shape="square"))
    red_above = Expression(Description(color="red"), (("above", square), ("left of", BLUE_STAR)))
    assert write_reasoning(red_above, TABLE, 14, shows_comparisons=True) == (
        "The square is at row5 col5. The blue star is at row2 col5. The red shape candidates are: "
        "at row2 col2 small plain red circle matches, at row3 col7 small striped red circle. "
        "The target is at row2 col2, the small plain red circle."
    )
    smallest = Expression(Description(color="blue"), extreme="smallest")
    assert write_reasoning(smallest, TABLE, 14, shows_comparisons=True) == (
        "The blue shape candidates are: at row2 col5 large plain blue star, at row7 col6 medium "
        "plain blue circle. The smallest is medium. The target is at row7 col6, the medium plain "
        "blue circle."
    )
    leftmost = Expression(Description(color="blue"), extreme="leftmost")
    for plain in (leftmost, smallest):
        assert "smallest" not in write_reasoning(plain, TABLE, 14)
    assert write_reasoning(leftmost, TABLE, 14, shows_comparisons=True) == write_reasoning(
        leftmost, TABLE, 14
    )


def test_only_the_full_preset_shows_comparisons(questions):
    def share(name, words):
        return np.mean([words in question.reasoning for _, question in questions[name]])

    for words in (" matches", "The largest is"):
        assert share("plain", words) == 0
        assert share("full", words) > 0.01


@pytest.mark.parametrize(
    ("conclusion", "expected"),
    [
        ("The target is at row2 col2, the small plain red circle.", None),
        ("The target is nowhere.", "the targets are not those that match"),
        ("The target is at row3 col7, the small striped red circle.", "the targets are not those"),
        ("The largest is small. The target is at row2 col2.", None),
        ("The smallest is medium. The target is at row2 col2.", "the smallest is not medium"),
    ],
)
def test_false_statements_finds_a_conclusion_that_contradicts_a_comparison(conclusion, expected):
    listed = "at row2 col2 small plain red circle matches, at row3 col7 small striped red circle"
    found = false_statements(f"The red circle candidates are: {listed}. {conclusion}", TABLE)
    assert found == [] if expected is None else expected in " ".join(found)


@pytest.mark.parametrize(
    ("distances", "expected"),
    [((5, 7), None), ((7, 7), None), ((8, 7), "circle 8 away is not nearer than circle 7 away")],
)
def test_false_statements_finds_distances_in_wrong_order(distances, expected):
    listed = "at row2 col2 small plain red circle {} away, at row3 col7 small striped red circle {}"
    found = false_statements(
        "The green shape is at row7 col2. The red circle candidates are: "
        f"{listed.format(*distances)} away.",
        TABLE,
    )
    assert found == ([] if expected is None else [expected])


def test_false_statements_finds_distances_without_an_anchor():
    listed = "at row2 col2 small plain red circle 6 away, at row3 col7 small striped red circle."
    text = f"The red circle candidates are: {listed}"
    assert false_statements(text, TABLE) == ["distances from 0 anchors"]


@pytest.mark.parametrize("seed", range(30))
def test_nearest_target_has_the_only_smallest_distance(seed):
    preset = msgspec.structs.replace(FULL, question_type_weights={"nearest": 1.0})
    scene = make_scene(preset, seed)
    for question in ask_questions(scene, preset, seed, 3):
        if question.question_type != "nearest":
            continue
        numbers = [int(number) for number in re.findall(r"(\d+) away", question.reasoning)]
        locations = re.findall(r"at (row\d+ col\d+) [a-z ]+\d+ away", question.reasoning)
        assert numbers.count(min(numbers)) == 1
        (target,) = question.targets
        assert locations[numbers.index(min(numbers))] == scene.objects[target].location
