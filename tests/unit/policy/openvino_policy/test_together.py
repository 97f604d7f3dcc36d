"""Several requests in common passes: the responses of single requests, in fewer passes."""

import numpy as np
import pytest

from coprs_deploy import demo
from coprs_deploy.bundle import POLICY_GRAPHS_DIRECTORY, open_bundle
from coprs_deploy.data.synthetic.examples import held_out_examples
from coprs_deploy.data.synthetic.presets import PRESETS
from coprs_deploy.engines.openvino_runner import openvino_core
from coprs_deploy.errors import InstructionError, PolicyError, RequestTimeoutError
from coprs_deploy.policy import PolicyRequest
from coprs_deploy.policy.openvino_policy import together
from coprs_deploy.policy.openvino_policy.decoder import (
    Decoder,
    DecoderRequest,
    NewRows,
    add_inputs,
)
from coprs_deploy.policy.openvino_policy.graphs import EXACT, VISION_FILE
from coprs_deploy.policy.openvino_policy.policy import OpenVinoPolicy

pytest.importorskip("openvino", reason="OpenVINO is not installed")

LEAST_COSINE = 0.999
"""Of hidden states: int8 products of one row and of several are rounded in other places, on
processors with int8 units."""

EXACT_TOLERANCE = 1e-5
"""Of the largest value, without such roundings: the same sums in another order."""

GRAPHS = demo.BUNDLE / POLICY_GRAPHS_DIRECTORY


@pytest.fixture(scope="module")
def policy():
    record = open_bundle(demo.BUNDLE).manifest.policy
    source = (GRAPHS, record.prompt, record.min_pixels, record.max_pixels)
    with OpenVinoPolicy(*source) as opened:
        yield opened


@pytest.fixture(scope="module")
def requests():
    """Return requests on four images; two about each image, apart from each other."""
    examples = held_out_examples(PRESETS["plain"], 3, 1)
    first = [PolicyRequest(e.image, e.instruction) for e in examples]
    return [*first, *(PolicyRequest(r.image, "the largest red circle") for r in first)]


@pytest.fixture(scope="module")
def decoder():
    return Decoder(GRAPHS, {**EXACT, "INFERENCE_NUM_THREADS": 1})


def answers(policy, requests):
    found = dict(policy.answer_together(requests))
    assert sorted(found) == list(range(len(requests)))
    return [found[index] for index in range(len(requests))]


def ask(policy, request):
    (*_, result) = policy.stream(request)
    return result


def assert_similar(found, expected):
    assert found.shape == expected.shape
    for state, wanted in zip(found, expected, strict=True):
        norms = np.linalg.norm(state) * np.linalg.norm(wanted)
        assert state @ wanted / norms > LEAST_COSINE


def assert_close(found, expected, tolerance):
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


def test_responses_are_those_of_single_requests(policy, requests):
    for request, found in zip(requests, answers(policy, requests), strict=True):
        expected = ask(policy, request)
        assert found.response == expected.response
        assert found.token_ids == expected.token_ids
        assert found.stop_reason is expected.stop_reason
        assert found.num_prompt_tokens == expected.num_prompt_tokens
        assert_similar(found.concentrations, expected.concentrations)
        assert min(found.prefill_ms, found.decode_ms) > 0


def test_requests_on_one_image_share_vision_and_prefix(policy, requests, monkeypatch):
    calls, vision = [], policy._vision

    class Counted:
        grid, num_tokens, positions = vision.grid, vision.num_tokens, vision.positions

        def __call__(self, image):
            calls.append(image)
            return vision(image)

    monkeypatch.setattr(policy, "_vision", Counted())
    found = answers(policy, requests)
    assert len(calls) == 4
    assert all(result.num_cached_tokens == 0 for result in found[:4])
    assert all(result.num_cached_tokens > 40 for result in found[4:])


@pytest.mark.parametrize(
    ("max_sequences", "max_attended", "num_packs"), [(16, 1 << 30, 1), (16, 0, 4), (1, 0, 8)]
)
def test_packs_change_no_response(
    policy, requests, monkeypatch, max_sequences, max_attended, num_packs
):
    monkeypatch.setattr(together, "MAX_SEQUENCES", max_sequences)
    monkeypatch.setattr(together, "MAX_ATTENDED", max_attended)
    lent, request = [], Decoder.request

    def counted(decoder, num_sequences=1):
        lent.append(num_sequences)
        return request(decoder, num_sequences)

    monkeypatch.setattr(Decoder, "request", counted)
    found = answers(policy, requests)
    assert len(lent) == num_packs
    assert sum(lent) == len(requests)
    monkeypatch.undo()
    assert [result.token_ids for result in found] == [ask(policy, r).token_ids for r in requests]


def test_repeated_run_computes_the_same_bits(policy, requests):
    first, second = answers(policy, requests), answers(policy, requests)
    for a, b in zip(first, second, strict=True):
        assert a.token_ids == b.token_ids
        assert np.array_equal(a.concentrations, b.concentrations)


def test_all_responses_of_a_pack_take_the_passes_of_the_longest(policy, requests, monkeypatch):
    monkeypatch.setattr(together, "MAX_ATTENDED", 1 << 30)
    passes, read = [], DecoderRequest.read

    def counted(running, parts):
        passes.append(len(parts))
        return read(running, parts)

    monkeypatch.setattr(DecoderRequest, "read", counted)
    found = answers(policy, requests)
    assert passes[:4] == [2, 2, 2, 2]  # the prompts, image by image
    assert len(passes) == 4 + max(result.num_passes for result in found)
    assert sum(passes[4:]) == sum(result.num_passes for result in found)


