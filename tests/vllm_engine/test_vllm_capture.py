"""The capture alone, without an engine: which rows are taken, and when an answer is made to end."""

import importlib.util
from types import SimpleNamespace

import pytest

if importlib.util.find_spec("vllm") is not None:
    import torch
    from vllm import SamplingParams
    from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

    from coprs_deploy.policy.vllm_capture import (
        CAPTURES,
        MOST_UNFETCHED,
        CaptureOrder,
        Captures,
        ConcentrationCapture,
    )
    from coprs_deploy.policy.vllm_models import _CLIP_ROOT

REFERENCE, STOP, VOCABULARY, WIDTH = 7, 2, 10, 3


def order(key, targets=1, budget=20):
    return CaptureOrder(key, REFERENCE, STOP, targets, budget)


def params(order, **changes):
    options = {"max_tokens": order.budget + 1, "stop_token_ids": [STOP], **changes}
    return SamplingParams(extra_args=order.extra_args(), **options)


@pytest.fixture
def capture(monkeypatch):
    for name in ("rows", "_vectors"):
        monkeypatch.setattr(CAPTURES, name, getattr(Captures(), name))
    config = SimpleNamespace(speculative_config=None)
    return ConcentrationCapture(config, torch.device("cpu"), False)


def update(capture, *, added=(), removed=(), moved=()):
    capture.update_state(BatchUpdate(8, list(removed), list(added), list(moved)))


def step(capture, num_rows):
    """One engine step: row i of the hidden states holds i everywhere."""
    CAPTURES.rows = torch.arange(float(num_rows))[:, None].expand(-1, WIDTH)
    return capture.apply(torch.zeros(num_rows, VOCABULARY))


def forced(logits):
    return [bool(row[STOP] == 0 and torch.isinf(row).sum() == VOCABULARY - 1) for row in logits]


def taken(key):
    return {i: vector.tolist() for i, vector in CAPTURES.take(key).items()}


def test_a_row_is_taken_where_the_reference_token_is_read_and_the_answer_ends_there(capture):
    one, other = [4, REFERENCE], [REFERENCE, 4]
    update(capture, added=[(0, params(order("a")), [1], one), (2, params(order("b")), [1], other)])
    assert forced(step(capture, 3)) == [True, False, False]
    assert taken("a") == {1: [0.0] * WIDTH}
    assert taken("b") == {}
    other.append(REFERENCE)
    assert forced(step(capture, 3)) == [True, False, True]
    assert taken("b") == {2: [2.0] * WIDTH}


def test_a_reference_token_of_the_prompt_is_none_of_the_answers(capture):
    update(capture, added=[(0, params(order("prompt")), [REFERENCE], [])])
    assert forced(step(capture, 1)) == [False]
    assert taken("prompt") == {}


def test_several_targets_are_kept_by_their_place_and_the_last_one_ends_the_answer(capture):
    response = [REFERENCE]
    update(capture, added=[(0, params(order("several", targets=2)), None, response)])
    assert forced(step(capture, 1)) == [False]
    response += [4, REFERENCE]
    assert forced(step(capture, 1)) == [True]
    assert list(taken("several")) == [0, 2]


def test_the_budget_ends_an_answer(capture):
    response = [4] * 19
    update(capture, added=[(0, params(order("budget")), None, response)])
    assert forced(step(capture, 1)) == [False]
    response.append(4)
    assert forced(step(capture, 1)) == [True]


def test_requests_are_followed_as_they_move_swap_and_leave(capture):
    responses = {key: [REFERENCE] for key in "abc"}
    update(
        capture,
        added=[(row, params(order(key)), None, responses[key]) for row, key in enumerate("abc")],
    )
    update(
        capture,
        removed=[1],
        moved=[(2, 1, MoveDirectionality.UNIDIRECTIONAL), (0, 1, MoveDirectionality.SWAP)],
    )
    capture.update_state(None)
    step(capture, 2)
    assert taken("a") == {0: [1.0] * WIDTH}
    assert taken("c") == {0: [0.0] * WIDTH}
    assert taken("b") == {}


def test_a_row_that_another_request_takes_over_forgets_the_first(capture):
    update(capture, added=[(0, params(order("first")), None, [REFERENCE])])
    update(capture, added=[(0, SamplingParams(), None, [REFERENCE])])
    assert forced(step(capture, 1)) == [False]
    assert taken("first") == {}


def test_what_a_preempted_request_reads_again_replaces_what_it_had(capture):
    response = [4, REFERENCE]
    update(capture, added=[(0, params(order("again")), None, response)])
    step(capture, 1)
    update(capture, removed=[0], added=[(2, params(order("again")), None, response)])
    step(capture, 3)
    assert taken("again") == {1: [2.0] * WIDTH}


def test_vectors_that_nobody_fetches_do_not_grow_without_end():
    captures = Captures()
    for number in range(MOST_UNFETCHED + 3):
        captures.put(str(number), 0, torch.zeros(1))
    assert len(captures) == MOST_UNFETCHED
    assert captures.take("0") == {}
    assert len(captures.take(str(MOST_UNFETCHED + 2))) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_tokens": 3}, "min_tokens and ignore_eos would keep an answer from its end"),
        ({"ignore_eos": True}, "min_tokens and ignore_eos"),
        ({"stop_token_ids": [5]}, r"stop_token_ids is \[5\]; it must hold 2"),
        ({"stop_token_ids": [STOP, REFERENCE]}, "and not <REF_POS>"),
        ({"max_tokens": 20}, "max_tokens is 20; it must be above the budget of 20"),
    ],
)
def test_parameters_that_would_leave_a_reference_token_unread_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ConcentrationCapture.validate_params(params(order("x"), **changes))


def test_requests_of_others_are_left_alone():
    ConcentrationCapture.validate_params(SamplingParams(min_tokens=3))
    ConcentrationCapture.validate_params(params(order("x")))


def test_speculative_decoding_is_refused():
    with pytest.raises(ValueError, match="speculative decoding is on"):
        ConcentrationCapture(SimpleNamespace(speculative_config=object()), None, False)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.vision_tower.embeddings.x", "model.vision_tower.vision_model.embeddings.x"),
        ("vision_tower.embeddings.x", "vision_tower.vision_model.embeddings.x"),
        ("vision_tower.vision_model.embeddings.x", "vision_tower.vision_model.embeddings.x"),
        ("model.language_model.x", "model.language_model.x"),
    ],
)
def test_clip_is_found_under_the_names_of_older_and_newer_checkpoints(name, expected):
    assert _CLIP_ROOT.sub(r"\1vision_model.", name) == expected
