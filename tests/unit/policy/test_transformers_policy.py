"""Greedy decoding in transformers: the right tokens and hidden states, one pass, one lock."""

import dataclasses
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer

from coprs_deploy.checkpoint import read_checkpoint
from coprs_deploy.conversion.random_policy import POLICY_SIZES, build_random_policy
from coprs_deploy.errors import InstructionError, MissingDependencyError, PolicyError
from coprs_deploy.images import fit_pixel_count
from coprs_deploy.policy import PolicyRequest, StopReason
from coprs_deploy.policy.transformers_policy import TransformersPolicy
from coprs_deploy.policy.vision_inputs import VisionProcessor
from coprs_deploy.prompts import REFERENCE_TOKEN, encode_prompt

STATE_TOLERANCE = 1e-5
"""Of the largest value: a cached step takes the same float32 sums in another order."""

LIMITS = POLICY_SIZES["tiny"].image_limits


def open_policy(directory, prompt, **options):
    return TransformersPolicy(
        directory, prompt, min_pixels=LIMITS.min_pixels, max_pixels=LIMITS.max_pixels, **options
    )


@pytest.fixture(scope="module", params=["tiny_checkpoint", "tiny_llava_checkpoint"])
def policy(request):
    """The scripted policy of a tiny checkpoint, once for each family."""
    checkpoint = read_checkpoint(request.getfixturevalue(request.param))
    with open_policy(checkpoint.policy_path, checkpoint.config.prompt) as opened:
        yield opened


@pytest.fixture
def scripted(tmp_path):
    """Open a policy that answers with a script of one's own."""
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
    """A policy without a script: what it writes depends on all that it reads."""
    directory = tmp_path_factory.mktemp("unscripted")
    with pytest.MonkeyPatch.context() as patch:
        size = dataclasses.replace(POLICY_SIZES[request.param], is_scripted=False)
        patch.setitem(POLICY_SIZES, "unscripted", size)
        generated = build_random_policy("unscripted", seed=8)
    for name, parameter in generated.model.named_parameters():
        if parameter.ndim == 2 and ("language_model" in name or "lm_head" in name):
            parameter.mul_(6)  # the initial weights are so small that every state looks alike
    generated.save(directory)
    with open_policy(directory, generated.prompt) as opened:
        yield opened, directory, generated.prompt


@pytest.fixture
def ask(scene):
    """Run a policy to its end: the words and the result."""

    def asker(policy, instruction="the red disc", rgb=None, **options):
        picture = scene if rgb is None else rgb
        *words, result = policy.stream(PolicyRequest(picture, instruction, **options))
        return [piece.text for piece in words], result

    return asker


@pytest.fixture
def noise():
    """Another picture, of another shape."""
    return np.random.default_rng(0).integers(0, 256, (64, 48, 3), dtype=np.uint8)


def reference_positions(policy, result):
    token = policy._tokens.tokenizer.convert_tokens_to_ids(REFERENCE_TOKEN)
    return [i for i, t in enumerate(result.token_ids) if t == token]


def relative_error(found, expected):
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("targets", [1, 3])
@pytest.mark.parametrize("picture", ["scene", "noise"])
def test_each_concentration_is_the_uncached_state_at_its_reference_token(
    policy, ask, request, picture, targets
):
    rgb = request.getfixturevalue(picture)
    _, result = ask(policy, rgb=rgb, targets=targets)
    question = PolicyRequest(rgb, "the red disc", targets)
    states = policy.hidden_states(question, result.token_ids).numpy()
    positions = reference_positions(policy, result)
    assert states.shape == (len(result.token_ids), policy.hidden_size)
    assert result.concentrations.dtype == np.float32
    assert result.concentrations.shape == (targets, policy.hidden_size)
    assert positions == list(result.response.reference_positions)
    for concentration, position in zip(result.concentrations, positions, strict=True):
        assert relative_error(concentration, states[position]) < STATE_TOLERANCE
        # One step early, or the row of a neighbor, would be seen.
        others = [i for i in range(len(states)) if i != position]
        assert min(relative_error(concentration, states[i]) for i in others) > 0.01


