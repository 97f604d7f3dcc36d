"""The vLLM policy answers as the transformers policy does, whatever else the engine is doing."""

import threading
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
from coprs_deploy.policy.vllm_policy.settings import VllmSettings
from coprs_deploy.prompts import REFERENCE_TOKEN
from tests import ROOT

VECTOR_TOLERANCE = 1e-4
"""Of the largest value: both take the same float32 sums, in another order."""

SCENE = ROOT / "examples/scene.png"
MODELS = ("shipped", "tiny", "tiny_llava")
SHARED = VllmSettings(num_threads=1)
CROWDED = VllmSettings(
    max_num_seqs=6,
    max_num_batched_tokens=64,
    enable_prefix_caching=False,
    num_threads=1,
)
"""Prompts are read in pieces, and nothing is kept."""


def open_policy(kind, bundle, **options):
    record = bundle.manifest.policy
    return kind(bundle.policy_path, record.prompt, record.min_pixels, record.max_pixels, **options)


def open_vllm(bundle, settings, kind=None):
    from coprs_deploy.policy.vllm_policy.policy import VllmPolicy

    return open_policy(kind or VllmPolicy, bundle, settings=settings)


def questions(count, **options):
    """The example of the repository, something that is not there, and held-out scenes."""
    example = load_image(SCENE)
    asked = [(example, "the largest red circle"), (example, "the cat")]
    asked += [(e.image, e.instruction) for e in held_out_examples(PLAIN, 12, 2)]
    pairs = (asked[i % len(asked)] for i in range(count))
    return [PolicyRequest(rgb, text, **options) for rgb, text in pairs]


def ask(policy, request):
    *words, result = policy.stream(request)
    assert "".join(piece.text for piece in words) == result.response.text
    return result


def ask_together(policy, requests, abandoned=()):
    """Ask all at once; the requests whose numbers are abandoned are left after a few words."""

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
    """Largest difference of two sets of vectors, relative to the largest value."""
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max(initial=0) / np.abs(expected).max(initial=1e-30))


def assert_equal(found, expected):
    assert found.token_ids == expected.token_ids
    assert found.stop_reason is expected.stop_reason
    assert found.response == expected.response
    assert found.num_prompt_tokens == expected.num_prompt_tokens
    assert difference(found.concentrations, expected.concentrations) < VECTOR_TOLERANCE


@pytest.fixture(scope="module")
def reference(bundle_of):
    """Ask the transformers policy of a bundle by name; answers are kept."""
    policies, answers = {}, {}

    def answer(name, request):
        if name not in policies:
            policies[name] = open_policy(TransformersPolicy, bundle_of(name))
        key = (name, request.rgb.tobytes(), request.instruction)
        key += (request.targets, request.max_new_tokens)
        if key not in answers:
            answers[key] = ask(policies[name], request)
        return answers[key]

    return answer


@pytest.fixture(scope="module", params=MODELS)
def shared(request, bundle_of):
    """The engine as it is set up by default, with the name of its bundle."""
    with open_vllm(bundle_of(request.param), SHARED) as policy:
        yield policy, request.param


