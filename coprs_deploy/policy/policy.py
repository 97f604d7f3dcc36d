"""Policy interface: request, streamed text, result.

A policy is used from threads: ``stream`` may be called by several at once, and ``concurrency`` is
the number of requests that are decoded together. The transformers policy decodes one, the vLLM
policy many; callers do not differ.
"""

from __future__ import annotations

import reprlib
import threading
import time
from abc import abstractmethod
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from coprs_deploy.closing import Closeable
from coprs_deploy.errors import CoPRSError, RequestTimeoutError, check_number
from coprs_deploy.images import RgbArray
from coprs_deploy.prompts import Response, check_instruction


@dataclass(frozen=True)
class PolicyRequest:
    """Request to a policy.

    Attributes:
        image: (H, W, 3) uint8 RGB image.
        instruction: what to segment.
        max_targets: stop after this many ``<REF_POS>``.
        max_new_tokens: token budget of the response; None takes the prompt template's limit.
        deadline: ``time.perf_counter()`` value at which the request is abandoned; None for none.
        max_reasoning_tokens: tokens of the reasoning after which the answer is forced; 0 for no
            reasoning, None for no limit.
        reasoning_deadline: ``time.perf_counter()`` value by which the hidden state of
            ``<REF_POS>`` is due, so that the answer is forced in time; None for none.
        abandoned: set when no one waits for the response any more.
    """

    image: RgbArray
    instruction: str
    max_targets: int = 1
    max_new_tokens: int | None = None
    deadline: float | None = None
    max_reasoning_tokens: int | None = None
    reasoning_deadline: float | None = None
    abandoned: threading.Event = field(default_factory=threading.Event, compare=False)

    def __post_init__(self) -> None:
        check_instruction(self.instruction)
        check_number("max_targets", self.max_targets, least=1)
        if self.max_new_tokens is not None:
            check_number("max_new_tokens", self.max_new_tokens, least=1)
        if self.max_reasoning_tokens is not None:
            check_number("max_reasoning_tokens", self.max_reasoning_tokens, least=0)

    @property
    def forces_answer(self) -> bool:
        """Whether the reasoning is limited, and the tail up to ``<REF_POS>`` is forced."""
        return self.max_reasoning_tokens is not None or self.reasoning_deadline is not None

    def remaining_s(self) -> float | None:
        """Return the seconds until the deadline; None if there is none.

        Raises:
            CoPRSError: the request was abandoned.
            RequestTimeoutError: the deadline has passed.
        """
        if self.abandoned.is_set():
            raise CoPRSError("the request was abandoned")
        return remaining_s(self.deadline, self.instruction)


def remaining_s(deadline: float | None, instruction: str) -> float | None:
    """Return the seconds until the deadline of a request; None if there is none.

    Raises:
        RequestTimeoutError: the deadline has passed.
    """
    if deadline is None:
        return None
    remaining = deadline - time.perf_counter()
    if remaining <= 0:
        raise RequestTimeoutError(
            f"the request {reprlib.repr(instruction)} passed its deadline and was abandoned; "
            "increase the timeout, or reduce max_new_tokens"
        )
    return remaining


@dataclass(frozen=True)
class TextDelta:
    """Next piece of a streamed response; concatenated, the pieces are its text."""

    text: str


class StopReason(str, Enum):
    """Why a response ended."""

    TARGETS_REACHED = "targets_reached"
    END_OF_TEXT = "end_of_text"
    TOKEN_BUDGET = "token_budget"
    REASONING_BUDGET = "reasoning_budget"
    DEADLINE = "deadline"

    @property
    def description(self) -> str:
        """The reason in words, for messages."""
        return _STOP_DESCRIPTIONS[self]


_STOP_DESCRIPTIONS = {
    StopReason.TARGETS_REACHED: "the policy wrote the maximum number of <REF_POS>",
    StopReason.END_OF_TEXT: "the policy ended its response",
    StopReason.TOKEN_BUDGET: "the token budget was used up",
    StopReason.REASONING_BUDGET: "the answer was forced at the limit of reasoning tokens",
    StopReason.DEADLINE: "the answer was forced to meet the deadline",
}


@dataclass(frozen=True)
class PolicyResult:
    """Complete response with the hidden states of its ``<REF_POS>`` tokens.

    Attributes:
        response: parsed response.
        concentrations: (K, D) float32 post-norm hidden states at the ``<REF_POS>`` tokens, in
            order; K is 0 if none was written.
        stop_reason: why the response ended.
        token_ids: tokens of the response.
        num_prompt_tokens: prompt length, vision tokens included.
        prefill_ms: time from the start of the prefill to the first token.
        decode_ms: time from the first token to the last hidden state.
        queue_ms: waiting time before the prefill; 0 where requests wait within it.
        preprocess_ms: image preprocessing before queue and prefill.
        num_cached_tokens: prompt tokens that an earlier request had read.
        num_passes: passes of the decoder after the prefill; 0 where they are not counted.
    """

    response: Response
    concentrations: NDArray[np.float32]
    stop_reason: StopReason
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    prefill_ms: float
    decode_ms: float
    queue_ms: float = 0.0
    preprocess_ms: float = 0.0
    num_cached_tokens: int = 0
    num_passes: int = 0


PolicyStream: TypeAlias = Generator[TextDelta | PolicyResult, None, None]


class Policy(Closeable):
    """Model that writes the reasoning and returns the hidden state of each ``<REF_POS>``.

    Attributes:
        description: library, model and device, for messages.
        hidden_size: hidden size D of the policy.
        concurrency: number of requests that are decoded together.
        answers_together: whether :meth:`answer_together` is faster than one request at a time.
    """

    description: str
    hidden_size: int
    concurrency: int = 1
    answers_together: bool = False

    @abstractmethod
    def stream(self, request: PolicyRequest) -> PolicyStream:
        """Stream the response: :class:`TextDelta` pieces, then one :class:`PolicyResult`.

        Closing the generator abandons the request.

        Raises:
            InstructionError: the instruction is empty or too long.
            PolicyError: decoding failed.
            RequestTimeoutError: the request passed its deadline.
        """

    def answer_together(
        self, requests: Sequence[PolicyRequest]
    ) -> Iterator[tuple[int, PolicyResult | Exception]]:
        """Answer requests of which all are known, in an order of the policy's.

        Yields:
            Number of a request, and its result or error.

        Raises:
            PolicyError: the policy was closed.
        """
        for index, request in enumerate(requests):
            try:
                (*_, result) = self.stream(request)
                assert isinstance(result, PolicyResult), "a stream ends with its result"
                yield index, result
            except Exception as error:  # of any kind: it is the result of this request alone
                yield index, error
