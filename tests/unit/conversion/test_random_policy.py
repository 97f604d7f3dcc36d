"""Random policies: script, tokenizer, and parameter counts of the real sizes."""

import dataclasses

import pytest
import torch
from transformers import AutoModelForImageTextToText

from coprs_deploy.conversion import random_policy
from coprs_deploy.conversion.random_policy import (
    POLICY_SIZES,
    SCRIPT,
    build_config,
    build_random_policy,
    build_tokenizer,
)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava"])
def test_tokenizer_script_words_are_single_tokens(family):
    tokenizer = build_tokenizer(family)
    ids = tokenizer("".join(SCRIPT), add_special_tokens=False)["input_ids"]
    assert len(ids) == len(SCRIPT)
    assert tokenizer.decode(ids) == "".join(SCRIPT)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava"])
def test_tokenizer_round_trips_any_text(family):
    tokenizer = build_tokenizer(family)
    text = "Größe <x> \t 苹果 🍎\n"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_random_policy_contradictory_script_is_refused():
    with pytest.raises(ValueError, match=r"two successors"):
        build_random_policy("tiny", script=("<think>", " a", " b", " a", " c", "</think>"))


def test_random_policy_without_reference_token_has_none():
    script = ("<think>", " nothing", "</think>")
    policy = build_random_policy("tiny", script=script, has_reference_token=False)
    assert "<REF_POS>" not in policy.tokenizer.get_vocab()


def test_random_policy_seeds_give_other_weights():
    first, again, other = (
        build_random_policy("tiny", seed=s).model.lm_head.weight for s in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("size", "billions"),
    # Qwen2.5-VL's model cards: 3.75 and 8.29 billion; LLaVA-1.5's: 7.06 and 13.35.
    [("3b", 3.755), ("7b", 8.292), ("llava-7b", 7.063), ("llava-13b", 13.351)],
)
def test_random_policy_real_sizes_equal_public_parameter_counts(size, billions):
    described = POLICY_SIZES[size]
    config = build_config(described, build_tokenizer(described.family))
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    total = sum(p.numel() for p in model.parameters())
    assert total / 1e9 == pytest.approx(billions, rel=1e-3)  # the padding of the vocabulary


@pytest.mark.parametrize("family", ["tiny", "tiny-llava"])
def test_large_random_policy_is_saved_file_by_file(family, tmp_path, monkeypatch):
    size = dataclasses.replace(
        POLICY_SIZES[family],
        is_scripted=False,
        dtype="bfloat16",
        tie_word_embeddings=family == "tiny",
    )
    monkeypatch.setitem(POLICY_SIZES, "large", size)
    monkeypatch.setattr(random_policy, "LARGE_POLICY", 0)
    monkeypatch.setattr(random_policy, "SHARD_BYTES", 100_000)
    loaded = {}
    for name, seed in (("first", 3), ("again", 3), ("other", 4)):
        policy = build_random_policy("large", seed=seed)
        assert policy.model.device.type == "meta"
        policy.save(tmp_path / name)
        model, report = AutoModelForImageTextToText.from_pretrained(
            tmp_path / name, output_loading_info=True
        )
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        loaded[name] = model
    assert len(list((tmp_path / "first").glob("model-*.safetensors"))) > 3
    first, again, other = (loaded[name].state_dict() for name in ("first", "again", "other"))
    assert {tensor.dtype for tensor in first.values()} == {torch.bfloat16}
    assert all(torch.equal(first[name], again[name]) for name in first)
    head = "lm_head.weight"
    assert not torch.equal(first[head], other[head])
    assert first[head].float().std() == pytest.approx(0.02, rel=0.05)
    norm = "model.language_model.norm.weight"
    assert torch.equal(first[norm], torch.ones_like(first[norm]))
