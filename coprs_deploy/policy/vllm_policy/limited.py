"""Responses whose reasoning is limited: a first engine request reasons, a second one answers.

The second request continues the first with the tail up to ``<REF_POS>`` as part of its prompt. The
prefix cache holds what the first has read, and the tail is read in one pass.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from coprs_deploy.errors import HiddenStateError
from coprs_deploy.policy.policy import (
    PolicyRequest,
    PolicyResult,
    PolicyStream,
    StopReason,
    TextDelta,
)
from coprs_deploy.policy.policy_tokens import TextStream
from coprs_deploy.policy.reasoning_limit import ReasoningLimit
from coprs_deploy.prompts import REASONING_END

if TYPE_CHECKING:
    from coprs_deploy.policy.vllm_policy.policy import EngineRequest, VllmPolicy


def stream_limited(policy: VllmPolicy, request: PolicyRequest) -> PolicyStream:
    """Stream a response that ends its reasoning at the limits of the request; see ``stream``."""
    start = time.perf_counter()
    response = _LimitedResponse(policy, request)
    yield from response.reason()
    yield from response.answer()
    end = time.perf_counter()
    parsed = policy.tokens.read(response.token_ids)
    if text := response.text.rest(parsed):
        yield TextDelta(text)
    first = response.requests[0]
    waiting_ms = first.queue_ms + first.preprocess_ms
    assert response.stop is not None
    yield PolicyResult(
        response=parsed,
        concentrations=response.concentrations,
        stop_reason=response.stop,
        token_ids=tuple(response.token_ids),
        num_prompt_tokens=first.num_prompt_tokens,
        num_cached_tokens=first.num_cached_tokens,
        queue_ms=first.queue_ms,
        preprocess_ms=first.preprocess_ms,
        prefill_ms=max(0.0, 1e3 * (first.first_token - start) - waiting_ms),
        decode_ms=1e3 * (end - first.first_token),
    )


class _LimitedResponse:
    """One response in progress.

    Attributes:
        token_ids: tokens so far.
        text: incremental text.
        stop: why the reasoning ended.
        concentrations: (K, D) hidden states, after the answer.
        requests: the engine requests.
    """

    def __init__(self, policy: VllmPolicy, request: PolicyRequest) -> None:
        self._policy, self._request, self._known = policy, request, policy.known_text
        max_tokens = request.max_new_tokens or policy.max_response_tokens
        forced = len(self._known.opening) + len(self._known.tail)
        if max_tokens < forced:
            raise ValueError(
                f"max_new_tokens is {max_tokens}; with a limit of the reasoning at least {forced} "
                "are needed, for a response without any"
            )
        self._limit = ReasoningLimit(
            request, max_tokens - len(self._known.tail), policy.tail_time, time.perf_counter
        )
        self.token_ids: list[int] = []
        self.text = TextStream(policy.tokens)
        self.stop: StopReason | None = None
        self.concentrations: NDArray[np.float32] = np.zeros((0, policy.hidden_size), np.float32)
        self.requests: list[EngineRequest] = []

    def reason(self) -> Iterator[TextDelta]:
        """Write the reasoning up to its own end, or a limit."""
        if self._limit.is_reached:
            self.stop = StopReason.REASONING_BUDGET
            yield from self._write(self._known.opening)
            return
        with self._policy.running(self._request) as running:
            self.requests.append(running)
            while self.stop is None:
                event = running.next_event(self._request)
                for token in [] if isinstance(event, np.ndarray) else event:
                    if (reason := self._reason_to_stop(token)) is not None:
                        self.stop = reason
                        break
                    yield from self._write([token])
                    if not self._limit.is_reasoning:
                        self.stop = StopReason.TARGETS_REACHED
                        break
                if isinstance(event, np.ndarray):
                    self.stop = self.stop or StopReason.END_OF_TEXT

    def _reason_to_stop(self, token: int) -> StopReason | None:
        """Return why the tail is forced in place of a token."""
        tokens = self._policy.tokens
        if token in tokens.end_ids:
            return StopReason.END_OF_TEXT
        if token == tokens.reference_id:
            return StopReason.TARGETS_REACHED
        is_due = self._limit.is_due()
        if token == self._known.tail[0]:  # the policy ends the reasoning itself
            return None
        if self._limit.is_reached:
            return StopReason.REASONING_BUDGET
        return StopReason.DEADLINE if is_due else None

    def answer(self) -> Iterator[TextDelta]:
        """Read the tail up to ``<REF_POS>``, and write the further targets that follow at once."""
        policy = self._policy
        forced = self._known.tail if self.token_ids else [*self._known.opening, *self._known.tail]
        if not self._limit.is_reasoning:
            forced = self._known.draft(self._limit.text) or self._known.tail[-1:]
        yield from self._write(forced)
        start = time.perf_counter()
        with policy.running(self._request, self.token_ids) as running:
            self.requests.append(running)
            while not isinstance(states := running.next_event(self._request), np.ndarray):
                pass
        if self._request.max_targets == 1:
            policy.tail_time.add(time.perf_counter() - start)
        if not len(states):
            raise HiddenStateError(
                f"{policy.description} returned no hidden state of <REF_POS> after {REASONING_END}",
                self._limit.text,
            )
        further, more = self._known.next_reference, 0
        while running.token_ids[more * len(further) :][: len(further)] == further:
            more += 1
        yield from self._write(further * more)
        if more + 1 < self._request.max_targets and self.stop is StopReason.TARGETS_REACHED:
            self.stop = StopReason.END_OF_TEXT
        self.concentrations = states[: more + 1]

    def _write(self, tokens: list[int]) -> Iterator[TextDelta]:
        for token in tokens:
            self.token_ids.append(token)
            added = self.text.add(token)
            self._limit.add(added)
            if added:
                yield TextDelta(added)
