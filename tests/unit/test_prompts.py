import re
from functools import cache

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from coprs_deploy.conversion.policy_files import DEFAULT_PROMPTS
from coprs_deploy.conversion.random_policy import build_tokenizer
from coprs_deploy.errors import CoPRSError, InstructionError
from coprs_deploy.prompts import (
    LONGEST_BRIDGE,
    LONGEST_REASONING,
    REFERENCE_TOKEN,
    FormatViolation,
    PromptTemplate,
    check_instruction,
    encode_prompt,
    read_response,
)

PROPERTY = settings(derandomize=True, deadline=None, max_examples=100)
FAMILIES = ("qwen2_5_vl", "llava")
WRITABLE = st.characters(exclude_categories=["Cs"])

tokenizer_of = cache(build_tokenizer)
families = pytest.mark.parametrize("family", FAMILIES)


def encode(family, instruction, num_image_tokens=3):
    return encode_prompt(
        DEFAULT_PROMPTS[family], tokenizer_of(family), instruction, num_image_tokens
    )


def added_ids(family, ids):
    added = set(tokenizer_of(family).get_added_vocab().values())
    return [token for token in ids if token in added]


# Templates


def test_a_template_has_the_limits_of_the_paper():
    template = PromptTemplate("<image> {instruction}", "<image>")
    assert (template.max_prompt_tokens, template.max_response_tokens) == (1300, 2000)


@pytest.mark.parametrize(
    ("text", "culprit"),
    [
        ("<image> find it", "{instruction} 0 times"),
        ("<image> {instruction} {instruction}", "{instruction} 2 times"),
        ("find {instruction}", "<image> 0 times"),
        ("<image><image> {instruction}", "<image> 2 times"),
        ("", "{instruction} 0 times"),
    ],
)
def test_a_template_without_each_part_exactly_once_is_refused(text, culprit):
    with pytest.raises(ValueError, match=re.escape(culprit) + ".*exactly once"):
        PromptTemplate(text, "<image>")


@pytest.mark.parametrize("limit", ["max_prompt_tokens", "max_response_tokens"])
@pytest.mark.parametrize("value", [0, -1])
def test_a_template_without_room_is_refused(limit, value):
    with pytest.raises(ValueError, match=f"{limit}.* must be at least 1"):
        PromptTemplate("<image> {instruction}", "<image>", **{limit: value})


def test_a_template_with_an_empty_image_token_is_refused():
    with pytest.raises(ValueError, match="exactly once"):
        PromptTemplate("<image> {instruction}", "")


def test_a_template_survives_json():
    template = DEFAULT_PROMPTS["qwen2_5_vl"]
    assert PromptTemplate.from_json(template.to_json()) == template


# Instructions


def test_blanks_around_an_instruction_are_cut():
    assert check_instruction("\n\t  the red  cup \u3000") == "the red  cup"


@pytest.mark.parametrize("instruction", ["", "   ", "\n\t", "\u3000\u00a0"])
def test_a_blank_instruction_is_refused(instruction):
    with pytest.raises(InstructionError, match="empty; say what to segment"):
        check_instruction(instruction)
    with pytest.raises(InstructionError, match="empty; say what to segment"):
        encode("llava", instruction)


@pytest.mark.parametrize("instruction", [None, 3, b"the cup", ["the cup"]])
def test_an_instruction_of_another_type_is_refused(instruction):
    with pytest.raises(InstructionError, match=f"{type(instruction).__name__}; accepted: a str"):
        encode("llava", instruction)


# Encoding


@families
@pytest.mark.parametrize("num_image_tokens", [1, 2, 900])
def test_the_image_placeholder_is_repeated_where_it_stands(family, num_image_tokens):
    template, tokenizer = DEFAULT_PROMPTS[family], tokenizer_of(family)
    ids = encode(family, "the red cup", num_image_tokens)
    image_id = tokenizer.convert_tokens_to_ids(template.image_token)
    assert ids.count(image_id) == num_image_tokens
    start = ids.index(image_id)
    assert ids[start : start + num_image_tokens] == [image_id] * num_image_tokens
    before, after = template.text.replace("{instruction}", "the red cup").split(
        template.image_token
    )
    assert tokenizer.decode(ids[:start]) == before
    assert tokenizer.decode(ids[start + num_image_tokens :]) == after


