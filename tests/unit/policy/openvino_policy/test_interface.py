"""The policy's int8 graphs behave as transformers does: text, stops, aborts, deadlines, turns.

The demo model's response is known in advance, so that the graphs of the package are compared with
its weights, without an export.
"""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image

from coprs_deploy import demo
from coprs_deploy.bundle import POLICY_GRAPHS_DIRECTORY, open_bundle
from coprs_deploy.data.synthetic.examples import held_out_examples
from coprs_deploy.data.synthetic.presets import PRESETS
from coprs_deploy.errors import InstructionError, RequestTimeoutError
from coprs_deploy.policy import PolicyRequest, PolicyResult, StopReason, TextDelta
from coprs_deploy.policy.fair_lock import FairLock
from coprs_deploy.policy.openvino_policy import graphs as graphs_module
from coprs_deploy.policy.openvino_policy.decoder import MAX_IDLE_REQUESTS
from coprs_deploy.policy.openvino_policy.policy import OpenVinoPolicy
from coprs_deploy.policy.transformers_policy import TransformersPolicy

pytest.importorskip("openvino", reason="OpenVINO is not installed")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def policies():
    bundle = open_bundle(demo.BUNDLE)
    record = bundle.manifest.policy
    source = (record.prompt, record.min_pixels, record.max_pixels)
    with (
        OpenVinoPolicy(bundle.path / POLICY_GRAPHS_DIRECTORY, *source) as graphs,
        TransformersPolicy(bundle.policy_path, *source) as weights,
    ):
        yield graphs, weights


@pytest.fixture(scope="module")
def examples():
    return held_out_examples(PRESETS["plain"], 3, 1)


def ask(policy, image, instruction, **options):
    *deltas, result = policy.stream(PolicyRequest(image, instruction, **options))
    assert all(isinstance(delta, TextDelta) for delta in deltas)
    assert isinstance(result, PolicyResult)
    return [delta.text for delta in deltas], result


@pytest.mark.parametrize("index", range(4))
def test_events_and_result_are_those_of_transformers(policies, examples, index):
    example = examples[index]
    (deltas, found), (expected_deltas, expected) = (
        ask(policy, example.image, example.instruction) for policy in policies
    )
    assert deltas == expected_deltas
    assert len(deltas) > 5
    assert "".join(deltas) in found.response.text
    assert (found.response, found.token_ids) == (expected.response, expected.token_ids)
    assert found.stop_reason is expected.stop_reason
    assert found.stop_reason is (
        StopReason.END_OF_TEXT if index == 3 else StopReason.TARGETS_REACHED
    )
    assert found.num_prompt_tokens == expected.num_prompt_tokens
    assert found.concentrations.shape == expected.concentrations.shape
    for state, wanted in zip(found.concentrations, expected.concentrations, strict=True):
        norms = np.linalg.norm(state) * np.linalg.norm(wanted)
        assert state @ wanted / norms > 0.999


def test_a_second_target_after_the_first_gives_the_response_of_transformers(policies, examples):
    image, instruction = examples[0].image, examples[0].instruction
    found, expected = (ask(policy, image, instruction, max_targets=2)[1] for policy in policies)
    assert found.token_ids == expected.token_ids
    assert found.stop_reason is expected.stop_reason
    assert found.concentrations.shape == expected.concentrations.shape


