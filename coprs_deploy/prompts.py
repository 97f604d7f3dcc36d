"""Prompt template, prompt encoding, response parsing and format violations.

The template is data of a checkpoint, because weights are tuned to it. User input is encoded as
plain text only: it cannot inject special tokens. Responses are parsed from token ids, so that the
characters ``<REF_POS>`` in running text are never mistaken for the token.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Self

from coprs_deploy.errors import InstructionError
from coprs_deploy.specs import Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REFERENCE_TOKEN = "<REF_POS>"
"""The concentration token: its hidden state is the query of the prior (paper, section 3.1)."""

MAX_REASONING_CHARS = 2048
"""Longer reasoning is a minor violation (paper, appendix B.2)."""

MAX_WORDS_BETWEEN = 10
"""Words between the reasoning and the token; more is a minor violation (public code only)."""

MAX_INSTRUCTION_CHARS = 20_000
"""Longer instructions are refused before they are tokenized, which takes seconds per million."""

REASONING_START, REASONING_END = "<think>", "</think>"

_INSTRUCTION = "{instruction}"
_REASONING = re.compile(r"<think>(.*?)</think>", re.DOTALL)


class PromptTemplate(Record, frozen=True):
    """Complete prompt of a checkpoint, special tokens written out.

    Attributes:
        text: prompt with exactly one ``{instruction}`` and one ``image_token``.
        image_token: image placeholder of the policy; encoding repeats it for each vision token.
        max_prompt_tokens: maximum prompt length, vision tokens included (paper, B.3: 1,300).
        max_response_tokens: maximum response length (paper, B.3: 2,000).
        reference_tail: text of a response from the end of the reasoning to its ``<REF_POS>``.
        reference_separator: text between two ``<REF_POS>``.
    """

    text: str
    image_token: str
    max_prompt_tokens: int = 1300
    max_response_tokens: int = 2000
    reference_tail: str = f"{REASONING_END} {REFERENCE_TOKEN}"
    reference_separator: str = " "

    def __post_init__(self) -> None:
        for part in (_INSTRUCTION, self.image_token):
            if self.text.count(part) != 1:
                raise ValueError(
                    f"the prompt template contains {part} {self.text.count(part)} times; "
                    "it must contain it exactly once"
                )
        if self.max_prompt_tokens < 1 or self.max_response_tokens < 1:
            raise ValueError("max_prompt_tokens and max_response_tokens must be at least 1")
        tail = self.reference_tail
        is_tail = tail.startswith(REASONING_END) and tail.endswith(REFERENCE_TOKEN)
        if not is_tail or tail.count(REASONING_END) != 1 or tail.count(REFERENCE_TOKEN) != 1:
            raise ValueError(
                f"reference_tail is {tail!r}; accepted: text that starts with {REASONING_END}, "
                f"ends with {REFERENCE_TOKEN}, and contains each once"
            )
        if REFERENCE_TOKEN in self.reference_separator:
            raise ValueError(
                f"reference_separator is {self.reference_separator!r}; accepted: text without "
                f"{REFERENCE_TOKEN}"
            )


def check_instruction(instruction: str) -> str:
    """Return the instruction without surrounding whitespace.

    Raises:
        InstructionError: the instruction is empty, longer than ``MAX_INSTRUCTION_CHARS``, not a
            str, or not valid Unicode.
    """
    if not isinstance(instruction, str):
        raise InstructionError(f"instruction is a {type(instruction).__name__}; accepted: a str")
    if len(instruction) > MAX_INSTRUCTION_CHARS:
        raise InstructionError(
            f"the instruction has {len(instruction):,} characters, the limit is "
            f"{MAX_INSTRUCTION_CHARS:,}; shorten it to what to segment"
        )
    if not instruction.strip():
        raise InstructionError("the instruction is empty; say what to segment, as in 'the red cup'")
    if any("\ud800" <= character <= "\udfff" for character in instruction):
        raise InstructionError(
            "the instruction contains half a surrogate pair; accepted: Unicode text"
        )
    return instruction.strip()


def encode_prompt(
    template: PromptTemplate,
    tokenizer: PreTrainedTokenizerBase,
    instruction: str,
    num_image_tokens: int,
) -> list[int]:
    """Encode a prompt as token ids.

    Special tokens inside the instruction stay plain text; surrounding whitespace is removed.

    Args:
        template: prompt template of the checkpoint.
        tokenizer: tokenizer of the policy.
        instruction: what to segment.
        num_image_tokens: number of vision tokens of the image.

    Returns:
        Prompt token ids, the image placeholder repeated ``num_image_tokens`` times.

    Raises:
        InstructionError: the instruction is empty, or the prompt is too long.
        ValueError: the tokenizer lacks the image token of the template.
    """
    instruction = check_instruction(instruction)
    if template.image_token not in tokenizer.get_added_vocab():
        raise ValueError(
            f"the tokenizer has no {template.image_token}, the image token of the prompt template; "
            "use the tokenizer that belongs to the template"
        )
    image_id = tokenizer.convert_tokens_to_ids(template.image_token)
    ids: list[int] = []
    for token in _encode_text(template.text, tokenizer, instruction):
        ids.extend([token] * (num_image_tokens if token == image_id else 1))
    if len(ids) > template.max_prompt_tokens:
        num_fixed = len(_encode_plain(template.text.replace(_INSTRUCTION, ""), tokenizer)) - 1
        available = template.max_prompt_tokens - num_image_tokens - num_fixed
        num_instruction = len(ids) - num_image_tokens - num_fixed
        raise InstructionError(
            f"the prompt has {len(ids)} tokens, the limit is {template.max_prompt_tokens}: "
            f"{num_image_tokens} for the image, {num_instruction} for the instruction and "
            f"{num_fixed} for the template; "
            + (
                f"shorten the instruction to {available} tokens, about "
                f"{len(instruction) * available // num_instruction} characters"
                if available > 0
                else "pass an image of fewer pixels, or raise max_prompt_tokens of the checkpoint"
            )
        )
    return ids


def _encode_text(text: str, tokenizer: PreTrainedTokenizerBase, instruction: str) -> list[int]:
    added = sorted((t for t in tokenizer.get_added_vocab() if len(t) > 1), key=len, reverse=True)
    whole = text.replace(_INSTRUCTION, instruction)
    pattern = re.compile("(" + "|".join(map(re.escape, added)) + ")")
    if not added or pattern.findall(whole) == pattern.findall(text):
        return _encode_plain(whole, tokenizer)
    # Only added tokens of the template itself are special: split the template at them, and encode
    # the text between with each added token of the instruction split after its first character.
    ids: list[int] = []
    for piece in pattern.split(text):
        if pattern.fullmatch(piece):
            ids.append(tokenizer.convert_tokens_to_ids(piece))
            continue
        rest = piece.replace(_INSTRUCTION, instruction)
        while found := pattern.search(rest):
            ids.extend(_encode_plain(rest[: found.start() + 1], tokenizer))
            rest = rest[found.start() + 1 :]
        ids.extend(_encode_plain(rest, tokenizer))
    return ids


def _encode_plain(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    # A single text, encoded in this thread: a batch, of one too, would go through a thread pool.
    ids: list[int] = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    return ids


class FormatViolation(str, Enum):
    """Violation of the response format, in the order in which they are reported.

    Attributes:
        description: the violation in words, for messages.
        is_fatal: whether it sets the format score to zero instead of lowering it slightly.
    """

    _value_: str
    description: str
    is_fatal: bool

    NO_REASONING = "no_reasoning", "no <think>...</think>"
    SEVERAL_REASONINGS = "several_reasonings", "more than one <think>...</think>"
    EMPTY_REASONING = "empty_reasoning", "the reasoning is empty"
    NO_REFERENCE = "no_reference", f"no {REFERENCE_TOKEN}"
    SEVERAL_REFERENCES = "several_references", f"more than one {REFERENCE_TOKEN}"
    REFERENCE_BEFORE_REASONING = (
        "reference_before_reasoning",
        f"{REFERENCE_TOKEN} before the end of the reasoning",
    )
    LONG_REASONING = (
        "long_reasoning",
        f"the reasoning is longer than {MAX_REASONING_CHARS} characters",
        False,
    )
    TEXT_BEFORE_REASONING = "text_before_reasoning", "text before <think>", False
    TEXT_AFTER_REFERENCE = "text_after_reference", f"text after {REFERENCE_TOKEN}", False
    LONG_TEXT_BETWEEN = (
        "long_text_between",
        f"more than {MAX_WORDS_BETWEEN} words between the reasoning and {REFERENCE_TOKEN}",
        False,
    )

    def __new__(cls, identifier: str, description: str, is_fatal: bool = True) -> Self:
        """Attach description and severity to the identifier, which is the member's value."""
        member = str.__new__(cls, identifier)
        member._value_ = identifier
        member.description = description
        member.is_fatal = is_fatal
        return member


