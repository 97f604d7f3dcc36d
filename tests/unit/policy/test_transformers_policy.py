"""Greedy decoding in transformers: tokens, hidden states, limits, concurrent requests."""

import dataclasses
import re
import shutil
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import zip_longest

import numpy as np
import pytest
import torch
from torch._inductor import config as inductor_config
from transformers import AutoModelForImageTextToText, AutoTokenizer

from coprs_deploy.checkpoint import read_checkpoint
from coprs_deploy.conversion.random_policy import POLICY_SIZES, build_random_policy
from coprs_deploy.errors import (
    InstructionError,
    MissingDependencyError,
    PolicyError,
    RequestTimeoutError,
    RuntimeUnavailableError,
    install_hint,
)
from coprs_deploy.images import fit_pixel_count
from coprs_deploy.policy import PolicyRequest, StopReason, static_decoding
from coprs_deploy.policy.transformers_policy import TransformersPolicy
from coprs_deploy.policy.vision_inputs import VisionProcessor
from coprs_deploy.prompts import REFERENCE_TOKEN, encode_prompt

STATE_TOLERANCE = 1e-5
"""Relative to the largest value: a cached step adds the same float32 values in another order."""

LIMITS = POLICY_SIZES["tiny"].image_limits


def open_policy(directory, prompt, **options):
    return TransformersPolicy(
        directory, prompt, min_pixels=LIMITS.min_pixels, max_pixels=LIMITS.max_pixels, **options
    )


@pytest.fixture(scope="module", params=["tiny_checkpoint", "tiny_llava_checkpoint"])
def policy(request):
    """Scripted policy of a tiny checkpoint, for each family."""
    checkpoint = read_checkpoint(request.getfixturevalue(request.param))
    with open_policy(checkpoint.policy_path, checkpoint.config.prompt) as opened:
        yield opened


@pytest.fixture
def scripted(tmp_path):
    """Open a policy whose response is the given script."""
    opened = []

    def opener(script, size="tiny", prompt_changes=None):
        generated = build_random_policy(size, script=script)
        directory = tmp_path / f"policy-{len(opened)}"
        generated.save(directory)
        prompt = type(generated.prompt).from_json(
            {**generated.prompt.to_json(), **(prompt_changes or {})}
        )
        opened.append(open_policy(directory, prompt))
        return opened[-1]

    yield opener
    for policy in opened:
        policy.close()


@pytest.fixture(scope="module", params=["tiny", "tiny-llava"])
def unscripted(request, tmp_path_factory):
    """Policy without a script: its response depends on image and instruction."""
    directory = tmp_path_factory.mktemp("unscripted")
    with pytest.MonkeyPatch.context() as patch:
        size = dataclasses.replace(POLICY_SIZES[request.param], is_scripted=False)
        patch.setitem(POLICY_SIZES, "unscripted", size)
        generated = build_random_policy("unscripted", seed=8)
    for name, parameter in generated.model.named_parameters():
        if parameter.ndim == 2 and ("language_model" in name or "lm_head" in name):
            parameter.mul_(6)  # the initial weights are so small that all states are similar
    generated.save(directory)
    with open_policy(directory, generated.prompt) as opened:
        yield opened, directory, generated.prompt


@pytest.fixture
def ask(scene):
    """Run a request to its end; return the text pieces and the result."""

    def run(policy, instruction="the red disc", image=None, **options):
        request = PolicyRequest(scene if image is None else image, instruction, **options)
        *deltas, result = policy.stream(request)
        return [delta.text for delta in deltas], result

    return run


@pytest.fixture
def noise():
    """Image of another shape."""
    return np.random.default_rng(0).integers(0, 256, (64, 48, 3), dtype=np.uint8)


def reference_positions(policy, result):
    token = policy.tokens.tokenizer.convert_tokens_to_ids(REFERENCE_TOKEN)
    return [i for i, t in enumerate(result.token_ids) if t == token]


def uncached_states(policy, request, token_ids):
    """Hidden states of a response in one forward pass, the reference for cached decoding."""
    with policy.start(request) as decoding:
        hidden = decoding.read([*decoding.prompt_ids, *token_ids])
    return hidden[0, len(decoding.prompt_ids) :]