@pytest.fixture(scope="module", params=["exact", "rounded"])
def drafting(request, policies):
    """Policy and the difference that drafts may make to a hidden state.

    On processors with int8 units the inputs of products are rounded to int8 too, and differently
    for several rows than for one.
    """
    if request.param == "rounded":
        yield policies[0], 1e-2
        return
    bundle = open_bundle(demo.BUNDLE)
    record = bundle.manifest.policy
    source = (record.prompt, record.min_pixels, record.max_pixels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs_module, "COMPRESSED", graphs_module.EXACT)
        policy = OpenVinoPolicy(bundle.path / POLICY_GRAPHS_DIRECTORY, *source)
    with policy:
        yield policy, 1e-4


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("max_targets", [1, 3])
def test_drafts_change_no_token_and_hardly_a_state(
    drafting, examples, monkeypatch, index, max_targets
):
    (graphs, tolerance), example = drafting, examples[index]
    monkeypatch.setattr(graphs, "drafts_tail", False)
    _, plain = ask(graphs, example.image, example.instruction, max_targets=max_targets)
    for tail, lookup in ((True, 0), (False, 4), (True, 4)):
        monkeypatch.setattr(graphs, "drafts_tail", tail)
        monkeypatch.setattr(graphs, "prompt_lookup_num_tokens", lookup)
        _, found = ask(graphs, example.image, example.instruction, max_targets=max_targets)
        assert found.token_ids == plain.token_ids
        assert found.num_passes < plain.num_passes or index == 3
        difference = np.abs(found.concentrations - plain.concentrations).max(initial=0)
        assert difference <= tolerance * np.abs(plain.concentrations).max(initial=1)


@pytest.mark.parametrize("limit", [0, 5, 60])
def test_a_limited_reasoning_gives_the_response_of_transformers(policies, examples, limit):
    for example in (examples[0], examples[3]):
        found, expected = (
            ask(policy, example.image, example.instruction, max_reasoning_tokens=limit)[1]
            for policy in policies
        )
        assert found.token_ids == expected.token_ids
        assert found.stop_reason is expected.stop_reason
        assert found.num_passes == expected.num_passes
        assert len(found.concentrations) == 1


def test_a_token_budget_ends_both_at_the_same_token(policies, examples):
    image, instruction = examples[0].image, examples[0].instruction
    found, expected = (ask(policy, image, instruction, max_new_tokens=5) for policy in policies)
    assert found[0] == expected[0]
    assert len(found[1].token_ids) == 5
    assert found[1].stop_reason is expected[1].stop_reason is StopReason.TOKEN_BUDGET


def test_an_instruction_that_is_too_long_is_refused_alike(policies, examples):
    messages = []
    for policy in policies:
        with pytest.raises(InstructionError) as caught:
            ask(policy, examples[0].image, "the red circle " * 100)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_a_deadline_that_passes_while_decoding_ends_the_stream(policies, examples):
    image, instruction = examples[1].image, examples[1].instruction
    for policy in policies:
        wanted = ask(policy, image, instruction)[1].token_ids
        deadline = time.perf_counter() + 60
        request = PolicyRequest(image, instruction, deadline=deadline)
        stream = policy.stream(request)
        assert isinstance(next(stream), TextDelta)
        object.__setattr__(request, "deadline", time.perf_counter() - 1)
        with pytest.raises(RequestTimeoutError):
            list(stream)
        assert ask(policy, image, instruction)[1].token_ids == wanted


def test_a_time_limit_ends_the_wait_for_other_requests(policies, examples):
    policy, example = policies[0], examples[1]
    for lock in (policy._vision._lock, policy._decoder._lock):
        policy._cache.clear()
        with lock.hold(), pytest.raises(RequestTimeoutError):
            ask(policy, example.image, example.instruction, deadline=time.perf_counter() + 0.05)
    assert ask(policy, example.image, example.instruction)[1].token_ids


def test_an_aborted_stream_leaves_the_next_response_unchanged(policies, examples):
    image, instruction = examples[2].image, examples[2].instruction
    for policy in policies:
        wanted = ask(policy, image, instruction)[1].token_ids
        for _ in range(3):
            stream = policy.stream(PolicyRequest(image, instruction))
            next(stream)
            stream.close()
        assert ask(policy, image, instruction)[1].token_ids == wanted


def test_requests_of_several_threads_get_their_own_responses(policies, examples):
    wanted = [ask(policies[1], e.image, e.instruction)[1].token_ids for e in examples]
    with ThreadPoolExecutor(6) as pool:
        running = [
            pool.submit(ask, policies[0], e.image, e.instruction) for e in (*examples, *examples)
        ]
        found = [future.result()[1].token_ids for future in running]
    assert found == [*wanted, *wanted]
    assert len(policies[0]._decoder._idle) <= MAX_IDLE_REQUESTS


