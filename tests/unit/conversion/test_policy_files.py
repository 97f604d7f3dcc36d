"""Policy directories: loading, adding the token <REF_POS>, saving."""

import dataclasses
import json
import logging
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoTokenizer

from coprs_deploy.conversion.policy_files import (
    copy_policy_files,
    has_weights,
    load_policy,
    register_reference_token,
    save_policy,
)
from coprs_deploy.conversion.random_policy import POLICY_SIZES, build_random_policy
from coprs_deploy.errors import ConversionError
from coprs_deploy.prompts import REFERENCE_TOKEN

SCRIPT = ("<think>", " untuned", "</think>")


def untuned(family_size, monkeypatch, has_spare_rows, is_tied=False):
    """Build a policy without <REF_POS>, with or without a spare embedding row."""
    size = POLICY_SIZES[family_size]
    probe = build_random_policy(family_size, script=SCRIPT, has_reference_token=False)
    vocabulary = 512 if has_spare_rows else len(probe.tokenizer)
    changed = dataclasses.replace(
        size, text={**size.text, "vocab_size": vocabulary}, tie_word_embeddings=is_tied
    )
    monkeypatch.setitem(POLICY_SIZES, "changed", changed)
    policy = build_random_policy("changed", script=SCRIPT, has_reference_token=False)
    return policy.model, policy.tokenizer, policy


def tables(model):
    return [t.weight for t in (model.get_input_embeddings(), model.get_output_embeddings())]


@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("has_spare_rows", [True, False], ids=["spare", "full"])
@pytest.mark.parametrize("family_size", ["tiny", "tiny-llava"])
def test_register_token_adds_row_with_mean_of_others(
    monkeypatch, family_size, has_spare_rows, is_tied
):
    model, tokenizer, _ = untuned(family_size, monkeypatch, has_spare_rows, is_tied)
    before = [table.clone() for table in tables(model)]
    in_use = len(tokenizer)

    assert register_reference_token(model, tokenizer)

    token = tokenizer.convert_tokens_to_ids(REFERENCE_TOKEN)
    assert token == in_use
    for old, new in zip(before, tables(model), strict=True):
        assert len(new) == (len(old) if has_spare_rows else len(old) + 1)
        torch.testing.assert_close(new[token], old[:in_use].mean(dim=0))
        others = [row for row in range(len(old)) if row != token]
        assert torch.equal(new[others], old[others])
    assert (tables(model)[0] is tables(model)[1]) == is_tied
    assert model.config.get_text_config().vocab_size == len(tables(model)[0])


def test_register_token_is_one_special_token(monkeypatch):
    model, tokenizer, _ = untuned("tiny", monkeypatch, has_spare_rows=True)
    text = f"a {REFERENCE_TOKEN}b"
    assert len(tokenizer(REFERENCE_TOKEN, add_special_tokens=False)["input_ids"]) > 1
    register_reference_token(model, tokenizer)
    token = tokenizer.convert_tokens_to_ids(REFERENCE_TOKEN)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids.count(token) == 1
    assert tokenizer.added_tokens_decoder[token].special
    assert tokenizer.decode(ids) == text
    assert REFERENCE_TOKEN not in tokenizer.decode(ids, skip_special_tokens=True)


def test_register_token_twice_changes_nothing(monkeypatch):
    model, tokenizer, _ = untuned("tiny", monkeypatch, has_spare_rows=False)
    register_reference_token(model, tokenizer)
    before = [table.clone() for table in tables(model)]
    assert not register_reference_token(model, tokenizer)
    assert all(torch.equal(a, b) for a, b in zip(before, tables(model), strict=True))


@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family_size", ["tiny", "tiny-llava"])
def test_save_policy_loads_back_equal(monkeypatch, tmp_path, family_size, is_tied):
    model, tokenizer, policy = untuned(family_size, monkeypatch, False, is_tied)
    source, out = tmp_path / "source", tmp_path / "out"
    policy.save(source)
    (source / "chat_template.jinja").write_text("mine", encoding="utf-8")
    out.mkdir()
    register_reference_token(model, tokenizer)

    save_policy(model, tokenizer, source, out)

    loaded, loaded_tokenizer = load_policy(out)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert REFERENCE_TOKEN in loaded_tokenizer.get_vocab()
    assert (out / "chat_template.jinja").read_text(encoding="utf-8") == "mine"
    assert (out / "preprocessor_config.json").is_file()


def test_load_policy_keeps_stored_dtype(untuned_policy, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(untuned_policy, dtype="bfloat16")
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(untuned_policy).save_pretrained(tmp_path)
    assert load_policy(tmp_path)[0].dtype == torch.bfloat16
    assert load_policy(untuned_policy)[0].dtype == torch.float32


def test_load_policy_without_config_is_refused(tmp_path):
    with pytest.raises(ConversionError, match=r"not a transformers directory: it has no config"):
        load_policy(tmp_path)


def test_load_policy_other_type_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ConversionError, match=r"type 'llama'; accepted: qwen2_5_vl, llava"):
        load_policy(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"model_type": "nonsense"}', "{}"])
def test_load_policy_invalid_config_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConversionError):
        load_policy(tmp_path)