def relative_error(found, expected):
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("max_targets", [1, 3])
@pytest.mark.parametrize("image_name", ["scene", "noise"])
def test_stream_concentrations_equal_the_uncached_states_at_the_reference_tokens(
    policy, ask, request, image_name, max_targets
):
    image = request.getfixturevalue(image_name)
    _, result = ask(policy, image=image, max_targets=max_targets)
    policy_request = PolicyRequest(image, "the red disc", max_targets)
    states = uncached_states(policy, policy_request, result.token_ids).numpy()
    positions = reference_positions(policy, result)
    assert states.shape == (len(result.token_ids), policy.hidden_size)
    assert result.concentrations.dtype == np.float32
    assert result.concentrations.shape == (max_targets, policy.hidden_size)
    assert positions == list(result.response.reference_positions)
    for concentration, position in zip(result.concentrations, positions, strict=True):
        assert relative_error(concentration, states[position]) < STATE_TOLERANCE
        # The state one step earlier and those of other positions differ clearly.
        others = [i for i in range(len(states)) if i != position]
        assert min(relative_error(concentration, states[i]) for i in others) > 0.01


def test_uncached_states_are_those_after_the_final_norm(policy, ask, scene):
    _, result = ask(policy)
    states = uncached_states(policy, PolicyRequest(scene, "the red disc"), result.token_ids)
    # The weights of the norm are one, so the mean square of every state is one.
    means = states.square().mean(dim=-1)
    torch.testing.assert_close(means, torch.ones_like(means), rtol=1e-3, atol=0)  # its epsilon


@pytest.mark.parametrize("change", ["image", "instruction"])
def test_stream_concentrations_depend_on_image_and_instruction(policy, ask, noise, change):
    _, first = ask(policy)
    changes = {"image": noise} if change == "image" else {"instruction": "the blue square"}
    _, second = ask(policy, **changes)
    assert second.token_ids == first.token_ids
    assert relative_error(second.concentrations, first.concentrations) > 100 * STATE_TOLERANCE


def test_stream_tokens_equal_generate_of_transformers(unscripted, ask, scene):
    policy, directory, prompt = unscripted
    _, result = ask(policy, max_new_tokens=24, max_targets=9)

    model = AutoModelForImageTextToText.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    image = fit_pixel_count(scene, LIMITS.min_pixels, LIMITS.max_pixels)
    vision = VisionProcessor(directory, model.config)(image)
    prompt_ids = encode_prompt(prompt, tokenizer, "the red disc", vision.num_tokens)
    input_ids = torch.tensor([prompt_ids])
    inputs = dict(vision.tensors)
    if vision.marks_image_tokens:
        inputs["mm_token_type_ids"] = (input_ids == model.config.image_token_id).int()
    generated = model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        do_sample=False,
        max_new_tokens=24,
        **inputs,
    )
    expected = generated[0, len(prompt_ids) :].tolist()
    assert result.num_prompt_tokens == len(prompt_ids)
    assert list(result.token_ids) == expected[: len(result.token_ids)]
    assert len(set(expected)) > 4  # not a repetition of one token


def test_stream_unscripted_response_depends_on_image_and_instruction(unscripted, ask, noise):
    policy, _, _ = unscripted
    responses = {
        ask(policy, instruction=instruction, max_new_tokens=12, **options)[1].token_ids
        for instruction in ("the red disc", "everything that is blue")
        for options in ({}, {"image": noise})
    }
    assert len(responses) == 4


@pytest.mark.parametrize("max_targets", [1, 2])
def test_stream_without_drafts_reads_the_prompt_once_and_each_token_once(
    policy, ask, monkeypatch, max_targets
):
    monkeypatch.setattr(policy, "drafts_tail", False)
    lengths = []

    def record(module, args, kwargs):
        lengths.append(kwargs["input_ids"].shape[1])

    hook = policy._model.model.register_forward_pre_hook(record, with_kwargs=True)
    try:
        _, result = ask(policy, max_targets=max_targets)
    finally:
        hook.remove()
    assert lengths == [result.num_prompt_tokens] + [1] * len(result.token_ids)
    assert result.num_passes == len(result.token_ids)


