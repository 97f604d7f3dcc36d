"""Greedy decoding of one response, for policies that run in this process.

A pass of the decoder reads the last token together with a draft of the next ones, where there is
one: the tail that the prompt template states, or what followed the same words before. What greedy
decoding would not have written is dropped again, so that drafts change no response. Only where the
request limits the reasoning is the tail forced.

A response is a generator that yields what is to be read and is sent what the decoder returned, so
that a policy may read for several responses in one pass.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from coprs_deploy.policy.known_text import KnownText, lookup_draft
from coprs_deploy.policy.policy import (
    Policy,
    PolicyRequest,
    PolicyResult,
    PolicyStream,
    StopReason,
    TextDelta,
)
from coprs_deploy.policy.policy_tokens import PolicyTokens, TextStream
from coprs_deploy.policy.reasoning_limit import ReasoningLimit, RunningEstimate
from coprs_deploy.prompts import PromptTemplate


@dataclass(frozen=True)
class Prefill:
    """The prompt is to be read, and these tokens behind it; see :meth:`Decoding.prefill`."""

    response: Sequence[int] = ()


@dataclass(frozen=True)
class Feed:
    """These tokens are to be read; see :meth:`Decoding.feed`."""

    tokens: Sequence[int]


Steps: TypeAlias = Generator[TextDelta | Prefill | Feed, Any, None]
"""Steps of a response; what reading returned is sent to them."""


class PromptState(Protocol):
    """The prompt of a request in progress, and what forgets tokens.

    Attributes:
        num_cached_tokens: how many tokens of the prompt another request had read already.
    """

    num_cached_tokens: int

    @property
    def prompt_ids(self) -> list[int]:
        """Tokens of the prompt, vision tokens included."""

    def drop(self, count: int) -> None:
        """Forget the last tokens that were read."""


class Decoding(PromptState, Protocol):
    """One request in progress, which is read alone."""

    def prefill(self, response: Sequence[int] = ()) -> tuple[int, NDArray[np.float32]]:
        """Read the prompt and the beginning of a response, if given.

        Returns:
            Most likely next token, and the (D,) post-norm hidden state of the last one that was
            read.
        """

    def feed(self, tokens: Sequence[int]) -> tuple[list[int], NDArray[np.float32]]:
        """Read R tokens in one pass.

        Returns:
            Most likely next token after each, and their (R, D) post-norm hidden states.
        """


class GreedyPolicy(Policy):
    """Policy whose requests are decoded greedily in the calling thread.

    Subclasses set ``_prompt`` and ``tokens``, and start a request.

    Attributes:
        tokens: tokenizer and special tokens.
        prompt_lookup_num_tokens: length of the drafts by prompt lookup; 0 for none.
        drafts_tail: whether the tail is read in one pass where the policy is expected to write it.
    """

    _prompt: PromptTemplate
    tokens: PolicyTokens
    prompt_lookup_num_tokens: int = 0
    drafts_tail: bool = True

    @abstractmethod
    def start(self, request: PolicyRequest) -> AbstractContextManager[Decoding]:
        """Prepare image and prompt; what the request holds is freed at the end of the block."""

    def stream(self, request: PolicyRequest) -> PolicyStream:
        """See :meth:`Policy.stream`."""
        received = time.perf_counter()
        with self.start(request) as decoding:
            response = GreedyResponse(self, request, decoding)
            yield from _run(response, decoding)
            ended = time.perf_counter()
        result = response.result(received, ended)
        rest = response.text.rest(result.response)
        if response.stop is not StopReason.END_OF_TEXT and rest:
            yield TextDelta(rest)
        yield result

    @cached_property
    def known_text(self) -> KnownText:
        """Tokens of the parts of a response that the prompt template states."""
        return KnownText(self._prompt, self.tokens)

    @cached_property
    def tail_time(self) -> RunningEstimate:
        """Durations of the pass that reads the tail."""
        return RunningEstimate()


def _run(response: GreedyResponse, decoding: Decoding) -> Iterator[TextDelta]:
    """Read what a response asks for, alone."""
    steps = response.steps()
    reply: Any = None
    while True:
        try:
            step = steps.send(reply)
        except StopIteration:
            return
        reply = None
        if isinstance(step, Prefill):
            reply = decoding.prefill(step.response)
        elif isinstance(step, Feed):
            reply = decoding.feed(step.tokens)
        else:
            yield step


def next_read(steps: Steps, reply: Any) -> Prefill | Feed | None:
    """Continue the steps of a response to what is read next; None at its end."""
    try:
        while isinstance(step := steps.send(reply), TextDelta):
            reply = None
    except StopIteration:
        return None
    return step


class GreedyResponse:
    """One response while it is decoded.

    Args:
        policy: tokenizer, prompt template and kinds of drafts.
        request: the request.
        decoding: prompt, and what forgets tokens.

    Attributes:
        token_ids: tokens so far; all of them have been read.
        text: incremental text.
        concentrations: hidden states of the ``<REF_POS>`` among them.
        stop: why it ended; None while it goes on.
        num_passes: passes after the prefill.
    """

    def __init__(self, policy: GreedyPolicy, request: PolicyRequest, decoding: PromptState) -> None:
        self._policy, self._request, self._decoding = policy, request, decoding
        self._known, self._tokens = policy.known_text, policy.tokens
        self._max_tokens = request.max_new_tokens or policy._prompt.max_response_tokens
        forced = len(self._known.opening) + len(self._known.tail)
        self._limit = ReasoningLimit(
            request, self._max_tokens - len(self._known.tail), policy.tail_time, time.perf_counter
        )
        if request.forces_answer and self._max_tokens < forced:
            raise ValueError(
                f"max_new_tokens is {self._max_tokens}; with a limit of the reasoning at least "
                f"{forced} are needed, for a response without any"
            )
        self.token_ids: list[int] = []
        self.text = TextStream(policy.tokens)
        self.concentrations: list[NDArray[np.float32]] = []
        self.stop: StopReason | None = None
        self.num_passes = 0
        self._cut: StopReason | None = None
        self._next = 0
        self._started = self._first_token = time.perf_counter()

    def steps(self) -> Steps:
        """Decode to the end."""
        yield from self._prefill()
        while self.stop is None:
            self._request.remaining_s()
            yield from self._step()

    def result(self, received: float, ended: float) -> PolicyResult:
        """Return the result.

        Args:
            received: ``time.perf_counter()`` when the request arrived.
            ended: that when the last token was read.
        """
        assert self.stop is not None, "the response has ended"
        states = np.array(self.concentrations, np.float32).reshape(-1, self._policy.hidden_size)
        return PolicyResult(
            response=self._tokens.read(self.token_ids),
            concentrations=states,
            stop_reason=self.stop,
            token_ids=tuple(self.token_ids),
            num_prompt_tokens=len(self._decoding.prompt_ids),
            num_cached_tokens=self._decoding.num_cached_tokens,
            num_passes=self.num_passes,
            prefill_ms=1e3 * (self._first_token - self._started),
            decode_ms=1e3 * (ended - self._first_token),
            preprocess_ms=1e3 * (self._started - received),
        )

    def _prefill(self) -> Steps:
        """Read the prompt, and the tail at once for a response without reasoning."""
        tail = self._rest_of_tail() if self._limit.is_reached else []
        self._next, hidden = yield Prefill(tail)
        self._first_token = time.perf_counter()
        if tail:
            yield from self._write(tail)
            self._cut = StopReason.REASONING_BUDGET
            self._add_reference(hidden)

    def _step(self) -> Steps:
        """Write the next token, and those that one pass confirms."""
        if self._limit.is_set and self.concentrations:
            yield from self._write_next_reference()
        elif self._must_end():
            yield from self._read(self._rest_of_tail(), is_forced=True)
        elif self._next in self._tokens.end_ids:
            self.token_ids.append(self._next)
            self.stop = StopReason.END_OF_TEXT
        else:
            yield from self._write([self._next])
            is_last = len(self.token_ids) >= self._max_tokens
            if is_last:
                self.stop = StopReason.TOKEN_BUDGET
                if self._next != self._tokens.reference_id:
                    return
            draft = [] if is_last else self._draft()
            yield from self._read([self._next, *draft], self._is_forced, is_written=True)
            if len(self.token_ids) >= self._max_tokens and self._cut is None:
                self.stop = self.stop or StopReason.TOKEN_BUDGET

    def _must_end(self) -> bool:
        """Whether the rest of the tail is forced in place of the next token."""
        if not self._limit.is_set:
            return False
        if self._next in self._tokens.end_ids:
            self._cut = StopReason.END_OF_TEXT
        elif not self._limit.is_reasoning:
            return False
        elif self._limit.is_reached:  # by the last draft
            self._cut = StopReason.REASONING_BUDGET
        elif self._limit.is_due() and self._next != self._known.tail[0]:
            self._cut = StopReason.DEADLINE
        return self._cut is not None

    def _rest_of_tail(self) -> list[int]:
        """Return the tokens that the response lacks up to ``<REF_POS>``."""
        if not self.token_ids:
            return [*self._known.opening, *self._known.tail]
        if self._limit.is_reasoning:
            return self._known.tail
        return self._known.draft(self._limit.text) or self._known.tail[-1:]

    @property
    def _is_forced(self) -> bool:
        """Whether the reasoning is limited and has ended, so that ``<REF_POS>`` must follow."""
        has_ended = self._limit.is_set and not self._limit.is_reasoning
        return self._cut is not None or (has_ended and self._next != self._tokens.reference_id)

    def _write_next_reference(self) -> Steps:
        """After the answer to a limited request: write one more target if the policy would."""
        draft = self._known.next_reference
        fits = len(self.token_ids) + len(draft) <= self._max_tokens
        if draft[0] == self._next and fits and not self._limit.is_due():
            following, states = yield self._feed(draft)
            if following[:-1] == draft[1:]:
                yield from self._write(draft)
                self._next = following[-1]
                self._add_reference(states[-1])
                return
        self.stop = self._cut or StopReason.END_OF_TEXT

    def _draft(self) -> list[int]:
        """Return tokens to read with the next one: likely ones, or the forced tail."""
        policy, draft = self._policy, list[int]()
        is_reference = self._next == self._tokens.reference_id
        if self._limit.is_reached and self._limit.is_reasoning and not is_reference:
            self._cut = StopReason.REASONING_BUDGET
            return self._known.tail
        if self._is_forced:
            draft = self._rest_of_tail()
        elif policy.drafts_tail:
            draft = self._known.draft(self._limit.text)
        if not draft and (count := policy.prompt_lookup_num_tokens):
            draft = lookup_draft([*self._decoding.prompt_ids, *self.token_ids], count)
            draft = draft[: self._limit.remaining]
        draft = draft[: self._max_tokens - len(self.token_ids)]
        missing = self._request.max_targets - len(self.concentrations) - is_reference
        for index, token in enumerate(draft):
            if not missing or token in self._tokens.end_ids:
                return draft[:index]
            missing -= token == self._tokens.reference_id
        return draft

    def _read(self, tokens: Sequence[int], is_forced: bool, *, is_written: bool = False) -> Steps:
        """Read tokens in one pass, and keep those that are forced or confirmed.

        ``is_written``: the first token belongs to the response already.
        """
        start = time.perf_counter()
        following, states = yield self._feed(tokens)
        wanted = following[0] if is_written else self._next
        if self._cut is StopReason.REASONING_BUDGET and wanted == self._known.tail[0]:
            self._cut = None  # the reasoning ended by itself, just at the limit
        if len(tokens) > 1 and tokens[-1] == self._tokens.reference_id:
            self._policy.tail_time.add(time.perf_counter() - start)
        kept = len(tokens) if is_forced else 1
        while kept < len(tokens) and tokens[kept] == following[kept - 1]:
            kept += 1
        if kept < len(tokens):
            self._decoding.drop(len(tokens) - kept)
        yield from self._write(tokens[1:kept] if is_written else tokens[:kept])
        self._next = following[kept - 1]
        for token, hidden in zip(tokens[:kept], states, strict=False):
            if token == self._tokens.reference_id:
                self._add_reference(hidden)

    def _feed(self, tokens: Sequence[int]) -> Feed:
        self.num_passes += 1
        return Feed(tokens)

    def _add_reference(self, hidden: NDArray[np.float32]) -> None:
        self.concentrations.append(hidden)
        if len(self.concentrations) == self._request.max_targets:
            self.stop = self._cut or StopReason.TARGETS_REACHED

    def _write(self, tokens: Sequence[int]) -> Iterator[TextDelta]:
        for token in tokens:
            self.token_ids.append(token)
            added = self.text.add(token)
            self._limit.add(added)
            if added:
                yield TextDelta(added)