MISFITS = {
    "missing": ({"lm_head.weight": None}, r"missing keys \['lm_head.weight'\]"),
    "unexpected": ({"stranger.weight": torch.zeros(2)}, r"unexpected keys \['stranger.weight'\]"),
    "misshaped": ({"lm_head.weight": torch.zeros(5, 64)}, r"mismatched keys .*lm_head.weight"),
}


@pytest.mark.parametrize(
    ("misfit", "is_in_directory"),
    [
        ("missing", True),
        ("unexpected", True),
        ("misshaped", True),
        *((misfit, False) for misfit in MISFITS),
    ],
)
def test_load_policy_wrong_weights_are_named(untuned_policy, tmp_path, misfit, is_in_directory):
    change, message = MISFITS[misfit]
    weights = {**load_file(untuned_policy / "model.safetensors"), **change}
    weights = {name: tensor for name, tensor in weights.items() if tensor is not None}
    directory = tmp_path / "policy"
    shutil.copytree(untuned_policy, directory)
    if is_in_directory:
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConversionError, match=message):
        load_policy(directory, None if is_in_directory else weights)


@pytest.mark.parametrize("is_in_directory", [True, False])
def test_load_policy_values_that_are_not_finite_are_named(
    untuned_policy, tmp_path, is_in_directory
):
    weights = load_file(untuned_policy / "model.safetensors")
    weights["lm_head.weight"][3, 5] = torch.nan
    directory = tmp_path / "policy"
    shutil.copytree(untuned_policy, directory)
    if is_in_directory:
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConversionError, match=r"not finite .*: 1 of the .* of lm_head\.weight"):
        load_policy(directory, None if is_in_directory else weights)


def test_load_policy_wrong_weights_print_no_report_of_the_library(untuned_policy, tmp_path):
    weights = load_file(untuned_policy / "model.safetensors")
    strangers = {f"layers.{number}.lora_A.weight": torch.zeros(2) for number in range(50)}
    directory = tmp_path / "policy"
    shutil.copytree(untuned_policy, directory)
    save_file({**weights, **strangers}, directory / "model.safetensors", metadata={"format": "pt"})
    logger, printed = logging.getLogger("transformers"), []
    handler = logging.Handler()
    handler.emit = lambda record: printed.append(record.getMessage())
    logger.addHandler(handler)
    try:
        with pytest.raises(ConversionError) as caught:
            load_policy(directory)
        assert printed == []
        AutoModelForImageTextToText.from_pretrained(directory)
        assert "lora_A" in "".join(printed)  # what the library prints by itself
    finally:
        logger.removeHandler(handler)
    assert "unexpected keys ['layers.0.lora_A.weight'" in str(caught.value)
    assert str(caught.value).endswith("merge the LoRA adapter with peft's merge_and_unload()")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's call
def test_load_policy_adapter_is_refused_with_the_line_that_merges_it(untuned_policy, tmp_path):
    model, _ = load_policy(untuned_policy)
    config = LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
    adapted = get_peft_model(model, config)
    adapted.peft_config["default"].base_model_name_or_path = str(untuned_policy)
    adapter = tmp_path / "adapter"
    adapted.save_pretrained(adapter)
    with pytest.raises(ConversionError, match=r"LoRA adapter of .*, not a whole model") as caught:
        load_policy(adapter)

    line = str(caught.value).split("`")[1]
    exec(line, {})

    merged = load_policy(tmp_path / "adapter-merged")[0].state_dict()
    expected = adapted.merge_and_unload().state_dict()
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], tensor) for name, tensor in expected.items())
    assert (tmp_path / "adapter-merged" / "preprocessor_config.json").is_file()


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_load_policy_adapter_without_base_is_refused(tmp_path, content):
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(ConversionError, match="contains a LoRA adapter of BASE, not a whole model"):
        load_policy(tmp_path)


def test_load_policy_without_weights_is_refused(untuned_policy, tmp_path):
    copy_policy_files(untuned_policy, tmp_path)
    assert not has_weights(tmp_path)
    with pytest.raises(ConversionError, match="cannot be loaded"):
        load_policy(tmp_path)


def test_load_policy_truncated_weights_are_refused(untuned_policy, tmp_path):
    directory = tmp_path / "policy"
    shutil.copytree(untuned_policy, directory)
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ConversionError, match="cannot be loaded"):
        load_policy(directory)


def test_load_policy_without_tokenizer_is_refused(untuned_policy, tmp_path):
    shutil.copytree(untuned_policy, tmp_path / "policy")
    for file in (tmp_path / "policy").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ConversionError):
        load_policy(tmp_path / "policy")


def test_copy_policy_files_skips_directories_pickles_and_optionally_weights(tmp_path):
    source = tmp_path / "source"
    (source / "cache").mkdir(parents=True)
    weights = ("model.safetensors", "model.safetensors.index.json")
    pickles = ("pytorch_model.bin", "pytorch_model.bin.index.json", "training_args.bin", "x.pt")
    for name in ("config.json", "merges.txt", *weights, *pickles):
        (source / name).write_text(name)
    lean, whole = tmp_path / "lean", tmp_path / "whole"
    lean.mkdir()
    whole.mkdir()
    copy_policy_files(source, lean)
    copy_policy_files(source, whole, with_weights=True)
    assert {p.name for p in lean.iterdir()} == {"config.json", "merges.txt"}
    assert {p.name for p in whole.iterdir()} == {"config.json", "merges.txt", *weights}