SPACED = ("<think>", " this", " is", " it", "</think>", "Ġ", REFERENCE_TOKEN, "<|im_end|>")
"""Response with the tail of the prompt template; ``Ġ`` is a space in a byte-level vocabulary."""


def test_stream_tail_is_read_in_one_pass_with_equal_results(scripted, ask, monkeypatch):
    policy = scripted(SPACED)
    _, found = ask(policy)
    monkeypatch.setattr(policy, "drafts_tail", False)
    _, expected = ask(policy)
    assert found.response.text == "<think> this is it</think> <REF_POS>"
    assert found.token_ids == expected.token_ids
    assert (found.num_passes, expected.num_passes) == (5, 7)
    assert relative_error(found.concentrations, expected.concentrations) < STATE_TOLERANCE


@pytest.mark.parametrize("draft", ["tail", "lookup"])
def test_stream_drafts_change_no_token_and_no_state(unscripted, ask, monkeypatch, draft):
    policy, _, _ = unscripted
    monkeypatch.setattr(policy, "drafts_tail", False)
    _, expected = ask(policy, max_new_tokens=40, max_targets=9)
    monkeypatch.setattr(policy, "drafts_tail", draft == "tail")
    monkeypatch.setattr(policy, "prompt_lookup_num_tokens", 4 * (draft == "lookup"))
    _, found = ask(policy, max_new_tokens=40, max_targets=9)
    assert found.token_ids == expected.token_ids
    assert found.stop_reason is expected.stop_reason
    if len(expected.concentrations):
        assert relative_error(found.concentrations, expected.concentrations) < STATE_TOLERANCE


