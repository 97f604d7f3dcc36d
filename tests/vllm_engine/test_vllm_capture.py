"""Hidden-state capture without an engine: captured rows and forced ends."""

import importlib.util
from types import SimpleNamespace

import pytest

from coprs_deploy.policy.vllm_policy.transport import HiddenStateTransport

if importlib.util.find_spec("vllm") is not None:
    import torch
    from vllm import SamplingParams
    from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

    from coprs_deploy.policy.vllm_policy.capture import CaptureRequest, HiddenStateCapture
    from coprs_deploy.policy.vllm_policy.models import _CLIP_ROOT

REFERENCE, STOP, VOCABULARY, HIDDEN_SIZE = 7, 2, 10, 3


def params(path, max_targets=1, *, continues_reference=False, **changes):
    request = CaptureRequest(
        str(path), REFERENCE, STOP, max_targets, 20, continues_reference=continues_reference
    )
    options = {"max_tokens": 21, "stop_token_ids": [STOP], **changes}
    return SamplingParams(extra_args=request.extra_args(), **options)


@pytest.fixture
def transport(tmp_path):
    with HiddenStateTransport(HIDDEN_SIZE, tmp_path) as transport:
        yield transport


@pytest.fixture
def capture(monkeypatch):
    monkeypatch.setattr(HiddenStateCapture, "step", None)
    config = SimpleNamespace(speculative_config=None)
    return HiddenStateCapture(config, torch.device("cpu"), False)


def update(capture, *, added=(), removed=(), moved=()):
    capture.update_state(BatchUpdate(8, list(removed), list(added), list(moved)))


def step(capture, num_rows):
    """Run one engine step whose hidden states have the value i in row i."""
    HiddenStateCapture.step = torch.arange(float(num_rows))[:, None].expand(-1, HIDDEN_SIZE)
    return capture.apply(torch.zeros(num_rows, VOCABULARY))


def forced(logits):
    return [bool(row[STOP] == 0 and torch.isinf(row).sum() == VOCABULARY - 1) for row in logits]


def captured_rows(transport, path):
    """Return the numbers of the rows that were captured for a request."""
    return [row for row, *_ in transport.take(path).tolist()]


def test_capture_takes_the_row_that_reads_the_reference_token_and_ends_the_response(
    capture, transport
):
    a, b = transport.create(), transport.create()
    one, other = [4, REFERENCE], [REFERENCE, 4]
    update(capture, added=[(0, params(a), [1], one), (2, params(b), [1], other)])
    assert forced(step(capture, 3)) == [True, False, False]
    assert transport.take(a).tolist() == [[0.0] * HIDDEN_SIZE]
    other.append(REFERENCE)
    assert forced(step(capture, 3)) == [True, False, True]
    assert transport.take(b).tolist() == [[2.0] * HIDDEN_SIZE]
    assert transport.take(a).shape == (0, HIDDEN_SIZE)


def test_capture_reference_token_of_the_prompt_is_ignored(capture, transport):
    path = transport.create()
    update(capture, added=[(0, params(path), [REFERENCE], [])])
    assert forced(step(capture, 1)) == [False]
    assert captured_rows(transport, path) == []


def test_capture_continued_reference_token_is_the_last_of_the_prompt(capture, transport):
    path = transport.create()
    response = []
    given = params(path, max_targets=2, continues_reference=True)
    update(capture, added=[(1, given, [4, REFERENCE], response)])
    assert forced(step(capture, 2)) == [False, False]
    update(capture, moved=[(1, 0, MoveDirectionality.UNIDIRECTIONAL)])
    assert forced(step(capture, 1)) == [False]  # a later part of the prompt
    response += [4, REFERENCE]
    HiddenStateCapture.step = torch.full((1, HIDDEN_SIZE), 5.0)
    assert forced(capture.apply(torch.zeros(1, VOCABULARY))) == [True]
    assert captured_rows(transport, path) == [0.0, 5.0]


def test_capture_continued_reference_token_may_be_the_only_one(capture, transport):
    path = transport.create()
    update(capture, added=[(0, params(path, continues_reference=True), [REFERENCE], [])])
    assert forced(step(capture, 1)) == [True]
    assert captured_rows(transport, path) == [0.0]