def test_the_states_are_those_after_the_final_norm(policy, ask, scene):
    _, result = ask(policy)
    question = PolicyRequest(scene, "the red disc")
    states = policy.hidden_states(question, result.token_ids)
    # The norm's weights are one, so the mean square of every state is one.
    means = states.square().mean(dim=-1)
    torch.testing.assert_close(means, torch.ones_like(means), rtol=1e-3, atol=0)  # its epsilon


@pytest.mark.parametrize("change", ["picture", "instruction"])
def test_concentrations_depend_on_picture_and_instruction(policy, ask, noise, change):
    _, first = ask(policy)
    changes = {"rgb": noise} if change == "picture" else {"instruction": "the blue square"}
    _, second = ask(policy, **changes)
    assert second.token_ids == first.token_ids
    assert relative_error(second.concentrations, first.concentrations) > 100 * STATE_TOLERANCE


def test_tokens_are_those_of_transformers_own_greedy_decoding(unscripted, ask, scene):
    policy, directory, prompt = unscripted
    _, result = ask(policy, max_new_tokens=24, targets=9)

    model = AutoModelForImageTextToText.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    picture = fit_pixel_count(scene, LIMITS.min_pixels, LIMITS.max_pixels)
    vision = VisionProcessor(directory, model.config)(picture)
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
    assert len(set(expected)) > 4  # it does not merely repeat itself


def test_an_unscripted_policy_answers_each_question_in_its_own_words(unscripted, ask, noise):
    policy, _, _ = unscripted
    answers = {
        ask(policy, instruction=instruction, max_new_tokens=12, **options)[1].token_ids
        for instruction in ("the red disc", "everything that is blue")
        for options in ({}, {"rgb": noise})
    }
    assert len(answers) == 4


@pytest.mark.parametrize("targets", [1, 2])
def test_the_prompt_is_read_once_and_each_token_is_fed_once(policy, ask, targets):
    lengths = []

    def record(module, args, kwargs):
        lengths.append(kwargs["input_ids"].shape[1])

    hook = policy._model.model.register_forward_pre_hook(record, with_kwargs=True)
    try:
        _, result = ask(policy, targets=targets)
    finally:
        hook.remove()
    assert lengths == [result.num_prompt_tokens] + [1] * len(result.token_ids)


def test_it_stops_at_the_target_that_was_asked_for(policy, ask):
    for targets in (1, 2, 4):
        words, result = ask(policy, targets=targets)
        assert result.stop_reason is StopReason.TARGETS_REACHED
        assert len(result.concentrations) == targets
        assert result.response.text.count(REFERENCE_TOKEN) == targets
        assert result.response.text.endswith(REFERENCE_TOKEN)
        assert words[-1] == REFERENCE_TOKEN


def test_it_stops_where_the_policy_ends_its_answer(scripted, ask):
    policy = scripted(("<think>", " no", " such", " thing", "</think>", "<|im_end|>"))
    words, result = ask(policy)
    assert result.stop_reason is StopReason.END_OF_TEXT
    assert result.concentrations.shape == (0, policy.hidden_size)
    assert result.concentrations.dtype == np.float32
    assert result.response.text == "<think> no such thing</think>" == "".join(words)
    assert result.response.reasoning == "no such thing"


def test_an_answer_that_ends_early_keeps_the_targets_before(scripted, ask):
    policy = scripted(("<think>", " one", "</think>", REFERENCE_TOKEN, "<|im_end|>"))
    _, result = ask(policy, targets=3)
    assert result.stop_reason is StopReason.END_OF_TEXT
    assert len(result.concentrations) == 1
    assert result.response.reference_positions == (3,)