@pytest.mark.parametrize("max_reasoning_tokens", [0, 2])
def test_stream_forced_answer_has_the_uncached_state(policy, ask, scene, max_reasoning_tokens):
    pieces, result = ask(policy, max_reasoning_tokens=max_reasoning_tokens)
    wanted = ["<think></think> <REF_POS>", "<think> this generated</think> <REF_POS>"]
    assert "".join(pieces) == result.response.text == wanted[max_reasoning_tokens // 2]
    assert result.stop_reason is StopReason.REASONING_BUDGET
    states = uncached_states(policy, PolicyRequest(scene, "the red disc"), result.token_ids)
    assert relative_error(result.concentrations[0], states[-1].numpy()) < STATE_TOLERANCE


def test_stream_stops_at_max_targets(policy, ask):
    for max_targets in (1, 2, 4):
        pieces, result = ask(policy, max_targets=max_targets)
        assert result.stop_reason is StopReason.TARGETS_REACHED
        assert len(result.concentrations) == max_targets
        assert result.response.text.count(REFERENCE_TOKEN) == max_targets
        assert result.response.text.endswith(REFERENCE_TOKEN)
        assert pieces[-1] == REFERENCE_TOKEN


def test_stream_stops_at_the_end_token(scripted, ask):
    policy = scripted(("<think>", " no", " such", " thing", "</think>", "<|im_end|>"))
    pieces, result = ask(policy)
    assert result.stop_reason is StopReason.END_OF_TEXT
    assert result.concentrations.shape == (0, policy.hidden_size)
    assert result.concentrations.dtype == np.float32
    assert result.response.text == "<think> no such thing</think>" == "".join(pieces)
    assert result.response.reasoning == "no such thing"


def test_stream_early_end_keeps_the_previous_targets(scripted, ask):
    policy = scripted(("<think>", " one", "</think>", REFERENCE_TOKEN, "<|im_end|>"))
    _, result = ask(policy, max_targets=3)
    assert result.stop_reason is StopReason.END_OF_TEXT
    assert len(result.concentrations) == 1
    assert result.response.reference_positions == (3,)


@pytest.mark.parametrize(("budget", "num_targets"), [(1, 0), (8, 0), (9, 1), (10, 1), (11, 2)])
def test_stream_token_budget_ends_the_response_after_reading_the_reference_token(
    policy, ask, scene, budget, num_targets
):
    pieces, result = ask(policy, max_targets=5, max_new_tokens=budget)
    assert result.stop_reason is StopReason.TOKEN_BUDGET
    assert len(result.token_ids) == budget == len(pieces)
    assert len(result.concentrations) == num_targets
    if budget == 9:  # the ninth token is <REF_POS> itself
        states = uncached_states(policy, PolicyRequest(scene, "the red disc"), result.token_ids)
        assert relative_error(result.concentrations[0], states[-1].numpy()) < STATE_TOLERANCE


def test_stream_without_a_budget_takes_that_of_the_prompt_template(scripted, ask):
    policy = scripted(("<think>", " a", " b"), prompt_changes={"max_response_tokens": 2})
    _, result = ask(policy)
    assert result.stop_reason is StopReason.TOKEN_BUDGET
    assert len(result.token_ids) == 2


def test_stream_text_deltas_concatenate_to_the_response(policy, ask):
    pieces, result = ask(policy, max_targets=2)
    assert "".join(pieces) == result.response.text
    assert pieces[:2] == ["<think>", " this"]
    assert all(pieces)


CHARACTER = ("ä", "½", "ł")
"""Three tokens of one Chinese character in a byte-level vocabulary."""


def test_stream_character_of_several_tokens_is_one_delta(scripted, ask):
    policy = scripted(("<think>", *CHARACTER, "</think>", REFERENCE_TOKEN))
    pieces, result = ask(policy)
    assert pieces == ["<think>", "你", "</think>", REFERENCE_TOKEN]
    assert "".join(pieces) == result.response.text


def test_stream_text_deltas_concatenate_to_a_response_cut_inside_a_character(scripted, ask):
    policy = scripted(("<think>", *CHARACTER, "</think>", REFERENCE_TOKEN))
    pieces, result = ask(policy, max_new_tokens=3)
    assert "".join(pieces) == result.response.text


def test_stream_special_tokens_in_the_instruction_are_text(policy, ask):
    specials = "".join(policy.tokens.tokenizer.all_special_tokens) + REFERENCE_TOKEN + "</think>"
    _, plain = ask(policy, instruction="the disc")
    pieces, result = ask(policy, instruction=f"the {specials} disc")
    assert "".join(pieces) == plain.response.text
    assert len(result.concentrations) == 1
    # As special tokens each would take one position; as text it takes several.
    assert result.num_prompt_tokens > plain.num_prompt_tokens + 2 * len(specials.split("<"))


def test_stream_too_long_instruction_is_refused_and_the_next_request_succeeds(policy, ask):
    with pytest.raises(InstructionError, match=r"the limit is 1300: .* shorten the instruction"):
        ask(policy, instruction="disc " * 1500)
    assert ask(policy)[1].stop_reason is StopReason.TARGETS_REACHED


def test_stream_abandoned_request_does_not_block_the_next(policy, ask, scene):
    stream = policy.stream(PolicyRequest(scene, "the red disc"))
    next(stream)
    stream.close()
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(ask, policy).result(timeout=60)[1]
    assert result.stop_reason is StopReason.TARGETS_REACHED


def test_stream_failed_request_does_not_block_the_next(policy, ask):
    def fail(module, args):
        raise RuntimeError("out of memory")

    hook = policy._model.model.register_forward_pre_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="out of memory"):
            ask(policy)
    finally:
        hook.remove()
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(ask, policy).result(timeout=60)


def test_stream_abandoned_request_does_not_change_the_next_result(policy, ask, noise):
    _, expected = ask(policy)
    stream = policy.stream(PolicyRequest(noise, "another thing"))
    next(stream)
    stream.close()
    _, found = ask(policy)
    assert np.array_equal(found.concentrations, expected.concentrations)


def test_stream_interleaved_streams_are_independent(unscripted, scene, noise):
    policy, _, _ = unscripted
    requests = [
        PolicyRequest(scene, "the red disc", max_new_tokens=12),
        PolicyRequest(noise, "a blue square that stands left of it", max_new_tokens=12),
    ]
    alone = [list(policy.stream(request))[-1] for request in requests]
    streams = [policy.stream(request) for request in requests]
    last = {}
    while len(last) < len(streams):
        for number, stream in enumerate(streams):
            event = next(stream, None)
            if hasattr(event, "token_ids"):
                last[number] = event
    for number, expected in enumerate(alone):
        assert last[number].token_ids == expected.token_ids


