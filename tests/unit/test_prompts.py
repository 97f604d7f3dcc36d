"""Prompt encoding without token injection, and response parsing."""

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
    MAX_INSTRUCTION_CHARS,
    MAX_REASONING_CHARS,
    MAX_WORDS_BETWEEN,
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


def test_template_default_limits_are_those_of_the_paper():
    template = PromptTemplate("<image> {instruction}", "<image>")
    assert (template.max_prompt_tokens, template.max_response_tokens) == (1300, 2000)


def test_template_without_a_tail_has_that_of_the_demo_model():
    template = PromptTemplate.from_json({"text": "<image> {instruction}", "image_token": "<image>"})
    assert template.reference_tail == "</think> <REF_POS>"
    assert template.reference_separator == " "


def test_template_tail_without_a_space_is_accepted():
    tail = "</think><REF_POS>"
    template = PromptTemplate("<image> {instruction}", "<image>", reference_tail=tail)
    assert template.reference_tail == tail


@pytest.mark.parametrize(
    "tail",
    [
        "",
        "</think>",
        "<REF_POS>",
        " </think> <REF_POS>",
        "</think> <REF_POS>.",
        "</think> <REF_POS> <REF_POS>",
        "</think> </think> <REF_POS>",
    ],
)
def test_template_with_another_tail_than_one_reference_is_refused(tail):
    with pytest.raises(ValueError, match="accepted: text that starts with </think>"):
        PromptTemplate("<image> {instruction}", "<image>", reference_tail=tail)


def test_template_with_a_reference_in_the_separator_is_refused():
    with pytest.raises(ValueError, match=r"reference_separator is ', <REF_POS>'; accepted: text w"):
        PromptTemplate("<image> {instruction}", "<image>", reference_separator=", <REF_POS>")


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("<image> find it", "{instruction} 0 times"),
        ("<image> {instruction} {instruction}", "{instruction} 2 times"),
        ("find {instruction}", "<image> 0 times"),
        ("<image><image> {instruction}", "<image> 2 times"),
        ("", "{instruction} 0 times"),
    ],
)
def test_template_with_a_part_missing_or_repeated_is_refused(text, count):
    with pytest.raises(ValueError, match=re.escape(count) + ".*exactly once"):
        PromptTemplate(text, "<image>")


@pytest.mark.parametrize("limit", ["max_prompt_tokens", "max_response_tokens"])
@pytest.mark.parametrize("value", [0, -1])
def test_template_with_a_limit_below_one_is_refused(limit, value):
    with pytest.raises(ValueError, match=f"{limit}.* must be at least 1"):
        PromptTemplate("<image> {instruction}", "<image>", **{limit: value})


def test_template_with_an_empty_image_token_is_refused():
    with pytest.raises(ValueError, match="exactly once"):
        PromptTemplate("<image> {instruction}", "")


def test_template_json_round_trip_is_equal():
    template = DEFAULT_PROMPTS["qwen2_5_vl"]
    assert PromptTemplate.from_json(template.to_json()) == template


# Instructions


def test_check_instruction_strips_surrounding_whitespace():
    assert check_instruction("\n\t  the red  cup \u3000") == "the red  cup"


@pytest.mark.parametrize("instruction", ["", "   ", "\n\t", "\u3000\u00a0"])
def test_check_instruction_whitespace_only_is_refused(instruction):
    with pytest.raises(InstructionError, match="empty; say what to segment"):
        check_instruction(instruction)
    with pytest.raises(InstructionError, match="empty; say what to segment"):
        encode("llava", instruction)


@pytest.mark.parametrize("instruction", [None, 3, b"the cup", ["the cup"]])
def test_check_instruction_other_type_is_refused(instruction):
    with pytest.raises(InstructionError, match=f"{type(instruction).__name__}; accepted: a str"):
        encode("llava", instruction)


def test_encode_prompt_instruction_of_a_megabyte_is_refused_before_tokenizing():
    with pytest.raises(InstructionError, match="has 1,000,000 characters, the limit is 20,000"):
        encode_prompt(DEFAULT_PROMPTS["llava"], None, "a" * 1_000_000, 3)
    assert check_instruction("a" * MAX_INSTRUCTION_CHARS)


# Encoding


