"""Text that a response is known, or likely, to contain: drafts that a policy reads in one pass."""

from __future__ import annotations

from collections.abc import Sequence

from coprs_deploy.policy.policy_tokens import PolicyTokens
from coprs_deploy.prompts import REASONING_END, REASONING_START, REFERENCE_TOKEN, PromptTemplate

MAX_MATCH = 3
"""Largest number of tokens whose earlier occurrence makes a draft."""


class KnownText:
    """Tokens of the parts of a response that its prompt template states.

    Args:
        template: prompt template of the policy.
        tokens: tokenizer of the policy.

    Attributes:
        opening: tokens of ``<think>``.
        tail: tokens from ``</think>`` to ``<REF_POS>``.
        next_reference: tokens from behind a ``<REF_POS>`` to the next one.
    """

    def __init__(self, template: PromptTemplate, tokens: PolicyTokens) -> None:
        self._tokens = tokens
        self.opening = self._encode(REASONING_START)
        self.tail = self._encode(template.reference_tail)
        self.next_reference = self._encode(template.reference_separator + REFERENCE_TOKEN)
        self._ending = template.reference_tail.removeprefix(REASONING_END)
        self._separator = template.reference_separator
        self._encoded: dict[str, list[int]] = {}

    def draft(self, text: str) -> list[int]:
        """Return the tokens that are likely to follow: empty inside the reasoning.

        Args:
            text: response so far.
        """
        mark, ending = REASONING_END, self._ending
        if REFERENCE_TOKEN in text:
            mark, ending = REFERENCE_TOKEN, self._separator + REFERENCE_TOKEN
        _, found, written = text.rpartition(mark)
        if not found or not ending.startswith(written):
            return []
        rest = ending[len(written) :]
        if rest not in self._encoded:  # a few: the ends of two texts
            self._encoded[rest] = self._encode(rest)
        return self._encoded[rest]

    def _encode(self, text: str) -> list[int]:
        encode = self._tokens.tokenizer.backend_tokenizer.encode
        ids: list[int] = encode(text, add_special_tokens=False).ids
        return ids


def lookup_draft(written: Sequence[int], max_tokens: int) -> list[int]:
    """Draft what followed the latest earlier occurrence of the last tokens (prompt lookup).

    Args:
        written: tokens of prompt and response so far.
        max_tokens: maximum length of the draft.

    Returns:
        The tokens that followed the same :data:`MAX_MATCH` tokens, or as many as occur before.
    """
    for length in range(min(MAX_MATCH, len(written) - 1), 0, -1):
        last = list(written[-length:])
        for start in range(len(written) - length - 1, -1, -1):
            if written[start] == last[0] and list(written[start : start + length]) == last:
                end = start + length
                return list(written[end : end + max_tokens])
    return []