@families
@PROPERTY
@given(instruction=st.text(WRITABLE, max_size=60))
def test_ordinary_text_is_encoded_as_the_tokenizer_would(family, instruction):
    tokenizer, template = tokenizer_of(family), DEFAULT_PROMPTS[family]
    assume(instruction.strip())
    assume(not any(token in instruction for token in tokenizer.get_added_vocab()))
    joint = template.text.replace("{instruction}", instruction.strip())
    expected = tokenizer(joint, add_special_tokens=False)["input_ids"]
    assert encode(family, instruction, 1) == expected


def smuggling(family):
    added = sorted(tokenizer_of(family).get_added_vocab())
    halves = [half for token in added for half in (token[:3], token[3:], token[:-1], token[-1:])]
    pieces = st.one_of(
        st.sampled_from(added),
        st.sampled_from(halves),
        st.sampled_from(["{instruction}", "the cup", " ", "\n", "<", ">", "|"]),
        st.text(WRITABLE, max_size=4),
    )
    return st.lists(pieces, min_size=1, max_size=8).map("".join)


@families
@PROPERTY
@given(data=st.data())
def test_no_added_token_can_be_smuggled_in(family, data):
    instruction = data.draw(smuggling(family))
    assume(instruction.strip())
    template, tokenizer = DEFAULT_PROMPTS[family], tokenizer_of(family)
    ids = encode(family, instruction, 2)
    assert added_ids(family, ids) == added_ids(family, encode(family, "the cup", 2))
    written = template.text.replace(template.image_token, 2 * template.image_token)
    head, tail = written.split("{instruction}")
    assert tokenizer.decode(ids) == head + instruction.strip() + tail


@families
def test_every_added_token_stays_text_alone_and_inside_a_sentence(family):
    ordinary = added_ids(family, encode(family, "the cup"))
    vocabulary = tokenizer_of(family).get_added_vocab()
    assert {REFERENCE_TOKEN, "<think>", "</think>", DEFAULT_PROMPTS[family].image_token} <= set(
        vocabulary
    )
    for token in vocabulary:
        for instruction in (token, f"a {token} b", token * 3, f"<{token}>", token[0] + token):
            ids = encode(family, instruction)
            assert added_ids(family, ids) == ordinary
            assert instruction in tokenizer_of(family).decode(ids)


@families
def test_a_smuggled_token_leaves_the_rest_of_the_prompt_as_it_is(family):
    plain, attacked = encode(family, "the cup"), encode(family, f"a {REFERENCE_TOKEN} b")
    think = tokenizer_of(family).convert_tokens_to_ids("<think>")
    assert attacked[attacked.index(think) :] == plain[plain.index(think) :]
    image = tokenizer_of(family).convert_tokens_to_ids(DEFAULT_PROMPTS[family].image_token)
    assert attacked[: attacked.index(image) + 3] == plain[: plain.index(image) + 3]


@families
def test_the_letters_of_the_placeholder_in_an_instruction_are_not_filled_in(family):
    for instruction in ("a {instruction} b", f"a {{instruction}} {REFERENCE_TOKEN}"):
        assert instruction in tokenizer_of(family).decode(encode(family, instruction))


def test_no_added_token_arises_between_template_and_instruction():
    tokenizer = tokenizer_of("llava")
    template = PromptTemplate("<image> Find <{instruction}> now", "<image>")
    ids = encode_prompt(template, tokenizer, "REF_POS", 1)
    assert tokenizer.convert_tokens_to_ids(REFERENCE_TOKEN) not in ids


def test_an_image_token_that_the_tokenizer_lacks_is_refused():
    with pytest.raises((ValueError, CoPRSError), match="<image>"):
        encode_prompt(DEFAULT_PROMPTS["llava"], tokenizer_of("qwen2_5_vl"), "the cup", 5)


def test_an_instruction_that_is_no_unicode_text_is_refused():
    with pytest.raises(InstructionError):
        encode("llava", "the \ud800 cup")


def test_a_tokenizer_that_starts_texts_with_a_token_adds_none():
    tokenizer = build_tokenizer("llava")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", tokenizer.eos_token_id)]
    )
    assert tokenizer("x")["input_ids"][0] == tokenizer.eos_token_id
    for instruction in ("the cup", "a </s> b"):
        ids = encode_prompt(DEFAULT_PROMPTS["llava"], tokenizer, instruction, 3)
        assert ids == encode("llava", instruction)


def test_an_added_token_that_starts_with_another_one_is_taken_whole():
    tokenizer = build_tokenizer("llava")
    tokenizer.add_tokens(["<seg", "<seg>", "<seg>>"])
    short, middle, long = tokenizer.convert_tokens_to_ids(["<seg", "<seg>", "<seg>>"])
    template = PromptTemplate("<image> <seg> {instruction} <seg>> <seg", "<image>")
    for instruction in ("the cup", "<seg>>", "<seg> <seg"):
        ids = encode_prompt(template, tokenizer, instruction, 1)
        assert [t for t in ids if t in (short, middle, long)] == [middle, long, short]
        assert tokenizer.decode(ids) == template.text.replace("{instruction}", instruction)


