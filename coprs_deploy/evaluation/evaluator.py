"""Evaluator: predict masks for examples and score them against the ground truth.

It opens no model. A callable predicts: a bundle's runtime or a model in training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from coprs_deploy.data.examples import Example
from coprs_deploy.data.rle import Rle, encode_mask
from coprs_deploy.evaluation.metrics import count_pixels, union
from coprs_deploy.evaluation.protocols import TARGETS, EvaluationProtocol
from coprs_deploy.evaluation.rows import EvaluationRow, MaskCounts


@dataclass(frozen=True, eq=False)
class Prediction:
    """Prediction of a model for one example.

    Attributes:
        masks: (N, H, W) bool at the image's size; N is 0 for a no-match prediction.
        priors: (N, H, W) bool, the priors thresholded at logit 0.
        response: the whole generated text.
        extra: further metrics of this example, by name.
        scores: confidence of each mask in [0, 1].
        stop_reason: why the response ended.
    """

    masks: NDArray[np.bool_]
    priors: NDArray[np.bool_]
    response: str
    extra: Mapping[str, float] = field(default_factory=dict)
    scores: Sequence[float] = ()
    stop_reason: str = ""


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

    @property
    def scores(self) -> NDArray[np.float64]:
        """(N,) in [0, 1]."""

    @property
    def stop_reason(self) -> str:
        """Why the response ended."""


Segment = Callable[[NDArray[np.uint8], str, int], Segmented]
"""``CoPRS.segment``: takes an image, an instruction and the maximum number of targets."""


def predict_with(segment: Segment, max_targets: int) -> Predict[Example]:
    """Turn ``CoPRS.segment``, with up to ``max_targets`` targets, into a predict callable."""

    def predict(examples: Sequence[Example]) -> list[Prediction]:
        found = [segment(each.image, each.instruction, max_targets) for each in examples]
        return [prediction_of(each) for each in found]

    return predict


def prediction_of(result: Segmented) -> Prediction:
    """Take the prediction from the result of ``CoPRS.segment``."""
    return Prediction(
        result.masks,
        result.prior_logits > 0,
        result.response,
        scores=[round(float(score), 6) for score in result.scores],
        stop_reason=result.stop_reason,
    )


def evaluate(
    predict: Predict[ExampleT],
    examples: Sequence[ExampleT],
    *,
    batch_size: int = 1,
    on_progress: Callable[[int], None] | None = None,
) -> list[EvaluationRow]:
    """Predict examples batch by batch and score the predictions under the protocol ``targets``.

    Args:
        predict: the model.
        examples: instructions with their ground truth.
        batch_size: number of examples of one call of ``predict``.
        on_progress: called after each batch with the number of examples that are done.

    Returns:
        One row per example, in the order of the examples, without masks.
    """
    rows: list[EvaluationRow] = []
    for start in range(0, len(examples), batch_size):
        batch = examples[start : start + batch_size]
        pairs = zip(batch, predict(batch), strict=True)
        rows += [
            score_example(start + number, example, prediction)
            for number, (example, prediction) in enumerate(pairs)
        ]
        if on_progress is not None:
            on_progress(len(rows))
    return rows


def score_example(
    index: int,
    example: Example,
    prediction: Prediction,
    protocol: EvaluationProtocol = TARGETS,
    **others: Any,
) -> EvaluationRow:
    """Score one prediction against the ground truth of its example.

    Args:
        index: position of the example in its source.
        example: the example.
        prediction: what was predicted for it.
        protocol: what ignored pixels count.
        others: further fields of the row, and those that differ from the example's.
    """
    ground_truth = union(example.masks)
    counted: NDArray[np.bool_] | bool = True
    if example.ignore_mask is not None and protocol.ignored_pixels == "foreground":
        ground_truth = ground_truth | example.ignore_mask
    elif example.ignore_mask is not None:
        counted = ~example.ignore_mask

    def count(masks: NDArray[np.bool_]) -> MaskCounts:
        return count_pixels(union(masks) & counted, ground_truth & counted)

    fields = {
        "index": index,
        "id": example.id,
        "image_size": example.image.shape[:2],
        "instruction": example.instruction,
        "question_type": example.question_type,
        "source": example.source,
        "num_targets": len(example.masks),
        "num_found": len(prediction.masks),
        "mask": count(prediction.masks),
        "prior": count(prediction.priors),
        "scores": tuple(prediction.scores),
        "response": prediction.response,
        "stop_reason": prediction.stop_reason,
        "extra": dict(prediction.extra),
    }
    return EvaluationRow(**{**fields, **others})


def encode_masks(masks: NDArray[np.bool_]) -> tuple[Rle, ...]:
    """Encode masks (N, H, W) for a row."""
    return tuple(encode_mask(mask) for mask in masks)
