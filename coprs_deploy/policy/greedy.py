"""Greedy decoding of one response, token by token, for policies that run in this process."""

from __future__ import annotations

import time
from abc import abstractmethod
from contextlib import AbstractContextManager
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from coprs_deploy.policy.policy import (
    Policy,
    PolicyRequest,
    PolicyResult,
    PolicyStream,
    StopReason,
    TextDelta,
)
from coprs_deploy.policy.policy_tokens import PolicyTokens, TextStream
from coprs_deploy.prompts import PromptTemplate


class Decoding(Protocol):
    """One request in progress.

    Attributes:
        prompt_ids: tokens of the prompt, vision tokens included.
        num_cached_tokens: how many of them an earlier request had read already.
    """

    prompt_ids: list[int]
    num_cached_tokens: int

    def prefill(self) -> int:
        """Read the prompt; return the most likely first token."""

    def feed(self, token: int) -> tuple[int, NDArray[np.float32]]:
        """Read one token; return the most likely next one and the (D,) post-norm hidden state."""


class GreedyPolicy(Policy):
    """Policy whose requests are decoded greedily in the calling thread.

    Subclasses set ``_prompt``, and start a request.

    Attributes:
        tokens: tokenizer and special tokens.
    """

    _prompt: PromptTemplate
    tokens: PolicyTokens

    @abstractmethod
    def start(self, request: PolicyRequest) -> AbstractContextManager[Decoding]:
        """Prepare image and prompt; what the request holds is freed at the end of the block."""

    def stream(self, request: PolicyRequest) -> PolicyStream:
        """See :meth:`Policy.stream`."""
        received = time.perf_counter()
        with self.start(request) as decoding:
            start = time.perf_counter()
            budget = request.max_new_tokens or self._prompt.max_response_tokens
            text_stream = TextStream(self.tokens)
            token_ids: list[int] = []
            concentrations: list[NDArray[np.float32]] = []
            stop: StopReason | None = None
            token = decoding.prefill()
            first_token = time.perf_counter()
            while stop is None:
                request.remaining_s()
                token_ids.append(token)
                if token in self.tokens.end_ids:
                    stop = StopReason.END_OF_TEXT
                    break
                is_reference = token == self.tokens.reference_id
                if text := text_stream.add(token):
                    yield TextDelta(text)
                if len(token_ids) >= budget:
                    stop = StopReason.TOKEN_BUDGET
                    if not is_reference:
                        break
                token, hidden = decoding.feed(token)
                if is_reference:
                    concentrations.append(hidden)
                    if len(concentrations) == request.max_targets:
                        stop = StopReason.TARGETS_REACHED
            end = time.perf_counter()
        response = self.tokens.read(token_ids)
        if stop is StopReason.TOKEN_BUDGET and (text := text_stream.rest(response)):
            yield TextDelta(text)
        yield PolicyResult(
            response=response,
            concentrations=np.array(concentrations, np.float32).reshape(-1, self.hidden_size),
            stop_reason=stop,
            token_ids=tuple(token_ids),
            num_prompt_tokens=len(decoding.prompt_ids),
            num_cached_tokens=decoding.num_cached_tokens,
            prefill_ms=1e3 * (first_token - start),
            decode_ms=1e3 * (end - first_token),
            preprocess_ms=1e3 * (start - received),
        )
