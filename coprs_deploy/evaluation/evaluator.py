"""Asking a model every question of a set of examples and comparing its answers with the truth.

What answers and what is asked are protocols, so the bundle's runtime, a server's client or a model
in training can be judged by the same code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from coprs_deploy.evaluation.metrics import ExampleScore, overlap, union


class Asked(Protocol):
    """A question with its truth, as ``training.examples.Example`` has it."""

    @property
    def id(self) -> str:
        """Names it among its kind."""

    @property
    def image(self) -> NDArray[np.uint8]:
        """(H, W, 3) RGB."""

    @property
    def instruction(self) -> str:
        """What the user writes."""

    @property
    def masks(self) -> NDArray[np.bool_]:
        """(N, H, W), one a target."""

    @property
    def kind(self) -> str:
        """Kind of question."""


class Given(Protocol):
    """What came back, as ``runtime.SegmentationResult`` has it."""

    @property
    def masks(self) -> NDArray[np.bool_]:
        """(N, H, W)."""

    @property
    def prior_logits(self) -> NDArray[np.float32]:
        """(N, H, W) logits."""

    @property
    def response(self) -> str:
        """The whole text."""


Answering = Callable[[NDArray[np.uint8], str, int], Given]
"""Takes an image, an instruction and the most targets that may be named."""


@dataclass(frozen=True)
class Scored:
    """A question with its truth, the answer, and its score."""

    asked: Asked
    given: Given
    score: ExampleScore


def score_examples(
    answer: Answering, examples: Iterable[Asked], max_targets: int
) -> Iterator[Scored]:
    """Ask the questions one after the other.

    Args:
        answer: who answers.
        examples: what is asked.
        max_targets: how many targets an answer may name.

    Yields:
        One scored answer an example, as soon as it is there.
    """
    for asked in examples:
        given = answer(asked.image, asked.instruction, max_targets)
        truth = union(asked.masks)
        score = ExampleScore(
            id=asked.id,
            kind=asked.kind,
            num_targets=len(asked.masks),
            num_found=len(given.masks),
            mask=overlap(union(given.masks), truth),
            prior=overlap(union(given.prior_logits > 0), truth),
        )
        yield Scored(asked, given, score)
