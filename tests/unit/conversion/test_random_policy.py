"""Generated policies: their script, their tokenizer, and the sizes of the real ones."""

import pytest
import torch
from transformers import AutoModelForImageTextToText

from coprs_deploy.conversion.random_policy import (
    POLICY_SIZES,
    SCRIPT,
    build_config,
    build_tokenizer,
    build_random_policy,
)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava"])
def test_every_word_of_the_script_is_one_token(family):
    tokenizer = build_tokenizer(family)
    ids = tokenizer("".join(SCRIPT), add_special_tokens=False)["input_ids"]
    assert len(ids) == len(SCRIPT)
    assert tokenizer.decode(ids) == "".join(SCRIPT)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava"])
def test_any_text_survives_the_tokenizer(family):
    tokenizer = build_tokenizer(family)
    text = "Größe <x> \t 苹果 🍎\n"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_a_script_that_contradicts_itself_is_refused():
    with pytest.raises(ValueError, match=r"two followers"):
        build_random_policy("tiny", script=("<think>", " a", " b", " a", " c", "</think>"))


def test_a_policy_without_the_reference_token_does_not_know_it():
    script = ("<think>", " nothing", "</think>")
    policy = build_random_policy("tiny", script=script, has_reference_token=False)
    assert "<REF_POS>" not in policy.tokenizer.get_vocab()


def test_seeds_give_other_weights():
    first, again, other = (build_random_policy("tiny", seed=s).model.lm_head.weight for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("size", "billions"),
    # Qwen2.5-VL's model cards: 3.75 and 8.29 billion; LLaVA-1.5's: 7.06 and 13.35.
    [("3b", 3.755), ("7b", 8.292), ("llava-7b", 7.063), ("llava-13b", 13.351)],
)
def test_the_real_sizes_have_the_parameters_of_the_public_models(size, billions):
    described = POLICY_SIZES[size]
    config = build_config(described, build_tokenizer(described.family))
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    total = sum(p.numel() for p in model.parameters())
    assert total / 1e9 == pytest.approx(billions, rel=1e-3)  # the padding of the vocabulary
