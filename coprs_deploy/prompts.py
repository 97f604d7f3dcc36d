"""The prompt that a policy reads, and the response that it writes.

The template is data of a checkpoint, because weights are tuned to it. What a user types is only
text: no special token can be smuggled in through it. Reading a response works on token ids, so that
the letters ``<REF_POS>`` in running text are never taken for the token.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

from coprs_deploy.errors import InstructionError
from coprs_deploy.specs import Record

REFERENCE_TOKEN = "<REF_POS>"
"""The concentration token: its hidden state is the query of the prior (paper, section 3.1)."""

LONGEST_REASONING = 2048
"""Characters; a longer thought is a minor fault (paper, appendix B.2)."""

LONGEST_BRIDGE = 10
"""Words between the thought and the token; more is a minor fault (public code only)."""

_INSTRUCTION = "{instruction}"
_THOUGHT = re.compile(r"<think>(.*?)</think>", re.DOTALL)


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that prompts need."""

    def __call__(self, text: str, **options: Any) -> Mapping[str, list[int]]:
        """Return ``input_ids`` of a text."""

    def get_added_vocab(self) -> dict[str, int]:
        """Return the added tokens by content."""

    def convert_tokens_to_ids(self, token: str) -> int:
        """Return the id of one token."""


class PromptTemplate(Record, frozen=True):
    """The whole prompt of a checkpoint, special tokens written out.

    Attributes:
        text: holds ``{instruction}`` once and ``image_token`` once.
        image_token: the policy's image placeholder; it is repeated for each vision token.
        max_prompt_tokens: longest prompt, vision tokens included (paper, B.3: 1,300).
        max_response_tokens: longest response (paper, B.3: 2,000).
    """

    text: str
    image_token: str
    max_prompt_tokens: int = 1300
    max_response_tokens: int = 2000

    def __post_init__(self) -> None:
        for part in (_INSTRUCTION, self.image_token):
            if self.text.count(part) != 1:
                raise ValueError(
                    f"the prompt template holds {part} {self.text.count(part)} times; "
                    "it must hold it exactly once"
                )
        if self.max_prompt_tokens < 1 or self.max_response_tokens < 1:
            raise ValueError("max_prompt_tokens and max_response_tokens must be at least 1")


def check_instruction(instruction: str) -> str:
    """Return the instruction without surrounding blanks.

    Raises:
        InstructionError: nothing is left, or it is no text.
    """
    if not isinstance(instruction, str):
        raise InstructionError(f"instruction is a {type(instruction).__name__}; accepted: a str")
    if not instruction.strip():
        raise InstructionError("the instruction is empty; say what to segment, as in 'the red cup'")
    if any("\ud800" <= letter <= "\udfff" for letter in instruction):
        raise InstructionError(
            "the instruction holds half a surrogate pair; accepted: Unicode text"
        )
    return instruction.strip()