@dataclass(frozen=True)
class Response:
    """Parsed response of a policy.

    Attributes:
        text: complete response with ``<REF_POS>`` written out and other special tokens removed.
        reasoning: text inside the first ``<think>...</think>``; without a closed pair, the text
            after ``<think>``, or else the complete text. ``<REF_POS>`` is left out.
        reference_positions: indices of the ``<REF_POS>`` tokens, ascending.
        format_violations: violations in the order of :class:`FormatViolation`.
    """

    text: str
    reasoning: str
    reference_positions: tuple[int, ...]
    format_violations: tuple[FormatViolation, ...]


def read_response(
    token_ids: Sequence[int], reference_id: int, decode: Callable[[Sequence[int]], str]
) -> Response:
    """Parse a response from its token ids.

    Args:
        token_ids: tokens of the response, without the prompt.
        reference_id: id of ``<REF_POS>``.
        decode: function from token ids to text that removes special tokens.

    Returns:
        The response; of several reference positions the last one is the target's.
    """
    positions = tuple(i for i, token in enumerate(token_ids) if token == reference_id)
    pieces, start = [], 0
    for end in (*positions, len(token_ids)):
        pieces.append(decode(token_ids[start:end]))
        start = end + 1
    text = REFERENCE_TOKEN.join(pieces)
    reasoning, violations = _reasoning("".join(pieces)), _format_violations(pieces)
    return Response(text, reasoning, positions, tuple(violations))