@pytest.mark.parametrize(("budget", "found"), [(1, 0), (8, 0), (9, 1), (10, 1), (11, 2)])
def test_the_budget_ends_an_answer_and_never_leaves_a_reference_token_unread(
    policy, ask, scene, budget, found
):
    words, result = ask(policy, targets=5, max_new_tokens=budget)
    assert result.stop_reason is StopReason.TOKEN_BUDGET
    assert len(result.token_ids) == budget == len(words)
    assert len(result.concentrations) == found
    if budget == 9:  # the ninth token is <REF_POS> itself
        states = policy.hidden_states(PolicyRequest(scene, "the red disc"), result.token_ids)
        assert relative_error(result.concentrations[0], states[-1].numpy()) < STATE_TOLERANCE


def test_the_budget_of_the_prompt_template_holds_where_none_is_given(scripted, ask):
    policy = scripted(("<think>", " a", " b"), prompt_changes={"max_response_tokens": 2})
    _, result = ask(policy)
    assert result.stop_reason is StopReason.TOKEN_BUDGET
    assert len(result.token_ids) == 2


def test_the_words_together_are_the_response(policy, ask):
    words, result = ask(policy, targets=2)
    assert "".join(words) == result.response.text
    assert words[:2] == ["<think>", " this"]
    assert all(words)


LETTER = ("ä", "½", "ł")
"""The three bytes of one Chinese character as a byte-level vocabulary spells them."""


def test_a_letter_of_several_tokens_is_given_whole(scripted, ask):
    policy = scripted(("<think>", *LETTER, "</think>", REFERENCE_TOKEN))
    words, result = ask(policy)
    assert words == ["<think>", "你", "</think>", REFERENCE_TOKEN]
    assert "".join(words) == result.response.text


def test_words_are_the_response_even_where_the_budget_cuts_a_letter(scripted, ask):
    policy = scripted(("<think>", *LETTER, "</think>", REFERENCE_TOKEN))
    words, result = ask(policy, max_new_tokens=3)
    assert "".join(words) == result.response.text


def test_special_tokens_in_an_instruction_are_only_text(policy, ask):
    specials = "".join(policy._tokens.tokenizer.all_special_tokens) + REFERENCE_TOKEN + "</think>"
    _, plain = ask(policy, instruction="the disc")
    words, result = ask(policy, instruction=f"the {specials} disc")
    assert "".join(words) == plain.response.text
    assert len(result.concentrations) == 1
    # Were they read as tokens, each would take one place; as text they take several.
    assert result.num_prompt_tokens > plain.num_prompt_tokens + 2 * len(specials.split("<"))


def test_an_instruction_that_is_too_long_is_refused_and_the_next_one_answered(policy, ask):
    with pytest.raises(InstructionError, match=r"the limit is 1300 .* shorten the instruction"):
        ask(policy, instruction="disc " * 1500)
    assert ask(policy)[1].stop_reason is StopReason.TARGETS_REACHED


def test_an_abandoned_request_lets_the_next_one_in(policy, ask, scene):
    stream = policy.stream(PolicyRequest(scene, "the red disc"))
    next(stream)
    stream.close()
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(ask, policy).result(timeout=60)[1]
    assert result.stop_reason is StopReason.TARGETS_REACHED


def test_a_request_that_fails_midway_lets_the_next_one_in(policy, ask):
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


def test_an_abandoned_request_does_not_change_the_next_answer(policy, ask, noise):
    _, expected = ask(policy)
    stream = policy.stream(PolicyRequest(noise, "another thing"))
    next(stream)
    stream.close()
    _, found = ask(policy)
    assert np.array_equal(found.concentrations, expected.concentrations)


def test_streams_that_are_read_in_turns_do_not_touch_each_other(unscripted, scene, noise):
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


def test_an_unread_stream_holds_up_no_other(policy, ask, noise):
    unread = policy.stream(PolicyRequest(noise, "another thing", targets=2))
    next(unread)
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(ask, policy).result(timeout=60)[1]
    assert found.stop_reason is StopReason.TARGETS_REACHED
    assert list(unread)[-1].stop_reason is StopReason.TARGETS_REACHED


