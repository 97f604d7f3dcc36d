"""The vLLM policy returns the results of the transformers policy, under any load of the engine."""

import dataclasses
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from coprs_deploy import CoPRS
from coprs_deploy.data.synthetic import PLAIN
from coprs_deploy.data.synthetic.examples import held_out_examples
from coprs_deploy.engines import RunnerOptions, SegmentationGraphs, open_graph
from coprs_deploy.errors import HiddenStateError, InstructionError, PolicyError
from coprs_deploy.images import load_image
from coprs_deploy.policy import PolicyRequest, StopReason, TextDelta
from coprs_deploy.policy.transformers_policy import TransformersPolicy
from coprs_deploy.policy.vllm_policy.settings import VllmSettings, kv_bytes_per_token
from coprs_deploy.prompts import REFERENCE_TOKEN
from tests import ROOT

STATE_TOLERANCE = 1e-4
"""Relative to the largest value: both add the same float32 values, in another order."""

SCENE = ROOT / "examples/scene.png"
MODELS = ("demo", "tiny", "tiny_llava")
SHARED = VllmSettings(num_threads=1)
CROWDED = VllmSettings(
    max_num_seqs=6,
    max_num_batched_tokens=64,
    enable_prefix_caching=False,
    num_threads=1,
)
"""Chunked prefill and no prefix cache."""


def open_policy(kind, bundle, **options):
    record = bundle.manifest.policy
    return kind(bundle.policy_path, record.prompt, record.min_pixels, record.max_pixels, **options)


def open_vllm(bundle, settings, kind=None):
    from coprs_deploy.policy.vllm_policy.policy import VllmPolicy

    return open_policy(kind or VllmPolicy, bundle, settings=settings)


def make_requests(count, **options):
    """Return requests for the example image (one a no-match) and for held-out scenes."""
    example = load_image(SCENE)
    inputs = [(example, "the largest red circle"), (example, "the cat")]
    inputs += [(e.image, e.instruction) for e in held_out_examples(PLAIN, 12, 2)]
    pairs = (inputs[i % len(inputs)] for i in range(count))
    return [PolicyRequest(image, instruction, **options) for image, instruction in pairs]


def ask(policy, request):
    *deltas, result = policy.stream(request)
    assert "".join(delta.text for delta in deltas) == result.response.text
    return result


def ask_together(policy, requests, abandoned=()):
    """Run all requests concurrently; the abandoned ones are closed after a few tokens."""

    def one(number):
        if number not in abandoned:
            return ask(policy, requests[number])
        stream = policy.stream(requests[number])
        for _ in range(1 + number % 3):
            next(stream)
        stream.close()
        return None

    with ThreadPoolExecutor(len(requests)) as pool:
        return list(pool.map(one, range(len(requests))))


def difference(found, expected):
    """Return the largest difference of two sets of states, relative to the largest value."""
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max(initial=0) / np.abs(expected).max(initial=1e-30))


def assert_equal(found, expected):
    assert found.token_ids == expected.token_ids
    assert found.stop_reason is expected.stop_reason
    assert found.response == expected.response
    assert found.num_prompt_tokens == expected.num_prompt_tokens
    assert difference(found.concentrations, expected.concentrations) < STATE_TOLERANCE


@pytest.fixture(scope="module")
def reference(bundle_of):
    """Return the result of the transformers policy of a bundle by name; results are cached."""
    policies, results = {}, {}

    def run(name, request):
        if name not in policies:
            policies[name] = open_policy(TransformersPolicy, bundle_of(name))
        key = (name, request.image.tobytes(), request.instruction)
        key += (request.max_targets, request.max_new_tokens, request.max_reasoning_tokens)
        if key not in results:
            results[key] = ask(policies[name], request)
        return results[key]

    return run


@pytest.fixture(scope="module", params=MODELS)
def shared(request, bundle_of):
    """Engine with default settings, and the name of its bundle."""
    with open_vllm(bundle_of(request.param), SHARED) as policy:
        yield policy, request.param