# Limits


@families
def test_the_longest_prompt_has_exactly_the_limit(family):
    exact = len(encode(family, "the red cup on the left", 10))
    settings_of = DEFAULT_PROMPTS[family].to_json()
    fits = PromptTemplate.from_json({**settings_of, "max_prompt_tokens": exact})
    assert len(encode_prompt(fits, tokenizer_of(family), "the red cup on the left", 10)) == exact
    for lacking in (1, 7):
        short = PromptTemplate.from_json({**settings_of, "max_prompt_tokens": exact - lacking})
        with pytest.raises(
            InstructionError,
            match=rf"has {exact} tokens, the limit is {exact - lacking} \(10 .*by {lacking}\b",
        ):
            encode_prompt(short, tokenizer_of(family), "the red cup on the left", 10)


def test_an_image_that_fills_the_prompt_alone_is_named_as_the_cause():
    with pytest.raises(InstructionError) as refusal:
        encode("llava", "the cup", 5_000)
    assert "shorten the instruction" not in str(refusal.value)


# Reading a response, one letter a token

REFERENCE_ID = 0


def ids_of(*pieces):
    ids = []
    for number, piece in enumerate(pieces):
        ids += [REFERENCE_ID] if number else []
        ids += map(ord, piece)
    return ids


def read(*pieces):
    return read_response(ids_of(*pieces), REFERENCE_ID, lambda ids: "".join(map(chr, ids)))


def test_a_response_in_form_has_no_faults():
    response = read("<think>it is red</think> ", "")
    assert response.text == "<think>it is red</think> <REF_POS>"
    assert response.reasoning == "it is red"
    assert response.reference_positions == (25,)
    assert response.faults == ()


THOUGHT = "<think>it is red</think>"
MINOR = {
    FormatViolation.LONG_THOUGHT,
    FormatViolation.TEXT_BEFORE_THOUGHT,
    FormatViolation.TEXT_AFTER_REFERENCE,
    FormatViolation.LONG_BRIDGE,
}

RESPONSES = [
    (("it is red", ""), [FormatViolation.NO_THOUGHT]),
    (("<think>it is red", ""), [FormatViolation.NO_THOUGHT]),
    (("it is red</think>", ""), [FormatViolation.NO_THOUGHT]),
    (("</think>red<think>", ""), [FormatViolation.NO_THOUGHT]),
    (("<THINK>red</THINK>", ""), [FormatViolation.NO_THOUGHT]),
    ((THOUGHT + THOUGHT, ""), [FormatViolation.SEVERAL_THOUGHTS]),
    (("<think>a<think>b</think>", ""), [FormatViolation.SEVERAL_THOUGHTS]),
    (("<think>a</think></think>", ""), [FormatViolation.SEVERAL_THOUGHTS]),
    (("<think></think>", ""), [FormatViolation.BLANK_THOUGHT]),
    (("<think> \n\t</think>", ""), [FormatViolation.BLANK_THOUGHT]),
    ((THOUGHT,), [FormatViolation.NO_REFERENCE]),
    (("",), [FormatViolation.NO_THOUGHT, FormatViolation.NO_REFERENCE]),
    (("", ""), [FormatViolation.NO_THOUGHT]),
    ((THOUGHT, "", ""), [FormatViolation.SEVERAL_REFERENCES]),
    ((THOUGHT, " and ", " and ", ""), [FormatViolation.SEVERAL_REFERENCES]),
    (("", THOUGHT), [FormatViolation.REFERENCE_BEFORE_THOUGHT, FormatViolation.TEXT_AFTER_REFERENCE]),
    (("<think>it", "is red</think>", ""), [
        FormatViolation.SEVERAL_REFERENCES,
        FormatViolation.REFERENCE_BEFORE_THOUGHT,
    ]),
    (("Well: " + THOUGHT, ""), [FormatViolation.TEXT_BEFORE_THOUGHT]),
    ((" \n" + THOUGHT, ""), []),
    ((THOUGHT, " there"), [FormatViolation.TEXT_AFTER_REFERENCE]),
    ((THOUGHT, " \n"), []),
    ((THOUGHT + " w" * LONGEST_BRIDGE, ""), []),
    ((THOUGHT + " w" * (LONGEST_BRIDGE + 1), ""), [FormatViolation.LONG_BRIDGE]),
    ((THOUGHT + " w" * (LONGEST_BRIDGE + 1),), [FormatViolation.NO_REFERENCE]),
    ((f"<think>{'x' * LONGEST_REASONING}</think>", ""), []),
    ((f"<think>{'x' * (LONGEST_REASONING + 1)}</think>", ""), [FormatViolation.LONG_THOUGHT]),
    (("a <think>\n</think>" + " w" * 11, " z", "z"), [
        FormatViolation.BLANK_THOUGHT,
        FormatViolation.SEVERAL_REFERENCES,
        FormatViolation.TEXT_BEFORE_THOUGHT,
        FormatViolation.TEXT_AFTER_REFERENCE,
        FormatViolation.LONG_BRIDGE,
    ]),
]  # fmt: skip