def encode_prompt(
    template: PromptTemplate, tokenizer: Tokenizer, instruction: str, num_image_tokens: int
) -> list[int]:
    """Turn an instruction into the token ids that the policy reads.

    Special tokens inside the instruction stay ordinary text, and its surrounding blanks are cut.

    Args:
        template: the checkpoint's prompt.
        tokenizer: the policy's tokenizer.
        instruction: what the user wants to have segmented.
        num_image_tokens: how many vision tokens the image takes.

    Returns:
        Prompt token ids, the image placeholder repeated ``num_image_tokens`` times.

    Raises:
        InstructionError: the instruction is blank, or the prompt becomes too long.
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
        excess = len(ids) - template.max_prompt_tokens
        if excess >= len(instruction):
            raise InstructionError(
                f"the prompt has {len(ids)} tokens, the limit is {template.max_prompt_tokens} "
                f"({num_image_tokens} of them for the image): show the policy a smaller image"
            )
        raise InstructionError(
            f"the prompt has {len(ids)} tokens, the limit is {template.max_prompt_tokens} "
            f"({num_image_tokens} of them for the image): shorten the instruction by {excess}"
        )
    return ids


def _encode_text(text: str, tokenizer: Tokenizer, instruction: str) -> list[int]:
    added = sorted((t for t in tokenizer.get_added_vocab() if len(t) > 1), key=len, reverse=True)
    whole = text.replace(_INSTRUCTION, instruction)
    pattern = re.compile("(" + "|".join(map(re.escape, added)) + ")")
    if not added or pattern.findall(whole) == pattern.findall(text):
        return _encode_plain(whole, tokenizer)
    # Only the template's own added tokens may act: cut the template at them, and encode what lies
    # between with the added tokens of the instruction broken into letters.
    ids: list[int] = []
    for piece in pattern.split(text):
        if pattern.fullmatch(piece):
            ids.append(tokenizer.convert_tokens_to_ids(piece))
            continue
        letters = piece.replace(_INSTRUCTION, instruction)
        while found := pattern.search(letters):
            ids.extend(_encode_plain(letters[: found.start() + 1], tokenizer))
            letters = letters[found.start() + 1 :]
        ids.extend(_encode_plain(letters, tokenizer))
    return ids


def _encode_plain(text: str, tokenizer: Tokenizer) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []


class FormatViolation(str, Enum):
    """What is wrong with the form of a response; see :attr:`is_fatal`."""

    NO_THOUGHT = "no <think>...</think>"
    SEVERAL_THOUGHTS = "more than one <think>...</think>"
    BLANK_THOUGHT = "the thought is blank"
    NO_REFERENCE = "no <REF_POS>"
    SEVERAL_REFERENCES = "more than one <REF_POS>"
    REFERENCE_BEFORE_THOUGHT = "<REF_POS> does not follow the thought"
    LONG_THOUGHT = f"the thought is longer than {LONGEST_REASONING} characters"
    TEXT_BEFORE_THOUGHT = "text before <think>"
    TEXT_AFTER_REFERENCE = "text after <REF_POS>"
    LONG_BRIDGE = f"more than {LONGEST_BRIDGE} words between the thought and <REF_POS>"

    @property
    def is_fatal(self) -> bool:
        """Whether the format score falls to zero (else it only falls a little)."""
        return self not in _MINOR_FAULTS


_MINOR_FAULTS = frozenset(
    {
        FormatViolation.LONG_THOUGHT,
        FormatViolation.TEXT_BEFORE_THOUGHT,
        FormatViolation.TEXT_AFTER_REFERENCE,
        FormatViolation.LONG_BRIDGE,
    }
)


@dataclass(frozen=True)
class Response:
    """A response, read.

    Attributes:
        text: the whole response with ``<REF_POS>`` written out, other special tokens left out.
        reasoning: the thought; the whole text where no thought is marked.
        reference_positions: indices of the ``<REF_POS>`` tokens, ascending.
        faults: what is wrong with its form, in the order of :class:`FormatViolation`.
    """

    text: str
    reasoning: str
    reference_positions: tuple[int, ...]
    faults: tuple[FormatViolation, ...]


def read_response(
    token_ids: Sequence[int], reference_id: int, decode: Callable[[Sequence[int]], str]
) -> Response:
    """Read a response from its token ids.

    Args:
        token_ids: what the policy wrote, without the prompt.
        reference_id: id of ``<REF_POS>``.
        decode: token ids to text, special tokens left out.

    Returns:
        Text, reasoning, positions and faults; the last position is the one that counts.
    """
    positions = tuple(i for i, token in enumerate(token_ids) if token == reference_id)
    pieces, start = [], 0
    for end in (*positions, len(token_ids)):
        pieces.append(decode(token_ids[start:end]))
        start = end + 1
    text = REFERENCE_TOKEN.join(pieces)
    return Response(text, _reasoning(pieces), positions, tuple(_faults(pieces)))


def _reasoning(pieces: Sequence[str]) -> str:
    text = "".join(pieces)
    thought = _THOUGHT.search(text)
    if thought:
        return thought[1].strip()
    before, opened, after = text.partition("<think>")
    return (after if opened else before).strip()


def _faults(pieces: Sequence[str]) -> list[FormatViolation]:
    """Judge the text between the reference tokens; ``len(pieces) - 1`` tokens were written."""
    faults = []
    text = "".join(pieces)
    thoughts = list(_THOUGHT.finditer(text))
    if not thoughts:
        faults.append(FormatViolation.NO_THOUGHT)
    elif len(thoughts) > 1 or text.count("<think>") > 1 or text.count("</think>") > 1:
        faults.append(FormatViolation.SEVERAL_THOUGHTS)
    elif not thoughts[0][1].strip():
        faults.append(FormatViolation.BLANK_THOUGHT)
    if len(pieces) == 1:
        faults.append(FormatViolation.NO_REFERENCE)
    elif len(pieces) > 2:
        faults.append(FormatViolation.SEVERAL_REFERENCES)
    if not thoughts:
        return faults
    start, end = thoughts[0].span()
    if len(pieces) > 1 and len(pieces[0]) < end:
        faults.append(FormatViolation.REFERENCE_BEFORE_THOUGHT)
    if len(thoughts[0][1]) > LONGEST_REASONING:
        faults.append(FormatViolation.LONG_THOUGHT)
    if text[:start].strip():
        faults.append(FormatViolation.TEXT_BEFORE_THOUGHT)
    if len(pieces) > 1 and pieces[-1].strip():
        faults.append(FormatViolation.TEXT_AFTER_REFERENCE)
    if len(pieces) > 1 and len(pieces[0][end:].split()) > LONGEST_BRIDGE:
        faults.append(FormatViolation.LONG_BRIDGE)
    return faults