@families
@pytest.mark.parametrize("num_image_tokens", [1, 2, 900])
def test_encode_prompt_repeats_the_image_placeholder_in_place(family, num_image_tokens):
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
def test_encode_prompt_plain_text_equals_the_tokenizer(family, instruction):
    tokenizer, template = tokenizer_of(family), DEFAULT_PROMPTS[family]
    assume(instruction.strip())
    assume(not any(token in instruction for token in tokenizer.get_added_vocab()))
    joint = template.text.replace("{instruction}", instruction.strip())
    expected = tokenizer(joint, add_special_tokens=False)["input_ids"]
    assert encode(family, instruction, 1) == expected


def injections(family):
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
def test_encode_prompt_added_tokens_in_the_instruction_stay_text(family, data):
    instruction = data.draw(injections(family))
    assume(instruction.strip())
    template, tokenizer = DEFAULT_PROMPTS[family], tokenizer_of(family)
    ids = encode(family, instruction, 2)
    assert added_ids(family, ids) == added_ids(family, encode(family, "the cup", 2))
    written = template.text.replace(template.image_token, 2 * template.image_token)
    head, tail = written.split("{instruction}")
    assert tokenizer.decode(ids) == head + instruction.strip() + tail


@families
def test_encode_prompt_each_added_token_alone_and_in_a_sentence_stays_text(family):
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
def test_encode_prompt_injected_token_leaves_the_rest_unchanged(family):
    plain, attacked = encode(family, "the cup"), encode(family, f"a {REFERENCE_TOKEN} b")
    think = tokenizer_of(family).convert_tokens_to_ids("<think>")
    assert attacked[attacked.index(think) :] == plain[plain.index(think) :]
    image = tokenizer_of(family).convert_tokens_to_ids(DEFAULT_PROMPTS[family].image_token)
    assert attacked[: attacked.index(image) + 3] == plain[: plain.index(image) + 3]


@families
def test_encode_prompt_placeholder_text_in_the_instruction_is_kept(family):
    for instruction in ("a {instruction} b", f"a {{instruction}} {REFERENCE_TOKEN}"):
        assert instruction in tokenizer_of(family).decode(encode(family, instruction))


def test_encode_prompt_added_token_across_the_template_border_stays_text():
    tokenizer = tokenizer_of("llava")
    template = PromptTemplate("<image> Find <{instruction}> now", "<image>")
    ids = encode_prompt(template, tokenizer, "REF_POS", 1)
    assert tokenizer.convert_tokens_to_ids(REFERENCE_TOKEN) not in ids


def test_encode_prompt_missing_image_token_is_refused():
    with pytest.raises((ValueError, CoPRSError), match="<image>"):
        encode_prompt(DEFAULT_PROMPTS["llava"], tokenizer_of("qwen2_5_vl"), "the cup", 5)


def test_encode_prompt_surrogate_in_the_instruction_is_refused():
    with pytest.raises(InstructionError):
        encode("llava", "the \ud800 cup")


def test_encode_prompt_tokenizer_with_a_prefix_token_adds_none():
    tokenizer = build_tokenizer("llava")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", tokenizer.eos_token_id)]
    )
    assert tokenizer("x")["input_ids"][0] == tokenizer.eos_token_id
    for instruction in ("the cup", "a </s> b"):
        ids = encode_prompt(DEFAULT_PROMPTS["llava"], tokenizer, instruction, 3)
        assert ids == encode("llava", instruction)


def test_encode_prompt_overlapping_added_tokens_match_the_longest():
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
def test_encode_prompt_at_the_limit_is_accepted_and_above_is_refused(family):
    exact = len(encode(family, "the red cup on the left", 10))
    values = DEFAULT_PROMPTS[family].to_json()
    fits = PromptTemplate.from_json({**values, "max_prompt_tokens": exact})
    assert len(encode_prompt(fits, tokenizer_of(family), "the red cup on the left", 10)) == exact
    one_token = len(encode(family, "x", 10))
    for excess in (1, exact - one_token):
        short = PromptTemplate.from_json({**values, "max_prompt_tokens": exact - excess})
        most = exact - one_token - excess + 1
        with pytest.raises(
            InstructionError,
            match=rf"has {exact} tokens, the limit is {exact - excess}: 10 for the image, "
            rf"{exact - one_token + 1} for the instruction and {one_token - 11} for the template; "
            rf"shorten the instruction to {most} tokens, about \d+ characters",
        ):
            encode_prompt(short, tokenizer_of(family), "the red cup on the left", 10)


