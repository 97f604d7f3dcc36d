"""Limits of the reasoning: a number of tokens, or a time by which the hidden state is due."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from math import ceil

from coprs_deploy.policy.policy import PolicyRequest
from coprs_deploy.prompts import REASONING_END, REASONING_START

WINDOW = 32
"""Number of durations that an estimate is made from."""

CURRENT_S = 10.0
"""Age of the oldest duration of an estimate beside the newest: a busy moment is forgotten."""

ESTIMATE_QUANTILE = 0.9
"""Share of the recent durations that an estimate covers."""

_BEGINNINGS = [REASONING_END[:length] for length in range(1, len(REASONING_END))]

Clock = Callable[[], float]


class RunningEstimate:
    """Estimate of the next duration of a step from its recent ones, in seconds; thread-safe.

    Args:
        clock: ``time.perf_counter``, or its replacement in a test.
    """

    def __init__(self, clock: Clock = time.perf_counter) -> None:
        self._clock = clock
        self._recent: deque[tuple[float, float]] = deque(maxlen=WINDOW)

    def add(self, seconds: float) -> None:
        """Record a duration."""
        self._recent.append((self._clock(), seconds))

    @property
    def is_current(self) -> bool:
        """Whether the newest duration was recorded a moment ago."""
        return bool(self._recent) and self._clock() - self._recent[-1][0] <= CURRENT_S

    def quantile(self, share: float = ESTIMATE_QUANTILE) -> float | None:
        """Return a duration that this share of the recent ones do not exceed; None without any."""
        recent = list(self._recent)  # a copy, because other threads add durations meanwhile
        if not recent:
            return None
        oldest = recent[-1][0] - CURRENT_S
        ordered = sorted(seconds for recorded, seconds in recent if recorded >= oldest)
        return ordered[ceil(share * len(ordered)) - 1]


class ReasoningLimit:
    """Decides when the reasoning of one response has to end.

    Args:
        request: its ``max_reasoning_tokens`` and ``reasoning_deadline`` are the limits.
        max_tokens: tokens of the response that its budget leaves before the tail.
        tail_time: durations of the pass that reads the tail.
        clock: ``time.perf_counter``, or its replacement in a test.

    Attributes:
        is_set: whether the request has a limit, and hence an answer is forced.
        num_tokens: tokens of the reasoning so far, without those that may begin its end.
        text: response so far.
    """

    def __init__(
        self,
        request: PolicyRequest,
        max_tokens: int,
        tail_time: RunningEstimate,
        clock: Clock,
    ) -> None:
        self._max_reasoning, self._max_tokens = request.max_reasoning_tokens, max_tokens
        self._deadline = request.reasoning_deadline
        self.is_set = request.forces_answer
        self._tail_time = tail_time
        self._clock = clock
        self._token_times = RunningEstimate()
        self._last: float | None = None
        self.num_tokens = self._num_written = self._num_undecided = 0
        self.text = ""

    @property
    def is_reached(self) -> bool:
        """Whether reasoning or response have as many tokens as they may have before the tail."""
        return self.is_set and self._num_left() <= 0

    @property
    def remaining(self) -> int | None:
        """Tokens that the reasoning may still have; None without a limit, or behind it."""
        return max(0, self._num_left()) if self.is_set and self.is_reasoning else None

    @property
    def is_reasoning(self) -> bool:
        """Whether the reasoning goes on."""
        return REASONING_END not in self.text

    def add(self, text: str) -> None:
        """Record a token of the response and the text that it adds."""
        self.text += text
        self._num_written += 1
        if not self.is_reasoning or REASONING_START.startswith(self.text.strip()):
            return
        begun = max((len(part) for part in _BEGINNINGS if self.text.endswith(part)), default=0)
        if begun <= len(text):  # what came before did not begin the end
            self.num_tokens += self._num_undecided
            self._num_undecided = 0
        if begun:
            self._num_undecided += 1
        else:
            self.num_tokens += 1

    def _num_left(self) -> int:
        left = self._max_tokens - self._num_written
        given = self._max_reasoning
        return left if given is None else min(left, given - self.num_tokens)

    def is_due(self) -> bool:
        """Whether another token of the reasoning would miss the deadline.

        To be called once before each token, whose durations it measures.
        """
        now = self._clock()
        if self._last is not None:
            self._token_times.add(now - self._last)
        self._last = now
        if self._deadline is None:
            return False
        token = self._token_times.quantile() or 0.0
        tail = self._tail_time.quantile()
        tail = 2 * token if tail is None else tail
        return now + token + tail > self._deadline