def test_error_of_one_request_is_its_result_alone(policy, requests):
    image = requests[0].image
    broken = [
        PolicyRequest(image, "the red circle " * 100),
        PolicyRequest(image, "the cup", deadline=0.0),
        PolicyRequest(image, "the cup", max_new_tokens=1, max_reasoning_tokens=5),
    ]
    found = answers(policy, [requests[1], *broken, requests[0]])
    assert isinstance(found[1], InstructionError)
    assert isinstance(found[2], RequestTimeoutError)
    assert isinstance(found[3], ValueError)
    for result, request in ((found[0], requests[1]), (found[4], requests[0])):
        assert result.token_ids == ask(policy, request).token_ids


def test_failed_pass_is_the_error_of_its_requests(policy, requests, monkeypatch):
    def fail(running, parts):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(DecoderRequest, "read", fail)
        found = answers(policy, requests)
    assert [str(error) for error in found] == ["out of memory"] * len(requests)
    assert answers(policy, requests)[0].token_ids == ask(policy, requests[0]).token_ids


@pytest.mark.parametrize(
    "limits",
    [
        {"max_targets": 3},
        {"max_new_tokens": 5},
        {"max_reasoning_tokens": 0},
        {"max_reasoning_tokens": 5, "max_targets": 2},
    ],
)
def test_limits_and_drafts_work_as_in_single_requests(policy, requests, monkeypatch, limits):
    monkeypatch.setattr(policy, "prompt_lookup_num_tokens", 4)
    limited = [PolicyRequest(r.image, r.instruction, **limits) for r in requests[:6]]
    for request, found in zip(limited, answers(policy, limited), strict=True):
        expected = ask(policy, request)
        assert found.token_ids == expected.token_ids
        assert found.stop_reason is expected.stop_reason
        assert found.num_passes == expected.num_passes
        assert_similar(found.concentrations, expected.concentrations)


def test_closed_policy_refuses_requests(requests):
    record = open_bundle(demo.BUNDLE).manifest.policy
    with OpenVinoPolicy(GRAPHS, record.prompt, record.min_pixels, record.max_pixels) as policy:
        pass
    with pytest.raises(PolicyError, match="was closed"):
        list(policy.answer_together(requests))


class TestDecoderRequest:
    """Sequences with a float32 cache, in which no row changes another."""

    @staticmethod
    def rows(decoder, sequence, start, tokens):
        positions = np.tile(start + np.arange(len(tokens)), (3, 1))
        return NewRows(sequence, decoder.embed(tokens), positions, len(tokens))

    def alone(self, decoder, *parts):
        with decoder.request() as running:
            return [running.read([self.rows(decoder, 0, *part)])[0] for part in parts]

    def test_sequences_do_not_see_each_other(self, decoder):
        a, b = [(0, [5, 9, 300]), (3, [17])], [(0, [80]), (1, [4, 6])]
        expected = [self.alone(decoder, *a), self.alone(decoder, *b)]
        with decoder.request(2) as running:
            for step in range(2):
                parts = [self.rows(decoder, 0, *a[step]), self.rows(decoder, 1, *b[step])]
                for number, (tokens, hidden) in enumerate(running.read(parts)):
                    assert tokens == expected[number][step][0]
                    assert_close(hidden, expected[number][step][1], EXACT_TOLERANCE)
            assert running.num_columns == 7

    def test_shared_prefix_is_read_once(self, decoder):
        (*_, expected) = self.alone(decoder, (0, [5, 9, 300, 17]))[0]
        with decoder.request(2) as running:
            running.share(1, range(2))
            parts = [self.rows(decoder, 0, 0, [5, 9, 80]), self.rows(decoder, 1, 2, [300, 17])]
            assert_close(running.read(parts)[1][1], expected[2:], EXACT_TOLERANCE)

    @pytest.mark.parametrize("num_sequences", [1, 2])
    def test_dropped_rows_are_forgotten(self, decoder, num_sequences):
        last = num_sequences - 1
        (_, (tokens, hidden)) = self.alone(decoder, (0, [5, 9]), (2, [17]))
        with decoder.request(num_sequences) as running:
            running.read([self.rows(decoder, last, 0, [5, 9, 80, 81])])
            running.drop(2, last)
            found = running.read([self.rows(decoder, last, 2, [17])])[0]
        assert found[0] == tokens
        assert_close(found[1], hidden, EXACT_TOLERANCE)

    def test_more_columns_than_at_first_are_kept(self, decoder, monkeypatch):
        monkeypatch.setattr("coprs_deploy.policy.openvino_policy.decoder.FIRST_COLUMNS", 2)
        expected = self.alone(decoder, (0, [5, 9, 300, 17, 80]))[0]
        with decoder.request() as running:
            found = running.read([self.rows(decoder, 0, 0, [5, 9, 300, 17, 80])])[0]
        assert found[0] == expected[0]
        assert_close(found[1], expected[1], EXACT_TOLERANCE)


def test_graph_that_is_no_decoder_is_refused():
    graph = openvino_core().read_model(GRAPHS / VISION_FILE)
    with pytest.raises(ValueError, match="selects rows 4 times"):
        add_inputs(graph)
