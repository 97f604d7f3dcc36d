"""The capture alone, without an engine: which rows are taken, and when an answer is made to end."""

import importlib.util
from types import SimpleNamespace

import pytest

from coprs_deploy.policy.vllm_policy.transport import HiddenStateTransport

if importlib.util.find_spec("vllm") is not None:
    import torch
    from vllm import SamplingParams
    from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

    from coprs_deploy.policy.vllm_policy.capture import STEP, CaptureRequest, HiddenStateCapture
    from coprs_deploy.policy.vllm_policy.models import _CLIP_ROOT

REFERENCE, STOP, VOCABULARY, WIDTH = 7, 2, 10, 3


def order(file, targets=1, budget=20):
    return CaptureRequest(str(file), REFERENCE, STOP, targets, budget)


def params(order, **changes):
    options = {"max_tokens": order.budget + 1, "stop_token_ids": [STOP], **changes}
    return SamplingParams(extra_args=order.extra_args(), **options)


@pytest.fixture
def files(tmp_path):
    with HiddenStateTransport(WIDTH, tmp_path) as files:
        yield files


@pytest.fixture
def capture(monkeypatch):
    monkeypatch.setattr(STEP, "rows", None)
    config = SimpleNamespace(speculative_config=None)
    return HiddenStateCapture(config, torch.device("cpu"), False)


def update(capture, *, added=(), removed=(), moved=()):
    capture.update_state(BatchUpdate(8, list(removed), list(added), list(moved)))


def step(capture, num_rows):
    """One engine step: row i of the hidden states holds i everywhere."""
    STEP.rows = torch.arange(float(num_rows))[:, None].expand(-1, WIDTH)
    return capture.apply(torch.zeros(num_rows, VOCABULARY))


def forced(logits):
    return [bool(row[STOP] == 0 and torch.isinf(row).sum() == VOCABULARY - 1) for row in logits]


def taken(files, file):
    """The rows that were captured for a request, by number."""
    return [row for row, *_ in files.take(file).tolist()]


def test_a_row_is_taken_where_the_reference_token_is_read_and_the_answer_ends_there(capture, files):
    a, b = files.open(), files.open()
    one, other = [4, REFERENCE], [REFERENCE, 4]
    update(capture, added=[(0, params(order(a)), [1], one), (2, params(order(b)), [1], other)])
    assert forced(step(capture, 3)) == [True, False, False]
    assert files.take(a).tolist() == [[0.0] * WIDTH]
    other.append(REFERENCE)
    assert forced(step(capture, 3)) == [True, False, True]
    assert files.take(b).tolist() == [[2.0] * WIDTH]
    assert files.take(a).shape == (0, WIDTH)


def test_a_reference_token_of_the_prompt_is_none_of_the_answers(capture, files):
    file = files.open()
    update(capture, added=[(0, params(order(file)), [REFERENCE], [])])
    assert forced(step(capture, 1)) == [False]
    assert taken(files, file) == []


def test_several_targets_are_kept_in_order_and_the_last_one_ends_the_answer(capture, files):
    response, file = [REFERENCE], files.open()
    update(capture, added=[(1, params(order(file, targets=2)), None, response)])
    assert forced(step(capture, 2)) == [False, False]
    update(capture, moved=[(1, 0, MoveDirectionality.UNIDIRECTIONAL)])
    response += [4, REFERENCE]
    assert forced(step(capture, 1)) == [True]
    assert taken(files, file) == [1.0, 0.0]


def test_the_budget_ends_an_answer(capture, files):
    response = [4] * 19
    update(capture, added=[(0, params(order(files.open())), None, response)])
    assert forced(step(capture, 1)) == [False]
    response.append(4)
    assert forced(step(capture, 1)) == [True]


def test_requests_are_followed_as_they_move_swap_and_leave(capture, files):
    a, b, c = (files.open() for _ in range(3))
    update(
        capture,
        added=[(row, params(order(f)), None, [REFERENCE]) for row, f in enumerate((a, b, c))],
    )
    update(
        capture,
        removed=[1],
        moved=[(2, 1, MoveDirectionality.UNIDIRECTIONAL), (0, 1, MoveDirectionality.SWAP)],
    )
    capture.update_state(None)
    step(capture, 2)
    assert [taken(files, f) for f in (a, b, c)] == [[1.0], [], [0.0]]


def test_a_row_that_another_request_takes_over_forgets_the_first(capture, files):
    first = files.open()
    update(capture, added=[(0, params(order(first)), None, [REFERENCE])])
    update(capture, added=[(0, SamplingParams(), None, [REFERENCE])])
    assert forced(step(capture, 1)) == [False]
    assert taken(files, first) == []


def test_what_a_preempted_request_reads_again_replaces_what_it_had(capture, files):
    response, file = [4, REFERENCE], files.open()
    update(capture, added=[(0, params(order(file)), None, response)])
    step(capture, 1)
    update(capture, removed=[0], added=[(2, params(order(file)), None, response)])
    step(capture, 3)
    assert taken(files, file) == [2.0]


def test_half_precision_states_arrive_as_float32(capture, files):
    file = files.open()
    update(capture, added=[(0, params(order(file)), None, [REFERENCE])])
    STEP.rows = torch.full((1, WIDTH), 0.1, dtype=torch.bfloat16)
    capture.apply(torch.zeros(1, VOCABULARY))
    assert files.take(file).tolist() == [[0.10009765625] * WIDTH]


def test_only_the_first_rank_hands_vectors_over(files, monkeypatch):
    monkeypatch.setattr("coprs_deploy.policy.vllm_policy.capture.is_first_rank", lambda: False)
    other = HiddenStateCapture(SimpleNamespace(speculative_config=None), "cpu", False)
    file = files.open()
    update(other, added=[(0, params(order(file)), None, [REFERENCE])])
    assert forced(step(other, 1)) == [True]
    assert taken(files, file) == []


def test_what_is_found_for_an_abandoned_request_goes_nowhere(capture, files):
    file = files.open()
    update(capture, added=[(0, params(order(file)), None, [REFERENCE])])
    file.unlink()
    assert forced(step(capture, 1)) == [True]
    assert len(files) == 0


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
        HiddenStateCapture.validate_params(params(order("x"), **changes))


def test_requests_of_others_are_left_alone():
    HiddenStateCapture.validate_params(SamplingParams(min_tokens=3))
    HiddenStateCapture.validate_params(params(order("x")))


def test_speculative_decoding_is_refused():
    with pytest.raises(ValueError, match="speculative decoding is on"):
        HiddenStateCapture(SimpleNamespace(speculative_config=object()), None, False)


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