def extract_reasoning(response: str) -> str:
    """Return the reasoning of a response, as in :attr:`Response.reasoning`, from its text."""
    return _reasoning(response.replace(REFERENCE_TOKEN, ""))


def _reasoning(text: str) -> str:
    marked = _REASONING.search(text)
    if marked:
        return marked[1].strip()
    before, opened, after = text.partition("<think>")
    return (after if opened else before).strip()


def _format_violations(pieces: Sequence[str]) -> list[FormatViolation]:
    """Check the text around the ``len(pieces) - 1`` reference tokens."""
    violations = []
    text = "".join(pieces)
    reasonings = list(_REASONING.finditer(text))
    if not reasonings:
        violations.append(FormatViolation.NO_REASONING)
    elif len(reasonings) > 1 or text.count("<think>") > 1 or text.count("</think>") > 1:
        violations.append(FormatViolation.SEVERAL_REASONINGS)
    elif not reasonings[0][1].strip():
        violations.append(FormatViolation.EMPTY_REASONING)
    if len(pieces) == 1:
        violations.append(FormatViolation.NO_REFERENCE)
    elif len(pieces) > 2:
        violations.append(FormatViolation.SEVERAL_REFERENCES)
    if not reasonings:
        return violations
    start, end = reasonings[0].span()
    if len(pieces) > 1 and len(pieces[0]) < end:
        violations.append(FormatViolation.REFERENCE_BEFORE_REASONING)
    if len(reasonings[0][1]) > MAX_REASONING_CHARS:
        violations.append(FormatViolation.LONG_REASONING)
    if text[:start].strip():
        violations.append(FormatViolation.TEXT_BEFORE_REASONING)
    if len(pieces) > 1 and pieces[-1].strip():
        violations.append(FormatViolation.TEXT_AFTER_REFERENCE)
    if len(pieces) > 1 and len(pieces[0][end:].split()) > MAX_WORDS_BETWEEN:
        violations.append(FormatViolation.LONG_TEXT_BETWEEN)
    return violations