def test_stream_unread_stream_blocks_no_other(policy, ask, noise):
    unread = policy.stream(PolicyRequest(noise, "another thing", max_targets=2))
    next(unread)
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(ask, policy).result(timeout=60)[1]
    assert found.stop_reason is StopReason.TARGETS_REACHED
    assert list(unread)[-1].stop_reason is StopReason.TARGETS_REACHED


def test_stream_time_limit_ends_the_wait_for_other_requests(policy, ask):
    with policy._lock.hold(), pytest.raises(RequestTimeoutError):
        ask(policy, deadline=time.perf_counter() + 0.05)
    assert ask(policy)[1].stop_reason is StopReason.TARGETS_REACHED


def test_stream_concurrent_threads_get_their_own_results(policy, ask, scene, noise):
    requests = [
        {"instruction": instruction, "image": image, "max_targets": max_targets}
        for instruction, max_targets in (("the red disc", 1), ("a blue square", 2))
        for image in (scene, noise)
    ]
    expected = [ask(policy, **request)[1] for request in requests]
    barrier = threading.Barrier(len(requests))

    def run(request):
        barrier.wait(timeout=60)
        return ask(policy, **request)[1]

    with ThreadPoolExecutor(len(requests)) as pool:
        found = list(pool.map(run, requests))
    for one, other in zip(found, expected, strict=True):
        assert one.token_ids == other.token_ids
        assert np.array_equal(one.concentrations, other.concentrations)


def test_stream_timings_and_token_counts_are_set(policy, ask):
    _, result = ask(policy)
    assert result.prefill_ms > 0
    assert result.decode_ms > 0
    _, longer = ask(policy, instruction="the red disc " * 20)
    assert longer.num_prompt_tokens > result.num_prompt_tokens


def test_description_names_library_family_device_and_dtype(policy):
    assert policy.description.startswith("transformers ")
    assert policy.description.endswith("on cpu, float32 (as stored)")
    assert policy.hidden_size == 64
    assert policy.concurrency == 1


def test_transformers_policy_dtype_is_applied(tiny_checkpoint, ask):
    checkpoint = read_checkpoint(tiny_checkpoint)
    with open_policy(checkpoint.policy_path, checkpoint.config.prompt, dtype="bfloat16") as policy:
        assert policy.description.endswith("on cpu, bfloat16 (as requested)")
        _, result = ask(policy)
    assert result.concentrations.dtype == np.float32
    assert result.response.text.endswith(REFERENCE_TOKEN)


@pytest.mark.parametrize("dtype", ["float33", "nn", ""])
def test_transformers_policy_unknown_dtype_is_refused(tiny_checkpoint, dtype):
    checkpoint = read_checkpoint(tiny_checkpoint)
    with pytest.raises(ValueError, match=r"accepted: float32, bfloat16, float16 or None"):
        open_policy(checkpoint.policy_path, checkpoint.config.prompt, dtype=dtype)


@pytest.fixture
def copied(tiny_checkpoint, tmp_path):
    """Writable copy of the tiny policy, and its prompt."""
    checkpoint = read_checkpoint(tiny_checkpoint)
    directory = tmp_path / "policy"
    shutil.copytree(checkpoint.policy_path, directory)
    return directory, checkpoint.config.prompt


def test_transformers_policy_directory_without_weights_is_refused(copied):
    directory, prompt = copied
    (directory / "model.safetensors").unlink()
    with pytest.raises(PolicyError, match=f"{directory} cannot be loaded as a policy"):
        open_policy(directory, prompt)


def test_transformers_policy_missing_directory_is_refused(copied):
    directory, prompt = copied
    with pytest.raises(PolicyError, match="cannot be loaded as a policy"):
        open_policy(directory / "absent", prompt)


def test_transformers_policy_truncated_weights_are_refused(copied):
    directory, prompt = copied
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(PolicyError, match="cannot be loaded as a policy"):
        open_policy(directory, prompt)


def test_transformers_policy_tokenizer_without_the_reference_token_is_refused(tmp_path):
    script = ("<think>", " a", "</think>")
    generated = build_random_policy("tiny", script=script, has_reference_token=False)
    generated.save(tmp_path)
    with pytest.raises(PolicyError, match=r"has no <REF_POS>; `coprs-deploy convert` adds it"):
        open_policy(tmp_path, generated.prompt)


