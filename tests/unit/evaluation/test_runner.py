"""Rows of a data set: order, failures, and several examples at once."""

import pickle
import threading

import pytest

from coprs_deploy.data.rle import decode_mask
from coprs_deploy.errors import PolicyError
from coprs_deploy.evaluation.protocols import GREFCOCO, LISA, SEG_ZERO
from coprs_deploy.evaluation.rows import MaskCounts, decode_row, encode_row
from coprs_deploy.evaluation.runner import EvaluationTask, evaluate_rows
from tests.unit.evaluation.fake_source import FakeSource, example_of, mask_of, result_of


class Named(FakeSource):
    """A source whose images have the given names."""

    def image_name(self, index):
        return "abacab"[index]


@pytest.fixture
def task():
    examples = [example_of(i, [{i, i + 1}], question_type="type") for i in range(6)]
    return EvaluationTask("fake", Named(examples), 2, LISA)


def segment(image, instruction, max_targets):
    number = int(instruction)
    return result_of([{number}, {number + 1}][:max_targets], [{number}])


def test_examples_on_one_image_are_neighbors_in_the_order_of_the_images(task):
    assert task.image_groups() == [[0, 2, 4], [1, 5], [3]]
    assert task.image_groups(done=[0, 3, 5]) == [[2, 4], [1]]
    scenes = EvaluationTask("scenes", list(task.examples), 1, LISA)
    assert scenes.image_groups() == [[0], [1], [2], [3], [4], [5]]


def test_row_has_masks_counts_and_texts(task):
    row = task.evaluate(3, segment)
    assert (row.index, row.id, row.image, row.image_size) == (3, "3", "c", (5, 6))
    assert (row.instruction, row.question_type, row.stop_reason) == ("3", "type", "end_of_text")
    assert (row.num_targets, row.num_found, row.error) == (1, 2, None)
    assert row.mask == MaskCounts(2, 2, 2, 2)
    assert row.prior == MaskCounts(1, 2, 1, 2)
    assert row.scores == (0.5, 0.9)
    decoded = [decode_mask(each, 5, 6) for each in row.masks]
    assert [each.tolist() for each in decoded] == [mask_of({n}).tolist() for n in (3, 4)]
    assert decode_row(encode_row(row)) == row


def test_error_of_the_model_is_a_row_with_its_ground_truth(task):
    def fail(*_):
        raise PolicyError("out of \ud800 memory")

    row = task.evaluate(1, fail)
    assert row.error == "PolicyError: out of \\ud800 memory"
    assert (row.num_found, row.masks, row.mask) == (0, (), MaskCounts(0, 2, 0, 2))
    assert decode_row(encode_row(row)) == row


def test_masks_of_another_size_fail_their_row_only(task):
    wrong = lambda *_: result_of([{1}], [{1}], size=(4, 4))  # noqa: E731
    row = task.evaluate(1, wrong)
    assert row.error.startswith("ValueError: ") and row.mask == MaskCounts(0, 2, 0, 2)
    assert task.evaluate(1, segment).error is None


def test_example_that_cannot_be_decoded_is_a_row_without_counts():
    task = EvaluationTask("fake", FakeSource([example_of(0, [{1}]), None]), 1, LISA)
    row = task.evaluate(1, segment)
    assert row.error == "ArtifactError: fake, example 2, image: it is damaged"
    assert (row.mask, row.prior, row.image, row.num_targets) == (None, None, "image-0", 1)


@pytest.mark.parametrize(("has_no_match", "expected"), [(True, 0), (False, 1)])
def test_empty_annotation_is_a_target_where_there_is_no_no_match(has_no_match, expected):
    source = FakeSource([example_of(0, [])], has_no_match=has_no_match)
    nothing = lambda *_: result_of([], [])  # noqa: E731
    row = EvaluationTask("fake", source, 1, GREFCOCO).evaluate(0, nothing)
    assert (row.num_targets, row.mask) == (expected, MaskCounts(0, 0, 0, 0))


def test_ignored_pixels_that_become_foreground_are_a_target():
    source = FakeSource([example_of(0, [], {1, 2})])
    row = EvaluationTask("fake", source, 1, SEG_ZERO).evaluate(0, segment)
    assert (row.num_targets, row.mask.ground_truth) == (1, 2)


@pytest.mark.parametrize("concurrency", [1, 3])
def test_rows_are_in_the_given_order_with_as_many_at_once_as_allowed(task, concurrency):
    barrier, active, most = threading.Barrier(concurrency), set(), []

    def together(image, instruction, max_targets):
        active.add(instruction)
        barrier.wait(30)  # passed only by as many threads as are allowed
        most.append(len(active))
        barrier.wait(30)
        active.discard(instruction)
        return segment(image, instruction, max_targets)

    rows = list(evaluate_rows(task, [4, 0, 2, 1, 5, 3], together, concurrency))
    assert [row.index for row in rows] == [4, 0, 2, 1, 5, 3]
    assert max(most) == concurrency
    assert all(row.error is None for row in rows)


def test_task_can_be_pickled(task):
    again = pickle.loads(pickle.dumps(task))
    assert again.evaluate(2, segment) == task.evaluate(2, segment)
    assert again.fingerprint() == task.fingerprint()