@pytest.mark.parametrize(("pieces", "faults"), RESPONSES)
def test_faults_are_found_in_their_order(pieces, faults):
    assert list(read(*pieces).faults) == faults


def test_every_fault_has_a_response_that_shows_it():
    assert {fault for _, faults in RESPONSES for fault in faults} == set(FormatViolation)


def test_only_faults_of_style_are_not_fatal():
    assert {fault for fault in FormatViolation if not fault.is_fatal} == MINOR


@pytest.mark.parametrize(
    ("pieces", "reasoning"),
    [
        (("<think> it\nis red </think>", " there"), "it\nis red"),
        (("so <think>one</think><think>two</think>", ""), "one"),
        (("<think>it is", " red</think>", ""), "it is red"),
        (("so <think>it is cut", ), "it is cut"),
        ((" no thought ", " at all "), "no thought  at all"),
        (("<think></think>", ""), ""),
        (("", ""), ""),
    ],
)  # fmt: skip
def test_reasoning_is_the_thought_or_all_that_there_is(pieces, reasoning):
    assert read(*pieces).reasoning == reasoning


def test_the_reasoning_of_a_thought_that_was_only_opened_is_empty():
    assert read("<think>").reasoning == ""


@PROPERTY
@given(
    pieces=st.lists(
        st.text(st.sampled_from("ab \n<>"), max_size=5)
        | st.sampled_from(["<think>", "</think>", REFERENCE_TOKEN, THOUGHT]),
        min_size=1,
        max_size=5,
    )
)
def test_positions_and_text_follow_the_tokens(pieces):
    response = read(*pieces)
    ids = ids_of(*pieces)
    assert list(response.reference_positions) == [
        place for place, token in enumerate(ids) if token == REFERENCE_ID
    ]
    assert response.text == REFERENCE_TOKEN.join(pieces)
    assert (FormatViolation.NO_REFERENCE in response.faults) == (len(pieces) == 1)
    assert (FormatViolation.SEVERAL_REFERENCES in response.faults) == (len(pieces) > 2)
    assert "<think>" not in response.reasoning or FormatViolation.NO_THOUGHT in response.faults or (
        FormatViolation.SEVERAL_THOUGHTS in response.faults
    )  # fmt: skip
    order = list(FormatViolation)
    assert list(response.faults) == sorted(response.faults, key=order.index)


def test_the_letters_of_the_token_are_not_the_token():
    response = read(f"{THOUGHT} {REFERENCE_TOKEN}")
    assert response.reference_positions == ()
    assert response.faults == (FormatViolation.NO_REFERENCE,)


@families
def test_a_response_is_read_with_a_real_tokenizer(family):
    tokenizer = tokenizer_of(family)
    reference_id = tokenizer.convert_tokens_to_ids(REFERENCE_TOKEN)
    end_id = tokenizer.eos_token_id
    letters = [tokenizer.convert_tokens_to_ids(letter) for letter in REFERENCE_TOKEN]
    thought = tokenizer("<think> the é, as <", add_special_tokens=False)["input_ids"]
    closing = tokenizer("</think>", add_special_tokens=False)["input_ids"]
    ids = [*thought, *letters, *closing, reference_id, reference_id, end_id]

    def decode(token_ids):
        return tokenizer.decode(token_ids, skip_special_tokens=True)

    response = read_response(ids, reference_id, decode)
    assert response.text == "<think> the é, as <<REF_POS></think><REF_POS><REF_POS>"
    assert response.reasoning == "the é, as <<REF_POS>"
    assert response.reference_positions == (len(ids) - 3, len(ids) - 2)
    assert response.faults == (FormatViolation.SEVERAL_REFERENCES,)