def test_capture_several_targets_are_ordered_and_the_last_ends_the_response(capture, transport):
    response, path = [REFERENCE], transport.create()
    update(capture, added=[(1, params(path, max_targets=2), None, response)])
    assert forced(step(capture, 2)) == [False, False]
    update(capture, moved=[(1, 0, MoveDirectionality.UNIDIRECTIONAL)])
    response += [4, REFERENCE]
    assert forced(step(capture, 1)) == [True]
    assert captured_rows(transport, path) == [1.0, 0.0]


def test_capture_token_budget_ends_the_response(capture, transport):
    response = [4] * 19
    update(capture, added=[(0, params(transport.create()), None, response)])
    assert forced(step(capture, 1)) == [False]
    response.append(4)
    assert forced(step(capture, 1)) == [True]


def test_capture_tracks_moved_swapped_and_removed_requests(capture, transport):
    a, b, c = (transport.create() for _ in range(3))
    update(
        capture,
        added=[(row, params(f), None, [REFERENCE]) for row, f in enumerate((a, b, c))],
    )
    update(
        capture,
        removed=[1],
        moved=[(2, 1, MoveDirectionality.UNIDIRECTIONAL), (0, 1, MoveDirectionality.SWAP)],
    )
    capture.update_state(None)
    step(capture, 2)
    assert [captured_rows(transport, f) for f in (a, b, c)] == [[1.0], [], [0.0]]


def test_capture_reused_row_drops_the_previous_request(capture, transport):
    first = transport.create()
    update(capture, added=[(0, params(first), None, [REFERENCE])])
    update(capture, added=[(0, SamplingParams(), None, [REFERENCE])])
    assert forced(step(capture, 1)) == [False]
    assert captured_rows(transport, first) == []


def test_capture_preempted_request_replaces_its_states(capture, transport):
    response, path = [4, REFERENCE], transport.create()
    update(capture, added=[(0, params(path), None, response)])
    step(capture, 1)
    update(capture, removed=[0], added=[(2, params(path), None, response)])
    step(capture, 3)
    assert captured_rows(transport, path) == [2.0]


def test_capture_bfloat16_states_are_stored_as_float32(capture, transport):
    path = transport.create()
    update(capture, added=[(0, params(path), None, [REFERENCE])])
    HiddenStateCapture.step = torch.full((1, HIDDEN_SIZE), 0.1, dtype=torch.bfloat16)
    capture.apply(torch.zeros(1, VOCABULARY))
    assert transport.take(path).tolist() == [[0.10009765625] * HIDDEN_SIZE]


def test_capture_other_ranks_store_nothing(transport, monkeypatch):
    monkeypatch.setattr("coprs_deploy.policy.vllm_policy.capture.is_first_rank", lambda: False)
    other = HiddenStateCapture(SimpleNamespace(speculative_config=None), "cpu", False)
    path = transport.create()
    update(other, added=[(0, params(path), None, [REFERENCE])])
    assert forced(step(other, 1)) == [True]
    assert captured_rows(transport, path) == []


def test_capture_abandoned_request_stores_nothing(capture, transport):
    path = transport.create()
    update(capture, added=[(0, params(path), None, [REFERENCE])])
    path.unlink()
    assert forced(step(capture, 1)) == [True]
    assert len(transport) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_tokens": 3}, "min_tokens or ignore_eos is set"),
        ({"ignore_eos": True}, "min_tokens or ignore_eos is set"),
        ({"stop_token_ids": [5]}, r"stop_token_ids is \[5\]; it must contain 2"),
        ({"stop_token_ids": [STOP, REFERENCE]}, "and not <REF_POS>"),
        ({"max_tokens": 20}, "max_tokens is 20; it must exceed the token budget of 20"),
    ],
)
def test_validate_params_unread_reference_token_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        HiddenStateCapture.validate_params(params("x", **changes))


def test_validate_params_request_without_capture_is_accepted():
    HiddenStateCapture.validate_params(SamplingParams(min_tokens=3))
    HiddenStateCapture.validate_params(params("x"))


def test_capture_speculative_decoding_is_refused():
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
def test_load_weights_clip_names_of_older_and_newer_checkpoints_match(name, expected):
    assert _CLIP_ROOT.sub(r"\1vision_model.", name) == expected