class TestSharedEngine:
    def test_stream_concurrent_requests_equal_transformers(self, shared, reference):
        policy, name = shared
        requests = make_requests(16)
        found = ask_together(policy, requests, abandoned=(3, 8, 13))
        for number, (result, request) in enumerate(zip(found, requests, strict=True)):
            assert (result is None) == (number in (3, 8, 13))
            if result is not None:
                assert_equal(result, reference(name, request))
        assert policy.count_unfinished() == 0
        assert policy.count_unfetched() == 0
        responses = {result.token_ids for result in found if result is not None}
        states = [result.concentrations for result in found if result is not None]
        if name == "demo":
            assert len(responses) > 9  # not all the same
        else:  # a scripted policy always writes the same, but its states depend on the request
            assert difference(states[0], states[1]) > 100 * STATE_TOLERANCE

    def test_stream_second_request_for_an_image_uses_the_prefix_cache(self, shared, reference):
        policy, name = shared
        image = np.random.default_rng(5).integers(0, 256, (96, 96, 3), dtype=np.uint8)
        prefix = "whatever lies to the left of everything else and is"
        first, second = (PolicyRequest(image, f"{prefix} {color}") for color in ("red", "blue"))
        assert ask(policy, first).num_cached_tokens == 0
        result = ask(policy, second)
        assert result.num_cached_tokens > 0
        assert_equal(result, reference(name, second))

    def test_stream_several_targets_equal_transformers(self, shared, reference):
        policy, name = shared
        for request in make_requests(4, max_targets=3, max_new_tokens=60):
            assert_equal(ask(policy, request), reference(name, request))

    @pytest.mark.parametrize("limit", [0, 1, 6, 60])
    @pytest.mark.parametrize("max_targets", [1, 3])
    def test_stream_limited_reasoning_equals_transformers(
        self, shared, reference, limit, max_targets
    ):
        policy, name = shared
        requests = make_requests(4, max_reasoning_tokens=limit, max_targets=max_targets)
        for result, request in zip(ask_together(policy, requests), requests, strict=True):
            assert_equal(result, reference(name, request))
            assert len(result.concentrations) >= 1
        assert policy.count_unfinished() == 0
        assert policy.count_unfetched() == 0

    def test_stream_limited_by_a_deadline_has_a_mask(self, shared):
        policy, _ = shared
        for request in make_requests(2):
            now = time.perf_counter()
            passed, distant = (
                ask(policy, dataclasses.replace(request, reasoning_deadline=now + seconds))
                for seconds in (0.0, 1e4)
            )
            assert passed.response.text == "<think></think> <REF_POS>"
            assert passed.stop_reason is StopReason.DEADLINE
            assert distant.stop_reason is StopReason.TARGETS_REACHED
            assert len(passed.concentrations) == len(distant.concentrations) == 1

    @pytest.mark.parametrize("budget", [1, 8, 9, 10, 11])
    def test_stream_token_budget_reads_a_reference_token_at_the_end(
        self, shared, reference, budget
    ):
        policy, name = shared
        request = make_requests(1, max_targets=5, max_new_tokens=budget)[0]
        result = ask(policy, request)
        assert_equal(result, reference(name, request))
        if name != "demo":  # the script writes <REF_POS> at positions 9 and 11
            assert result.stop_reason is StopReason.TOKEN_BUDGET
            assert len(result.concentrations) == (budget >= 9) + (budget >= 11)

    def test_stream_abandoned_request_is_freed_and_changes_no_later_result(self, shared, reference):
        policy, name = shared
        request = make_requests(1)[0]
        # Abandoned after <REF_POS>, so that the engine has written a hidden state.
        stream = policy.stream(PolicyRequest(request.image, request.instruction, max_targets=4))
        while next(stream) != TextDelta(REFERENCE_TOKEN):
            pass
        next(stream)
        stream.close()
        assert_equal(ask(policy, request), reference(name, request))
        assert policy.count_unfinished() == 0
        assert policy.count_unfetched() == 0

    def test_stream_lost_hidden_state_is_an_error_with_the_reasoning(self, shared, monkeypatch):
        policy, name = shared
        take = policy._transport.take
        monkeypatch.setattr(policy._transport, "take", lambda path: take(path)[:0])
        request = make_requests(1)[0]
        with pytest.raises(HiddenStateError, match="1 <REF_POS> and returned 0") as caught:
            ask(policy, request)
        expected = "red circle" if name == "demo" else "generated policy"
        assert expected in caught.value.reasoning

    def test_stream_too_long_instruction_is_refused(self, shared):
        policy, _ = shared
        with pytest.raises(InstructionError, match="shorten the instruction"):
            ask(policy, PolicyRequest(load_image(SCENE), "disc " * 1500))

    def test_segment_many_masks_equal_transformers(self, shared, bundle_of):
        policy, name = shared
        bundle = bundle_of(name)
        graphs = SegmentationGraphs(
            {
                graph: open_graph("onnxruntime", bundle.graph_path(graph), g.spec, RunnerOptions())
                for graph, g in bundle.manifest.graphs.items()
            }
        )
        geometry = bundle.manifest.geometry
        expected = CoPRS(graphs, open_policy(TransformersPolicy, bundle), geometry)
        found = CoPRS(graphs, policy, geometry)
        requests = [(request.image, request.instruction) for request in make_requests(6)]
        pixels = 0
        for one, other in zip(
            found.segment_many(requests), expected.segment_many(requests), strict=True
        ):
            assert one.response == other.response
            changed = np.count_nonzero(one.masks != other.masks)
            # Random weights have logits within rounding of zero, the demo model has none.
            assert changed <= (0 if name == "demo" else one.masks.size // 1000)
            pixels += int(one.masks.sum())
        assert pixels > 0

    def test_description_names_the_settings(self, shared):
        policy, _ = shared
        for part in ("on cpu", "float32", "quantization none", "16 requests", "caching on"):
            assert part in policy.description


@pytest.fixture(scope="module", params=MODELS)
def crowded(request, bundle_of):
    """Engine whose memory is too small for its concurrent requests."""
    from transformers import AutoConfig

    bundle = bundle_of(request.param)
    text = AutoConfig.from_pretrained(bundle.policy_path).get_text_config()
    # One request of maximum length must fit, or the engine does not start; three do not fit.
    longest = min(3301, text.max_position_embeddings)
    per_token = kv_bytes_per_token(text, 4)
    settings = VllmSettings(
        max_num_seqs=CROWDED.max_num_seqs if request.param == "demo" else 64,
        max_num_batched_tokens=CROWDED.max_num_batched_tokens,
        enable_prefix_caching=False,
        kv_cache_memory_bytes=(longest + 64) * per_token,
        num_threads=1,
    )
    with open_vllm(bundle, settings) as policy:
        yield policy, request.param


class TestCrowdedEngine:
    def test_stream_chunked_prefill_and_preempted_requests_equal_transformers(
        self, crowded, reference
    ):
        policy, name = crowded
        # Long responses, so that the memory runs out during decoding.
        options = {"max_targets": 200, "max_new_tokens": 150} if name != "demo" else {}
        count = 24 if name != "demo" else 32
        requests = make_requests(count, **options)
        abandoned = tuple(range(5, count, 10))
        found = ask_together(policy, requests, abandoned=abandoned)
        for result, request in zip(found, requests, strict=True):
            if result is not None:
                assert_equal(result, reference(name, request))
        if name != "demo":
            assert policy.num_preemptions > 0
        assert policy.count_unfinished() == policy.count_unfetched() == 0

    def test_stream_without_prefix_caching_has_no_cached_tokens(self, crowded, reference):
        policy, name = crowded
        request = make_requests(1)[0]
        for _ in range(2):
            result = ask(policy, request)
            assert result.num_cached_tokens == 0
            assert_equal(result, reference(name, request))


class TestMutants:
    @pytest.fixture(scope="class")
    @staticmethod
    def mutant(bundle_of):
        from tests.vllm_engine.mutants import MutantPolicy

        with open_vllm(bundle_of("tiny"), SHARED, MutantPolicy) as policy:
            yield policy

    def test_comparison_detects_a_wrong_row_and_an_earlier_step(self, mutant, reference):
        from tests.vllm_engine.mutants import ONE_STEP_EARLY, WRONG_ROW

        for budget in (100, WRONG_ROW, ONE_STEP_EARLY):
            requests = make_requests(8, max_new_tokens=budget)
            num_wrong = 0
            for result, request in zip(ask_together(mutant, requests), requests, strict=True):
                expected = reference("tiny", request)
                if budget == 100:
                    assert_equal(result, expected)
                    continue
                assert result.token_ids == expected.token_ids
                error = difference(result.concentrations, expected.concentrations)
                num_wrong += error > 100 * STATE_TOLERANCE
            assert num_wrong == 0 if budget == 100 else num_wrong > 4


class TestClosing:
    def test_close_ends_running_requests_and_every_process(self, bundle_of):
        import psutil

        before = set(psutil.Process().children(recursive=True))
        policy = open_vllm(bundle_of("tiny"), SHARED)
        started = set(psutil.Process().children(recursive=True)) - before
        assert started
        stream = policy.stream(make_requests(1, max_targets=10_000, max_new_tokens=1500)[0])
        next(stream)
        failures = []

        def read():
            try:
                for _ in stream:
                    pass
            except PolicyError as error:
                failures.append(error)

        reader = threading.Thread(target=read)
        reader.start()
        policy.close()
        reader.join(timeout=60)
        assert not reader.is_alive()
        assert "closed during the request" in str(failures[0])
        _, alive = psutil.wait_procs(started, timeout=60)
        assert not alive
        assert not policy._transport.folder.exists()
        policy.close()  # a second close has no effect
        with pytest.raises(PolicyError, match="was closed"):
            next(policy.stream(make_requests(1)[0]))

    def test_vllm_policy_directory_without_a_policy_is_refused(self, bundle_of, tmp_path):
        from coprs_deploy.policy.vllm_policy.policy import VllmPolicy

        prompt = bundle_of("tiny").manifest.policy.prompt
        with pytest.raises(PolicyError, match="cannot be loaded as a policy"):
            VllmPolicy(tmp_path, prompt, 784, 12_544)

    def test_vllm_policy_device_of_another_build_is_refused(self, bundle_of):
        from vllm.platforms import current_platform

        if current_platform.device_type != "cpu":
            pytest.skip("this vLLM is built for a GPU")
        from coprs_deploy.policy.vllm_policy.policy import VllmPolicy

        with pytest.raises(PolicyError, match="is built for 'cpu'"):
            open_policy(VllmPolicy, bundle_of("tiny"), device="cuda")