@families
def test_encode_prompt_image_above_the_limit_is_named_as_the_cause(family):
    with pytest.raises(
        InstructionError, match=r"5000 for the image.*an image of fewer pixels"
    ) as e:
        encode(family, "the cup", 5_000)
    assert "shorten the instruction" not in str(e.value)


@families
def test_encode_prompt_advised_length_of_a_chinese_instruction_fits(family):
    with pytest.raises(InstructionError, match="shorten the instruction") as refusal:
        encode(family, "红色杯子" * 400, 300)
    (characters,) = re.findall(r"about (\d+) characters", str(refusal.value))
    assert 0 < int(characters) < 1300
    assert len(encode(family, ("红色杯子" * 400)[: int(characters)], 300)) <= 1300


# Responses, one character per token

REFERENCE_ID = 0


def ids_of(*pieces):
    ids = []
    for number, piece in enumerate(pieces):
        ids += [REFERENCE_ID] if number else []
        ids += map(ord, piece)
    return ids


def read(*pieces):
    return read_response(ids_of(*pieces), REFERENCE_ID, lambda ids: "".join(map(chr, ids)))


def test_read_response_valid_format_has_no_violations():
    response = read("<think>it is red</think> ", "")
    assert response.text == "<think>it is red</think> <REF_POS>"
    assert response.reasoning == "it is red"
    assert response.reference_positions == (25,)
    assert response.format_violations == ()


REASONING = "<think>it is red</think>"
MINOR = {
    FormatViolation.LONG_REASONING,
    FormatViolation.TEXT_BEFORE_REASONING,
    FormatViolation.TEXT_AFTER_REFERENCE,
    FormatViolation.LONG_TEXT_BETWEEN,
}

RESPONSES = [
    (("it is red", ""), [FormatViolation.NO_REASONING]),
    (("<think>it is red", ""), [FormatViolation.NO_REASONING]),
    (("it is red</think>", ""), [FormatViolation.NO_REASONING]),
    (("</think>red<think>", ""), [FormatViolation.NO_REASONING]),
    (("<THINK>red</THINK>", ""), [FormatViolation.NO_REASONING]),
    ((REASONING + REASONING, ""), [FormatViolation.SEVERAL_REASONINGS]),
    (("<think>a<think>b</think>", ""), [FormatViolation.SEVERAL_REASONINGS]),
    (("<think>a</think></think>", ""), [FormatViolation.SEVERAL_REASONINGS]),
    (("<think></think>", ""), [FormatViolation.EMPTY_REASONING]),
    (("<think> \n\t</think>", ""), [FormatViolation.EMPTY_REASONING]),
    ((REASONING,), [FormatViolation.NO_REFERENCE]),
    (("",), [FormatViolation.NO_REASONING, FormatViolation.NO_REFERENCE]),
    (("", ""), [FormatViolation.NO_REASONING]),
    ((REASONING, "", ""), [FormatViolation.SEVERAL_REFERENCES]),
    ((REASONING, " and ", " and ", ""), [FormatViolation.SEVERAL_REFERENCES]),
    (("", REASONING), [
        FormatViolation.REFERENCE_BEFORE_REASONING,
        FormatViolation.TEXT_AFTER_REFERENCE,
    ]),
    (("<think>it", "is red</think>", ""), [
        FormatViolation.SEVERAL_REFERENCES,
        FormatViolation.REFERENCE_BEFORE_REASONING,
    ]),
    (("Well: " + REASONING, ""), [FormatViolation.TEXT_BEFORE_REASONING]),
    ((" \n" + REASONING, ""), []),
    ((REASONING, " there"), [FormatViolation.TEXT_AFTER_REFERENCE]),
    ((REASONING, " \n"), []),
    ((REASONING + " w" * MAX_WORDS_BETWEEN, ""), []),
    ((REASONING + " w" * (MAX_WORDS_BETWEEN + 1), ""), [FormatViolation.LONG_TEXT_BETWEEN]),
    ((REASONING + " w" * (MAX_WORDS_BETWEEN + 1),), [FormatViolation.NO_REFERENCE]),
    ((f"<think>{'x' * MAX_REASONING_CHARS}</think>", ""), []),
    ((f"<think>{'x' * (MAX_REASONING_CHARS + 1)}</think>", ""), [FormatViolation.LONG_REASONING]),
    (("a <think>\n</think>" + " w" * 11, " z", "z"), [
        FormatViolation.EMPTY_REASONING,
        FormatViolation.SEVERAL_REFERENCES,
        FormatViolation.TEXT_BEFORE_REASONING,
        FormatViolation.TEXT_AFTER_REFERENCE,
        FormatViolation.LONG_TEXT_BETWEEN,
    ]),
]  # fmt: skip


