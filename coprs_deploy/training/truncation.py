"""Reasoning that is truncated, so that a policy learns its best guess at any time.

At inference a budget ends the reasoning, and the text up to ``<REF_POS>`` is forced. In training
the reasoning is truncated in the same way, at random lengths. What is forced is no label and no
action: the policy does not learn to end its reasoning early.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from coprs_deploy.prompts import (
    REASONING_END,
    REASONING_START,
    REFERENCE_TOKEN,
    PromptTemplate,
)


class TruncatedResponse(NamedTuple):
    """Token ids of a response.

    Attributes:
        ids: token ids.
        num_kept: number of leading tokens that are those of the whole response; the following ones
            are forced.
    """

    ids: list[int]
    num_kept: int


class ReasoningTruncator:
    """Finds the reasoning in token ids, and truncates it.

    Args:
        tokenizer: tokenizer of the policy.
        prompt: prompt template, whose tail is forced.
    """

    def __init__(self, tokenizer: Any, prompt: PromptTemplate) -> None:
        self._tokenizer, self._prompt = tokenizer, prompt
        self._pieces: dict[int, str] = {}

    def columns(self, ids: Sequence[int]) -> range:
        """Return the columns of the reasoning in a response, between ``<think>`` and ``</think>``.

        Reasoning without an end extends to the last token. Columns are empty without reasoning.
        """
        pieces = [self._piece(int(token)) for token in ids]
        text = "".join(pieces)
        begin = text.find(REASONING_START)
        if begin < 0:
            return range(0)
        begin += len(REASONING_START)
        end = text.find(REASONING_END, begin)
        stops = np.cumsum([len(piece) for piece in pieces])
        start = int(np.searchsorted(stops, begin)) + 1
        stop = len(pieces) if end < 0 else int(np.searchsorted(stops, end, side="right"))
        if end < 0 and ids[-1] == self._tokenizer.eos_token_id:
            stop -= 1
        return range(start, max(start, stop))

    def truncate(
        self, ids: Sequence[int], max_reasoning_tokens: int, num_targets: int
    ) -> TruncatedResponse:
        """Truncate longer reasoning, and force ``num_targets`` times ``<REF_POS>`` and the end."""
        columns = self.columns(ids)
        if len(columns) <= max_reasoning_tokens:
            return TruncatedResponse(list(ids), len(ids))
        kept = list(ids[: columns.start + max_reasoning_tokens])
        further = (self._prompt.reference_separator + REFERENCE_TOKEN) * (num_targets - 1)
        encoded = self._tokenizer(self._prompt.reference_tail + further, add_special_tokens=False)
        forced = [*encoded["input_ids"], int(self._tokenizer.eos_token_id)]
        return TruncatedResponse(kept + forced, len(kept))

    def _piece(self, token: int) -> str:
        """Return the text of a token; a part of a character counts as one that differs."""
        if token not in self._pieces:
            self._pieces[token] = self._tokenizer.decode([token], skip_special_tokens=False)
        return self._pieces[token]


def truncation_generator(ratio: float, *seed: int) -> np.random.Generator | None:
    """Return the random generator of a response that is truncated, None for the other ones.

    Args:
        ratio: share of the responses that are truncated.
        seed: seed of the run and numbers of the response; they alone determine the result.
    """
    if not ratio:
        return None
    generator = np.random.default_rng(seed)
    return generator if generator.random() < ratio else None
