"""The policy's graphs against transformers: tokens, hidden states, caches, several requests."""

import dataclasses
import json
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from coprs_deploy.checkpoint import PolicyImageLimits, read_checkpoint
from coprs_deploy.conversion import random_policy
from coprs_deploy.errors import PolicyError, RequestTimeoutError, RuntimeUnavailableError
from coprs_deploy.policy import PolicyRequest, StopReason
from coprs_deploy.policy.openvino_policy import policy as policy_module
from coprs_deploy.policy.openvino_policy.policy import OpenVinoPolicy
from coprs_deploy.policy.transformers_policy import TransformersPolicy

pytest.importorskip("openvino", reason="OpenVINO is not installed")
pytest.importorskip("nncf", reason="NNCF is not installed")

from coprs_deploy.export.policy.graphs import export_policy_graphs

pytestmark = pytest.mark.slow

STATE_TOLERANCE = 1e-5
"""Relative to the largest value: the same float32 sums in another order."""

GROUPED_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
VARIANTS = {
    # Windows of one image need at least two of 112 pixels; four heads share two keys.
    "qwen2_5_vl": ("tiny", GROUPED_HEADS | random_policy._rope(1e4, 2, 3, 3), 120_000),
    "llava": ("tiny-llava", GROUPED_HEADS, 12_544),
}


@pytest.fixture(
    scope="module",
    params=[
        "qwen2_5_vl",
        "llava",
        pytest.param("qwen2_5_vl-bfloat16", marks=pytest.mark.extended),
    ],
)
def pair(request, tmp_path_factory):
    """The same random policy in OpenVINO and in transformers; its text depends on the image."""
    family, _, dtype = request.param.partition("-")
    name, text, max_pixels = VARIANTS[family]
    size = random_policy.POLICY_SIZES[name]
    size = dataclasses.replace(
        size,
        text={**size.text, **text},
        image_limits=PolicyImageLimits(784, max_pixels),
        is_scripted=False,
        dtype=dtype or "float32",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(random_policy.POLICY_SIZES, "unscripted", size)
        made = random_policy.build_random_policy("unscripted", seed=8)
    for parameter_name, parameter in made.model.named_parameters():
        is_text = "language_model" in parameter_name or "lm_head" in parameter_name
        if parameter.ndim == 2 and is_text:
            parameter.mul_(6)  # the initial weights are so small that all states are similar
    directory = tmp_path_factory.mktemp("policy")
    made.save(directory / "weights")
    export_policy_graphs(directory / "weights", directory / "graphs", "fp32", lambda step: None)
    limits = (made.image_limits.min_pixels, made.image_limits.max_pixels)
    with (
        OpenVinoPolicy(directory / "graphs", made.prompt, *limits) as found,
        TransformersPolicy(
            directory / "weights", made.prompt, *limits, dtype="float32"
        ) as expected,
    ):
        yield found, expected


@pytest.fixture
def found(pair):
    return pair[0]


def noise(height, width, seed=0):
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (height, width, 3), dtype=np.uint8)


def ask(policy, request):
    *deltas, result = policy.stream(request)
    return "".join(delta.text for delta in deltas), result


def relative_error(found, expected):
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("size", [(64, 48), (200, 330), (300, 90)])
def test_hidden_states_and_tokens_equal_those_of_transformers(pair, size):
    request = PolicyRequest(noise(*size), "the cup")
    fed = [5, 9, 300, 17, 80]
    with pair[0].start(request) as found, pair[1].start(request) as expected:
        assert found.prompt_ids == expected.prompt_ids
        assert found.prefill()[0] == expected.prefill()[0]
        for token in fed:
            (next_found, state), (next_expected, wanted) = (
                policy.feed([token]) for policy in (found, expected)
            )
            assert next_found == next_expected
            assert relative_error(state, wanted) < STATE_TOLERANCE


def test_stream_returns_the_text_and_tokens_of_transformers(pair):
    request = PolicyRequest(noise(90, 120), "the left one", max_new_tokens=12)
    (text, found), (expected_text, expected) = (ask(policy, request) for policy in pair)
    assert text == expected_text
    assert found.token_ids == expected.token_ids
    assert found.response == expected.response
    assert found.stop_reason is expected.stop_reason is StopReason.TOKEN_BUDGET
    assert found.num_prompt_tokens == expected.num_prompt_tokens
    assert found.prefill_ms > 0
    assert found.decode_ms > 0


def test_a_second_question_reads_only_what_is_new_and_gets_the_same_answer(pair):
    found, expected = pair
    image = noise(120, 100, seed=3)
    first = ask(found, PolicyRequest(image, "the large cup", max_new_tokens=8))[1]
    second_request = PolicyRequest(image, "the small cup", max_new_tokens=8)
    second = ask(found, second_request)[1]
    assert first.num_cached_tokens == 0
    assert 0 < second.num_cached_tokens < second.num_prompt_tokens
    assert second.token_ids == ask(expected, second_request)[1].token_ids
    repeated = ask(found, second_request)[1]
    assert repeated.num_cached_tokens == repeated.num_prompt_tokens - 1
    assert repeated.token_ids == second.token_ids


def test_float32_graphs_round_neither_inputs_nor_the_cache(found):
    compiled = found._decoder._compiled
    assert compiled.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE") == 0
    assert compiled.get_property("KV_CACHE_PRECISION").get_type_name() == "f32"
    assert compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name() == "f32"


