"""The evaluator on predictions made by hand."""

from types import SimpleNamespace

import numpy as np
import pytest

from coprs_deploy.data.examples import Example
from coprs_deploy.data.sources import open_examples
from coprs_deploy.evaluation.evaluator import Prediction, evaluate, predict_with, score_example
from coprs_deploy.evaluation.rows import MaskCounts
from coprs_deploy.evaluation.summary import flat_row, summarize


@pytest.fixture(scope="module")
def dataset():
    return open_examples("synthetic:full", 6, 2)


def perfect(examples):
    return [Prediction(each.masks, each.masks, "text", {"known": 1.0}) for each in examples]


def test_evaluate_perfect_predictions_returns_perfect_metrics(dataset):
    evaluated = evaluate(perfect, dataset.examples)
    metrics = summarize(evaluated)
    assert metrics["giou"] == metrics["prior_giou"] == metrics["ciou"] == 1
    assert metrics["no_match_recall"] == metrics["no_match_precision"] == 1
    assert metrics["known"] == 1


@pytest.mark.parametrize(("batch_size", "batches"), [(1, [1] * 8), (3, [3, 3, 2]), (64, [8])])
def test_evaluate_calls_predict_batch_by_batch(dataset, batch_size, batches):
    sizes, done = [], []

    def predict(examples):
        sizes.append(len(examples))
        return perfect(examples)

    evaluated = evaluate(predict, dataset.examples, batch_size=batch_size, on_progress=done.append)
    assert sizes == batches
    assert done == np.cumsum(batches).tolist()
    assert [each.id for each in evaluated] == [each.id for each in dataset.examples]


def test_evaluate_with_a_missing_prediction_is_refused(dataset):
    with pytest.raises(ValueError, match="zip"):
        evaluate(lambda examples: [], dataset.examples)


def test_evaluated_row_holds_texts_counts_and_metrics(dataset):
    (row,) = [flat_row(each) for each in evaluate(perfect, dataset.examples[:1])]
    example = dataset.examples[0]
    assert row == {
        "id": example.id,
        "question_type": example.question_type,
        "instruction": example.instruction,
        "response": "text",
        "num_targets": len(example.masks),
        "num_found": len(example.masks),
        "mask_iou": 1.0,
        "prior_iou": 1.0,
        "known": 1.0,
    }


def test_predict_with_thresholds_the_priors_of_a_segment_function(dataset):
    known = {example.instruction: example for example in dataset.examples}

    def segment(image, instruction, max_targets):
        masks = known[instruction].masks
        assert image is known[instruction].image
        assert len(masks) <= max_targets == dataset.max_targets
        prior_logits = np.where(masks, 3.0, -3.0).astype(np.float32)
        prior_logits[:, 0] = 0
        return SimpleNamespace(
            masks=masks,
            prior_logits=prior_logits,
            response="text",
            scores=[0.5] * len(masks),
            stop_reason="end_of_text",
        )

    (prediction,) = predict_with(segment, dataset.max_targets)(dataset.examples[:1])
    expected = dataset.examples[0].masks.copy()
    expected[:, 0] = False
    np.testing.assert_array_equal(prediction.masks, dataset.examples[0].masks)
    np.testing.assert_array_equal(prediction.priors, expected)
    assert prediction.response == "text"


def test_evaluate_leaves_out_the_pixels_of_the_ignore_mask():
    masks = np.zeros((1, 4, 6), dtype=bool)
    masks[0, 1:3, 1:4] = True
    ignored = np.zeros((4, 6), dtype=bool)
    ignored[:, 3:] = True
    predicted = np.zeros((1, 4, 6), dtype=bool)
    predicted[0, 1:3, 2:6] = True
    example = Example("1", np.zeros((4, 6, 3), np.uint8), "it", masks, ignore_mask=ignored)
    prediction = Prediction(predicted, masks, "text")
    counted = [(y, x) for y in range(4) for x in range(6) if not ignored[y, x]]
    hits = sum(masks[0, y, x] and predicted[0, y, x] for y, x in counted)
    either = sum(masks[0, y, x] or predicted[0, y, x] for y, x in counted)
    score = score_example(0, example, prediction)
    assert score.mask == MaskCounts(hits, either, 2, 4) == MaskCounts(2, 4, 2, 4)
    assert score.prior == MaskCounts(4, 4, 4, 4)