@pytest.mark.parametrize(("pieces", "violations"), RESPONSES)
def test_read_response_violations_are_listed_in_order(pieces, violations):
    assert list(read(*pieces).format_violations) == violations


def test_format_violation_each_member_has_an_example():
    assert {v for _, violations in RESPONSES for v in violations} == set(FormatViolation)


def test_format_violation_minor_members_are_not_fatal():
    assert {violation for violation in FormatViolation if not violation.is_fatal} == MINOR


def test_format_violation_values_are_identifiers_with_a_description():
    for violation in FormatViolation:
        assert violation.value == violation.name.lower()
        assert violation.value.isidentifier()
    assert len({violation.description for violation in FormatViolation}) == len(FormatViolation)


@pytest.mark.parametrize(
    ("pieces", "reasoning"),
    [
        (("<think> it\nis red </think>", " there"), "it\nis red"),
        (("so <think>one</think><think>two</think>", ""), "one"),
        (("<think>it is", " red</think>", ""), "it is red"),
        (("so <think>it is cut", ), "it is cut"),
        ((" no reasoning ", " at all "), "no reasoning  at all"),
        (("<think></think>", ""), ""),
        (("", ""), ""),
    ],
)  # fmt: skip
def test_read_response_reasoning_is_the_marked_text_or_all_text(pieces, reasoning):
    assert read(*pieces).reasoning == reasoning


def test_read_response_unclosed_empty_reasoning_is_empty():
    assert read("<think>").reasoning == ""


@PROPERTY
@given(
    pieces=st.lists(
        st.text(st.sampled_from("ab \n<>"), max_size=5)
        | st.sampled_from(["<think>", "</think>", REFERENCE_TOKEN, REASONING]),
        min_size=1,
        max_size=5,
    )
)
def test_read_response_positions_and_text_follow_the_tokens(pieces):
    response = read(*pieces)
    ids = ids_of(*pieces)
    assert list(response.reference_positions) == [
        position for position, token in enumerate(ids) if token == REFERENCE_ID
    ]
    assert response.text == REFERENCE_TOKEN.join(pieces)
    assert (FormatViolation.NO_REFERENCE in response.format_violations) == (len(pieces) == 1)
    assert (FormatViolation.SEVERAL_REFERENCES in response.format_violations) == (len(pieces) > 2)
    if "<think>" in response.reasoning:
        assert {FormatViolation.NO_REASONING, FormatViolation.SEVERAL_REASONINGS} & set(
            response.format_violations
        )
    order = list(FormatViolation)
    assert list(response.format_violations) == sorted(response.format_violations, key=order.index)


def test_read_response_letters_of_the_reference_token_are_text():
    response = read(f"{REASONING} {REFERENCE_TOKEN}")
    assert response.reference_positions == ()
    assert response.format_violations == (FormatViolation.NO_REFERENCE,)


@families
def test_read_response_with_a_real_tokenizer(family):
    tokenizer = tokenizer_of(family)
    reference_id = tokenizer.convert_tokens_to_ids(REFERENCE_TOKEN)
    end_id = tokenizer.eos_token_id
    letters = [tokenizer.convert_tokens_to_ids(letter) for letter in REFERENCE_TOKEN]
    reasoning = tokenizer("<think> the é, as <", add_special_tokens=False)["input_ids"]
    closing = tokenizer("</think>", add_special_tokens=False)["input_ids"]
    ids = [*reasoning, *letters, *closing, reference_id, reference_id, end_id]

    def decode(token_ids):
        return tokenizer.decode(token_ids, skip_special_tokens=True)

    response = read_response(ids, reference_id, decode)
    assert response.text == "<think> the é, as <<REF_POS></think><REF_POS><REF_POS>"
    assert response.reasoning == "the é, as <<REF_POS>"
    assert response.reference_positions == (len(ids) - 3, len(ids) - 2)
    assert response.format_violations == (FormatViolation.SEVERAL_REFERENCES,)