def test_threads_that_ask_at_once_each_get_their_own_answer(policy, ask, scene, noise):
    questions = [
        {"instruction": instruction, "rgb": rgb, "targets": targets}
        for instruction, targets in (("the red disc", 1), ("a blue square", 2))
        for rgb in (scene, noise)
    ]
    expected = [ask(policy, **question)[1] for question in questions]
    barrier = threading.Barrier(len(questions))

    def answer(question):
        barrier.wait(timeout=60)
        return ask(policy, **question)[1]

    with ThreadPoolExecutor(len(questions)) as pool:
        found = list(pool.map(answer, questions))
    for one, other in zip(found, expected, strict=True):
        assert one.token_ids == other.token_ids
        assert np.array_equal(one.concentrations, other.concentrations)


def test_timings_and_counts_are_of_this_request(policy, ask):
    _, result = ask(policy)
    assert result.prefill_ms > 0
    assert result.decode_ms > 0
    _, longer = ask(policy, instruction="the red disc " * 20)
    assert longer.num_prompt_tokens > result.num_prompt_tokens


def test_the_description_names_library_family_device_and_dtype(policy):
    assert policy.description.startswith("transformers ")
    assert policy.description.endswith("on cpu, torch.float32")
    assert policy.hidden_size == 64
    assert policy.concurrency == 1


def test_another_dtype_is_used_when_asked_for(tiny_checkpoint, ask):
    checkpoint = read_checkpoint(tiny_checkpoint)
    with open_policy(checkpoint.policy_path, checkpoint.config.prompt, dtype="bfloat16") as policy:
        assert policy.description.endswith("torch.bfloat16")
        _, result = ask(policy)
    assert result.concentrations.dtype == np.float32
    assert result.response.text.endswith(REFERENCE_TOKEN)


@pytest.mark.parametrize("dtype", ["float33", "nn", ""])
def test_an_unknown_dtype_is_refused_with_the_accepted_ones(tiny_checkpoint, dtype):
    checkpoint = read_checkpoint(tiny_checkpoint)
    with pytest.raises(ValueError, match=r"accepted: float32, bfloat16, float16 or None"):
        open_policy(checkpoint.policy_path, checkpoint.config.prompt, dtype=dtype)


@pytest.fixture
def copied(tiny_checkpoint, tmp_path):
    """A copy of the tiny policy that may be broken, and its prompt."""
    checkpoint = read_checkpoint(tiny_checkpoint)
    directory = tmp_path / "policy"
    shutil.copytree(checkpoint.policy_path, directory)
    return directory, checkpoint.config.prompt


def test_a_directory_without_a_model_is_refused(copied):
    directory, prompt = copied
    (directory / "model.safetensors").unlink()
    with pytest.raises(PolicyError, match=f"{directory} cannot be loaded as a policy"):
        open_policy(directory, prompt)


def test_a_directory_that_does_not_exist_is_refused(copied):
    directory, prompt = copied
    with pytest.raises(PolicyError, match="cannot be loaded as a policy"):
        open_policy(directory / "absent", prompt)


def test_weights_that_were_cut_short_are_refused(copied):
    directory, prompt = copied
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(PolicyError, match="cannot be loaded as a policy"):
        open_policy(directory, prompt)


def test_a_tokenizer_without_the_reference_token_is_refused(tmp_path):
    script = ("<think>", " a", "</think>")
    generated = build_random_policy("tiny", script=script, has_reference_token=False)
    generated.save(tmp_path)
    with pytest.raises(PolicyError, match=r"has no <REF_POS>; `coprs-deploy convert` adds it"):
        open_policy(tmp_path, generated.prompt)


def test_a_missing_library_is_named_with_its_pip_line(copied, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingDependencyError, match="pip install torch transformers"):
        open_policy(*copied)


def test_every_end_token_of_the_generation_config_ends_an_answer(tmp_path, ask):
    generated = build_random_policy("tiny", script=("<think>", " a", " b", " c"))
    stop = generated.tokenizer.convert_tokens_to_ids("Ġb")
    generated.model.generation_config.eos_token_id = [0, stop]
    generated.save(tmp_path)
    with open_policy(tmp_path, generated.prompt) as policy:
        words, result = ask(policy)
    assert words == ["<think>", " a"]
    assert result.stop_reason is StopReason.END_OF_TEXT