class TestSharedEngine:
    def test_requests_that_are_answered_together_equal_those_of_transformers(
        self, shared, reference
    ):
        policy, name = shared
        asked = questions(16)
        found = ask_together(policy, asked, abandoned=(3, 8, 13))
        for number, (result, request) in enumerate(zip(found, asked, strict=True)):
            assert (result is None) == (number in (3, 8, 13))
            if result is not None:
                assert_equal(result, reference(name, request))
        assert policy.count_unfinished() == 0
        assert policy.count_unfetched() == 0
        answers = {result.token_ids for result in found if result is not None}
        vectors = [result.concentrations for result in found if result is not None]
        if name == "shipped":
            assert len(answers) > 9  # they are not all the same
        else:  # a scripted policy writes the same, but its states depend on the question
            assert difference(vectors[0], vectors[1]) > 100 * VECTOR_TOLERANCE

    def test_a_second_question_on_a_picture_reads_only_what_is_new(self, shared, reference):
        policy, name = shared
        rgb = np.random.default_rng(5).integers(0, 256, (96, 96, 3), dtype=np.uint8)
        shared_words = "whatever lies to the left of everything else and is"
        first, second = (PolicyRequest(rgb, f"{shared_words} {c}") for c in ("red", "blue"))
        assert ask(policy, first).num_cached_tokens == 0
        result = ask(policy, second)
        assert result.num_cached_tokens > 0
        assert_equal(result, reference(name, second))

    def test_several_targets_come_in_order(self, shared, reference):
        policy, name = shared
        for request in questions(4, targets=3, max_new_tokens=60):
            assert_equal(ask(policy, request), reference(name, request))

    @pytest.mark.parametrize("budget", [1, 8, 9, 10, 11])
    def test_the_budget_never_leaves_a_reference_token_unread(self, shared, reference, budget):
        policy, name = shared
        request = questions(1, targets=5, max_new_tokens=budget)[0]
        result = ask(policy, request)
        assert_equal(result, reference(name, request))
        if name != "shipped":  # the script writes <REF_POS> in the places 9 and 11
            assert result.stop_reason is StopReason.TOKEN_BUDGET
            assert len(result.concentrations) == (budget >= 9) + (budget >= 11)

    def test_abandoning_frees_everything_and_changes_no_later_answer(self, shared, reference):
        policy, name = shared
        request = questions(1)[0]
        # Abandoned behind <REF_POS>, so that a vector lies in the engine already.
        stream = policy.stream(PolicyRequest(request.rgb, request.instruction, targets=4))
        while next(stream) != TextDelta(REFERENCE_TOKEN):
            pass
        next(stream)
        stream.close()
        assert_equal(ask(policy, request), reference(name, request))
        assert policy.count_unfinished() == 0
        assert policy.count_unfetched() == 0

    def test_a_vector_that_is_lost_is_an_error_with_the_reasoning(self, shared, monkeypatch):
        policy, name = shared
        take = policy._files.take
        monkeypatch.setattr(policy._files, "take", lambda path: take(path)[:0])
        request = questions(1)[0]
        with pytest.raises(HiddenStateError, match="1 <REF_POS> and gave 0") as caught:
            ask(policy, request)
        expected = "red circle" if name == "shipped" else "generated policy"
        assert expected in caught.value.reasoning

    def test_an_instruction_that_is_too_long_is_refused(self, shared):
        policy, _ = shared
        with pytest.raises(InstructionError, match="shorten the instruction"):
            ask(policy, PolicyRequest(load_image(SCENE), "disc " * 1500))

    def test_masks_are_identical_to_those_of_transformers(self, shared, bundle_of):
        policy, name = shared
        bundle = bundle_of(name)
        stages = SegmentationGraphs(
            {
                graph: open_graph("onnxruntime", bundle.graph_path(graph), g.spec, RunnerOptions())
                for graph, g in bundle.manifest.graphs.items()
            }
        )
        geometry = bundle.manifest.geometry
        expected = CoPRS(stages, open_policy(TransformersPolicy, bundle), geometry)
        found = CoPRS(stages, policy, geometry)
        asked = [(request.rgb, request.instruction) for request in questions(6)]
        pixels = 0
        for one, other in zip(found.segment_many(asked), expected.segment_many(asked), strict=True):
            assert one.response == other.response
            changed = np.count_nonzero(one.masks != other.masks)
            # Random weights leave logits within rounding of zero, the shipped ones do not.
            assert changed <= (0 if name == "shipped" else one.masks.size // 1000)
            pixels += int(one.masks.sum())
        assert pixels > 0

    def test_the_settings_are_shown(self, shared):
        policy, _ = shared
        for part in ("on cpu", "float32", "quantization none", "16 requests", "caching on"):
            assert part in policy.description


@pytest.fixture(scope="module", params=["shipped", "tiny", "tiny_llava"])
def crowded(request, bundle_of):
    """An engine whose memory holds fewer answers than it is given at once."""
    from coprs_deploy.policy.vllm_policy.settings import kv_bytes_per_token

    bundle = bundle_of(request.param)
    from transformers import AutoConfig

    text = AutoConfig.from_pretrained(bundle.policy_path).get_text_config()
    # A longest answer must fit, or the engine does not start; three do not.
    longest = min(3301, text.max_position_embeddings)
    per_token = kv_bytes_per_token(text, 4)
    settings = VllmSettings(
        max_num_seqs=CROWDED.max_num_seqs if request.param == "shipped" else 64,
        max_num_batched_tokens=CROWDED.max_num_batched_tokens,
        enable_prefix_caching=False,
        kv_cache_memory_bytes=(longest + 64) * per_token,
        num_threads=1,
    )
    with open_vllm(bundle, settings) as policy:
        yield policy, request.param


class TestCrowdedEngine:
    def test_prompts_in_pieces_and_preempted_answers_equal_those_of_transformers(
        self, crowded, reference
    ):
        policy, name = crowded
        # Long answers, so that the memory runs out while they are written.
        options = {"targets": 200, "max_new_tokens": 150} if name != "shipped" else {}
        count = 24 if name != "shipped" else 32
        asked = questions(count, **options)
        abandoned = tuple(range(5, count, 10))
        found = ask_together(policy, asked, abandoned=abandoned)
        for result, request in zip(found, asked, strict=True):
            if result is not None:
                assert_equal(result, reference(name, request))
        if name != "shipped":
            assert policy.num_preemptions > 0
        assert policy.count_unfinished() == policy.count_unfetched() == 0

    def test_without_a_prefix_cache_nothing_is_kept(self, crowded, reference):
        policy, name = crowded
        request = questions(1)[0]
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

    def test_the_comparison_sees_a_wrong_row_and_a_step_too_early(self, mutant, reference):
        from tests.vllm_engine.mutants import ONE_STEP_EARLY, WRONG_ROW

        for budget in (100, WRONG_ROW, ONE_STEP_EARLY):
            asked = questions(8, max_new_tokens=budget)
            wrong = 0
            for result, request in zip(ask_together(mutant, asked), asked, strict=True):
                expected = reference("tiny", request)
                if budget == 100:
                    assert_equal(result, expected)
                    continue
                assert result.token_ids == expected.token_ids
                found = difference(result.concentrations, expected.concentrations)
                wrong += found > 100 * VECTOR_TOLERANCE
            assert wrong == 0 if budget == 100 else wrong > 4


class TestClosing:
    def test_closing_ends_running_answers_and_every_process(self, bundle_of):
        import psutil

        before = set(psutil.Process().children(recursive=True))
        policy = open_vllm(bundle_of("tiny"), SHARED)
        started = set(psutil.Process().children(recursive=True)) - before
        assert started
        stream = policy.stream(questions(1, targets=10_000, max_new_tokens=1500)[0])
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
        assert "closed while it answered" in str(failures[0])
        _, alive = psutil.wait_procs(started, timeout=60)
        assert not alive
        assert not policy._files.folder.exists()
        policy.close()  # closing again is allowed
        with pytest.raises(PolicyError, match="was closed"):
            next(policy.stream(questions(1)[0]))

    def test_a_directory_that_is_no_policy_is_refused(self, bundle_of, tmp_path):
        from coprs_deploy.policy.vllm_policy.policy import VllmPolicy

        prompt = bundle_of("tiny").manifest.policy.prompt
        with pytest.raises(PolicyError, match="cannot be loaded as a policy"):
            VllmPolicy(tmp_path, prompt, 784, 12_544)

    def test_a_gpu_that_vllm_was_not_built_for_is_refused(self, bundle_of):
        from vllm.platforms import current_platform

        if current_platform.device_type != "cpu":
            pytest.skip("this vLLM is built for a GPU")
        from coprs_deploy.policy.vllm_policy.policy import VllmPolicy

        with pytest.raises(PolicyError, match="is built for 'cpu'"):
            open_policy(VllmPolicy, bundle_of("tiny"), device="cuda")
