"""The interface of a policy, whichever library decodes it.

A policy is used from threads: ``stream`` may be called by several at once, and ``concurrency`` says
how many it really serves together. The transformers policy serves one; one that batches
continuously serves many, without a change to its callers.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Generator
from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from coprs_deploy.closing import Closeable
from coprs_deploy.errors import RequestTimeoutError
from coprs_deploy.images import RgbArray
from coprs_deploy.prompts import Response, check_instruction


@dataclass(frozen=True)
class PolicyRequest:
    """One question.

    Attributes:
        rgb: (H, W, 3) uint8, the whole picture.
        instruction: what to segment.
        targets: stop at this many ``<REF_POS>``.
        max_new_tokens: token budget of the response; None takes the prompt template's limit.
        deadline: when the answer is no longer wanted, as ``time.perf_counter()`` tells it.
    """

    rgb: RgbArray
    instruction: str
    targets: int = 1
    max_new_tokens: int | None = None
    deadline: float | None = None

    def __post_init__(self) -> None:
        check_instruction(self.instruction)
        if self.targets < 1:
            raise ValueError(f"targets is {self.targets}; it must be at least 1")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")

    def remaining_s(self) -> float | None:
        """Seconds until the deadline; None when there is none.

        Raises:
            RequestTimeoutError: it has passed.
        """
        if self.deadline is None:
            return None
        remaining = self.deadline - time.perf_counter()
        if remaining <= 0:
            raise RequestTimeoutError(
                f"the answer to {self.instruction!r} was not ready in time and was abandoned; give "
                "it more time, or a smaller token budget"
            )
        return remaining


@dataclass(frozen=True)
class TextDelta:
    """A piece of the response as it is written; the pieces together are its text."""

    text: str


class StopReason(str, Enum):
    """Why a response ended."""

    TARGETS_REACHED = "as many <REF_POS> as were asked for"
    END_OF_TEXT = "the policy ended its answer"
    TOKEN_BUDGET = "the token budget was used up"


@dataclass(frozen=True)
class PolicyResult:
    """A whole response.

    Attributes:
        response: the response, read.
        concentrations: (K, D) float32, the post-norm hidden state at each ``<REF_POS>``, in order;
            K is 0 when none was written.
        stop_reason: why it ended.
        token_ids: the response's tokens.
        num_prompt_tokens: length of the prompt, vision tokens included.
        prefill_ms: reading the prompt and the image, up to the first token.
        decode_ms: writing the response, the last hidden state included.
        queue_ms: waiting for its turn, before ``prefill_ms``.
        image_ms: preparing the image, as far as it comes before both.
        num_cached_tokens: tokens of the prompt that an earlier request had read already.
    """

    response: Response
    concentrations: NDArray[np.float32]
    stop_reason: StopReason
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    prefill_ms: float
    decode_ms: float
    queue_ms: float = 0.0
    image_ms: float = 0.0
    num_cached_tokens: int = 0


PolicyStream: TypeAlias = Generator[TextDelta | PolicyResult, None, None]


class Policy(Closeable):
    """Writes reasoning and gives the hidden state of each ``<REF_POS>``.

    Attributes:
        description: library, model and device, for people.
        hidden_size: policy hidden size D.
        concurrency: how many requests are served together.
    """

    description: str
    hidden_size: int
    concurrency: int = 1

    @abstractmethod
    def stream(self, request: PolicyRequest) -> PolicyStream:
        """Answer a request: words as they come, then one :class:`PolicyResult`.

        Closing the generator abandons the request.

        Raises:
            InstructionError: the instruction is empty or too long.
            PolicyError: the policy could not answer.
            RequestTimeoutError: the request's deadline passed.
        """

    @abstractmethod
    def close(self) -> None:
        """Free the policy; it must not be asked again."""
