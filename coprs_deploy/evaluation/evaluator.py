"""Evaluator: predict masks for examples and score them against the ground truth.

It opens no model. A callable predicts: a bundle's runtime or a model in training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from coprs_deploy.data.examples import Example
from coprs_deploy.evaluation.metrics import ExampleScore, count_pixels, union


@dataclass(frozen=True, eq=False)
class Prediction:
    """Prediction of a model for one example.

    Attributes:
        masks: (N, H, W) bool at the image's size; N is 0 for a no-match prediction.
        priors: (N, H, W) bool, the priors thresholded at logit 0.
        response: the whole generated text.
        extra: further metrics of this example, by name.
    """

    masks: NDArray[np.bool_]
    priors: NDArray[np.bool_]
    response: str
    extra: Mapping[str, float] = field(default_factory=dict)


ExampleT = TypeVar("ExampleT", bound=Example)

Predict = Callable[[Sequence[ExampleT]], Sequence[Prediction]]
"""Predicts a batch of examples, in their order."""


class Segmented(Protocol):
    """The fields of ``runtime.SegmentationResult`` that evaluation reads."""

    @property
    def masks(self) -> NDArray[np.bool_]:
        """(N, H, W)."""

    @property
    def prior_logits(self) -> NDArray[np.float32]:
        """(N, H, W)."""

    @property
    def response(self) -> str:
        """The whole generated text."""


Segment = Callable[[NDArray[np.uint8], str, int], Segmented]
"""``CoPRS.segment``: takes an image, an instruction and the maximum number of targets."""


def predict_with(segment: Segment, max_targets: int) -> Predict[Example]:
    """Turn ``CoPRS.segment``, with up to ``max_targets`` targets, into a predict callable."""

    def predict(examples: Sequence[Example]) -> list[Prediction]:
        results = [segment(each.image, each.instruction, max_targets) for each in examples]
        return [Prediction(each.masks, each.prior_logits > 0, each.response) for each in results]

    return predict


def evaluate(
    predict: Predict[ExampleT],
    examples: Sequence[ExampleT],
    *,
    batch_size: int = 1,
    on_progress: Callable[[int], None] | None = None,
) -> list[ExampleScore]:
    """Predict examples batch by batch and score the predictions.

    Args:
        predict: the model.
        examples: instructions with their ground truth.
        batch_size: number of examples of one call of ``predict``.
        on_progress: called after each batch with the number of examples that are done.

    Returns:
        One score per example, in the order of the examples.
    """
    scores: list[ExampleScore] = []
    for start in range(0, len(examples), batch_size):
        batch = examples[start : start + batch_size]
        pairs = zip(batch, predict(batch), strict=True)
        scores += [score_example(example, prediction) for example, prediction in pairs]
        if on_progress is not None:
            on_progress(len(scores))
    return scores


def score_example(example: Example, prediction: Prediction) -> ExampleScore:
    """Score one prediction against the ground truth of its example.

    Pixels of the ignore mask are removed from prediction and ground truth.
    """
    counted = True if example.ignore_mask is None else ~example.ignore_mask
    ground_truth = union(example.masks) & counted
    return ExampleScore(
        id=example.id,
        question_type=example.question_type,
        num_targets=len(example.masks),
        num_found=len(prediction.masks),
        mask=count_pixels(union(prediction.masks) & counted, ground_truth),
        prior=count_pixels(union(prediction.priors) & counted, ground_truth),
        instruction=example.instruction,
        response=prediction.response,
        extra=prediction.extra,
    )