def test_transformers_policy_missing_library_error_has_the_pip_line(copied, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingDependencyError, match=re.escape(install_hint("torch"))):
        open_policy(*copied)


def test_stream_stops_at_each_end_token_of_the_generation_config(tmp_path, ask):
    generated = build_random_policy("tiny", script=("<think>", " a", " b", " c"))
    stop = generated.tokenizer.convert_tokens_to_ids("Ġb")
    generated.model.generation_config.eos_token_id = [0, stop]
    generated.save(tmp_path)
    with open_policy(tmp_path, generated.prompt) as policy:
        pieces, result = ask(policy)
    assert pieces == ["<think>", " a"]
    assert result.stop_reason is StopReason.END_OF_TEXT


COMPILES = pytest.mark.filterwarnings("default::DeprecationWarning")
"""PyTorch's compiler uses parts of PyTorch that are deprecated."""


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.extended)])
def static_policy(request, unscripted, monkeypatch):
    """The unscripted policy with a KV cache of fixed size; compiled in the extended tests."""
    if not request.param:
        monkeypatch.setattr(static_decoding, "_compiled_step", lambda device: static_decoding._step)
    _, directory, prompt = unscripted
    with open_policy(directory, prompt, static_decoding=True) as opened:
        yield opened


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 40, "max_targets": 9},
        {"max_reasoning_tokens": 5},
        {"max_reasoning_tokens": 0, "max_targets": 3},
        {"max_new_tokens": 600},  # a longer cache
    ],
    ids=["targets", "limit", "no reasoning", "long"],
)
@pytest.mark.parametrize("lookup", [0, 4])
@COMPILES
def test_static_decoding_changes_no_token_and_no_state(
    unscripted, static_policy, ask, monkeypatch, options, lookup
):
    policy, _, _ = unscripted
    for each in (policy, static_policy):
        monkeypatch.setattr(each, "prompt_lookup_num_tokens", lookup)
    for instruction in ("the red disc", "the blue one"):  # the second one's cache has been used
        _, expected = ask(policy, instruction, **options)
        _, found = ask(static_policy, instruction, **options)
        assert found.token_ids == expected.token_ids
        assert found.stop_reason is expected.stop_reason
        assert found.concentrations.shape == expected.concentrations.shape
        if len(expected.concentrations):
            error = relative_error(found.concentrations, expected.concentrations)
            assert error < STATE_TOLERANCE


@COMPILES
def test_static_decoding_alternating_requests_have_caches_of_their_own(
    unscripted, static_policy, scene
):
    policy, _, _ = unscripted
    requests = [
        PolicyRequest(scene, instruction, max_new_tokens=30, max_targets=9)
        for instruction in ("the red disc", "the blue one")
    ]
    expected = [[*policy.stream(request)][-1] for request in requests]
    streams = zip_longest(*[static_policy.stream(request) for request in requests])
    found = [[e for e in events if e is not None][-1] for events in zip(*streams, strict=True)]
    assert [r.token_ids for r in found] == [r.token_ids for r in expected]
    assert expected[0].token_ids != expected[1].token_ids


def test_static_decoding_keeps_few_caches(static_policy):
    decoder = static_policy._static
    num_caches = static_decoding.MAX_IDLE_CACHES + 2
    with ExitStack() as stack:
        lent = [stack.enter_context(decoder.cache(10)) for _ in range(num_caches)]
        assert len({id(cache) for cache in lent}) == num_caches
    assert len(decoder._idle[static_decoding.MIN_CACHE_TOKENS]) == static_decoding.MAX_IDLE_CACHES


def test_static_decoding_closed_policy_frees_its_caches_and_refuses_requests(static_policy, ask):
    decoder = weakref.ref(static_policy._static)
    static_policy.close()
    assert decoder() is None
    with pytest.raises(PolicyError, match="the policy was closed"):
        ask(static_policy)


def test_static_decoding_without_a_compiler_says_how_to_get_one(unscripted):
    _, directory, prompt = unscripted
    with (
        inductor_config.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(RuntimeUnavailableError, match=re.escape("apt-get install g++")),
    ):
        open_policy(directory, prompt, static_decoding=True)