def test_only_the_most_recent_images_are_kept(found):
    images = [noise(60, 60, seed) for seed in range(policy_module.MAX_CACHED_PROMPTS + 1)]
    for image in images:
        ask(found, PolicyRequest(image, "the cup", max_new_tokens=1))
    again = [
        ask(found, PolicyRequest(image, "the cup", max_new_tokens=1))[1].num_cached_tokens
        for image in (images[-1], images[0])
    ]
    assert again[0] > 0
    assert again[1] == 0


def test_requests_in_turn_do_not_mix_their_caches(pair):
    found, expected = pair
    requests = [
        PolicyRequest(noise(64, 64 + 40 * i, seed=i), "the cup", max_new_tokens=6) for i in range(3)
    ]
    with (
        found.start(requests[0]) as a,
        found.start(requests[1]) as b,
        found.start(requests[2]) as c,
    ):
        tokens = [[running.prefill()[0]] for running in (a, b, c)]
        for _ in range(5):
            for written, running in zip(tokens, (a, b, c), strict=True):
                written.extend(running.feed(written[-1:])[0])
    for written, request in zip(tokens, requests, strict=True):
        assert tuple(written) == ask(expected, request)[1].token_ids


def test_an_abandoned_stream_leaves_the_policy_usable(found):
    request = PolicyRequest(noise(64, 64, seed=9), "the cup", max_new_tokens=8)
    wanted = ask(found, request)[1].token_ids
    stream = found.stream(request)
    next(stream)
    stream.close()
    assert ask(found, request)[1].token_ids == wanted


def test_a_request_past_its_deadline_is_abandoned(found):
    with pytest.raises(RequestTimeoutError):
        ask(found, PolicyRequest(noise(64, 64), "the cup", deadline=0.0))


@pytest.fixture(scope="module")
def graphs(tiny_checkpoint, tmp_path_factory):
    path = tmp_path_factory.mktemp("scripted") / "graphs"
    export_policy_graphs(tiny_checkpoint / "policy", path, "int8", lambda step: None)
    return path


class TestScripted:
    """The tiny scripted policy, whose text is known."""

    @pytest.fixture
    def policy(self, graphs, tiny_checkpoint):
        config = read_checkpoint(tiny_checkpoint).config
        limits = config.policy_image
        with OpenVinoPolicy(graphs, config.prompt, limits.min_pixels, limits.max_pixels) as opened:
            yield opened

    def test_two_targets_give_two_different_concentrations(self, policy):
        text, result = ask(policy, PolicyRequest(noise(64, 64), "the cups", max_targets=2))
        assert text.startswith("<think> this generated policy follows a script</think><REF_POS>")
        assert result.stop_reason is StopReason.TARGETS_REACHED
        assert result.concentrations.shape == (2, policy.hidden_size)
        assert result.concentrations.dtype == np.float32
        assert relative_error(*result.concentrations) > 1e-3

    def test_after_close_a_request_is_refused_and_close_may_be_repeated(self, policy):
        policy.close()
        with pytest.raises(PolicyError, match="was closed"):
            ask(policy, PolicyRequest(noise(64, 64), "the cup"))
        policy.close()

    def test_another_device_and_a_dtype_are_refused(self, graphs, policy):
        source = (graphs, policy._prompt, 784, 12_544)
        with pytest.raises(RuntimeUnavailableError, match=r"'cuda'.*--policy-device cpu"):
            OpenVinoPolicy(*source, device="cuda")
        with pytest.raises(ValueError, match=r"policy_dtype is 'bfloat16'.*--policy-precision"):
            OpenVinoPolicy(*source, dtype="bfloat16")

    @pytest.mark.parametrize("name", ["policy_graphs.json", "tokenizer.json", "decoder.xml"])
    def test_a_damaged_file_is_a_policy_error(self, graphs, policy, tmp_path, name):
        directory = tmp_path / "graphs"
        directory.mkdir()
        for file in graphs.iterdir():
            (directory / file.name).write_bytes(file.read_bytes())
        (directory / name).write_text("{")
        with pytest.raises(PolicyError, match="graphs"):
            OpenVinoPolicy(directory, policy._prompt, 784, 12_544)

    def test_it_runs_where_torch_and_transformers_cannot_be_imported(self, graphs, policy):
        program = textwrap.dedent(
            """
            import sys
            sys.modules["torch"] = sys.modules["transformers"] = None
            import json
            import numpy as np
            from pathlib import Path
            from coprs_deploy.policy import PolicyRequest
            from coprs_deploy.policy.openvino_policy.policy import OpenVinoPolicy
            from coprs_deploy.prompts import PromptTemplate
            prompt = PromptTemplate.from_json(json.loads(sys.argv[2]))
            with OpenVinoPolicy(Path(sys.argv[1]), prompt, 784, 12_544) as policy:
                *_, result = policy.stream(PolicyRequest(np.zeros((64, 64, 3), np.uint8), "it"))
            print(result.response.text)
            """
        )
        arguments = [str(graphs), json.dumps(policy._prompt.to_json())]
        run = subprocess.run(
            [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, run.stderr
        assert "this generated policy follows a script" in run.stdout