@pytest.mark.parametrize("index", [0, 1], ids=["openvino", "transformers"])
def test_waiting_requests_come_first_in_first_out(policies, examples, monkeypatch, index):
    order = []

    class Recording(FairLock):
        @contextmanager
        def hold(self, *limit):
            with super().hold(*limit):
                order.append(threading.current_thread().name)
                yield

    policy, lock, request = policies[index], Recording(), (examples[0].image, "the red circle")
    ask(policy, *request)  # the vision tower does not run again
    monkeypatch.setattr(policy if index else policy._decoder, "_lock", lock)
    threads = [threading.Thread(target=ask, args=(policy, *request), name=n) for n in "abcd"]
    with lock.hold():
        for number, thread in enumerate(threads, start=1):
            thread.start()
            while lock.num_waiting < number:
                assert thread.is_alive()
                time.sleep(0.001)
    for thread in threads:
        thread.join(60)
    assert order[1:5] == ["a", "b", "c", "d"]


def test_streams_that_are_read_in_turn_do_not_mix(policies, examples):
    texts = []
    for policy in policies:
        streams = [policy.stream(PolicyRequest(e.image, e.instruction)) for e in examples[:2]]
        parts = [[], []]
        while streams[0] is not None or streams[1] is not None:
            for index, stream in enumerate(streams):
                event = None if stream is None else next(stream, None)
                if isinstance(event, TextDelta):
                    parts[index].append(event.text)
                elif event is None:
                    streams[index] = None
        texts.append(parts)
    assert texts[0] == texts[1]
    assert texts[0][0] != texts[0][1]


def test_a_second_question_does_no_vision_work_and_reads_only_the_new_tokens(
    policies, examples, monkeypatch
):
    graphs, weights = policies
    image, other = examples[0].image, examples[1].instruction
    ask(graphs, image, examples[0].instruction)
    lengths = []
    with graphs.start(PolicyRequest(image, other)) as decoding:
        feed = decoding._running.feed

        def counted(embeddings, positions, num_rows):
            lengths.append(len(embeddings))
            return feed(embeddings, positions, num_rows)

        def refuse(image, remaining_s=None):
            raise AssertionError("the vision tower ran again")

        monkeypatch.setattr(decoding._running, "feed", counted)
        decoding._vision = refuse
        token, _ = decoding.prefill()
    assert lengths == [len(decoding.prompt_ids) - decoding.num_cached_tokens]
    assert lengths[0] < 40
    assert token == ask(weights, image, other)[1].token_ids[0]
    assert ask(graphs, image, other)[1].token_ids == ask(weights, image, other)[1].token_ids


def test_compressed_graphs_run_with_the_settings_that_were_measured(policies):
    for graph in (policies[0]._decoder._compiled, policies[0]._vision._compiled):
        assert graph.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE") == 128
        assert graph.get_property("INFERENCE_NUM_THREADS") == 1
        assert graph.get_property("ENABLE_CPU_PINNING") is False
        assert graph.get_property("KV_CACHE_PRECISION").get_type_name() == "u8"


def test_images_of_several_threads_take_turns_in_the_vision_tower(policies, examples):
    """OpenVINO refuses to release memory while another request runs."""
    vision = policies[0]._vision
    images = [Image.fromarray(example.image) for example in examples[:4]]
    wanted = [vision(image) for image in images]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(vision, images * 40))
    assert all(np.array_equal(tokens, wanted[i % 4]) for i, tokens in enumerate(found))


def test_activations_of_the_vision_tower_are_released_after_each_image(
    policies, examples, monkeypatch
):
    vision, steps = policies[0]._vision, []
    compiled = vision._compiled

    class Recorded:
        def create_infer_request(self):
            steps.append("request")
            return compiled.create_infer_request()

        def release_memory(self):
            steps.append("release")
            compiled.release_memory()

    monkeypatch.setattr(vision, "_compiled", Recorded())
    for _ in range(2):
        vision(Image.fromarray(examples[0].image))
    assert steps == ["request", "release"] * 2
