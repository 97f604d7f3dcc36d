"""The three conversions, from small files in the public formats."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoTokenizer

from coprs_deploy.checkpoint import expected_shapes, load_segmentation_model, read_checkpoint
from coprs_deploy.conversion import (
    ConversionOptions,
    checkpoint_from_policy_and_sam,
    checkpoint_from_public_training,
    random_checkpoint,
)
from coprs_deploy.conversion.converters import random_tensors
from coprs_deploy.conversion.policy_files import DEFAULT_PROMPTS
from coprs_deploy.conversion.random_policy import POLICY_SIZES, build_random_policy
from coprs_deploy.errors import ArtifactError, CheckpointError, ConversionError
from coprs_deploy.model_config import SAM_SIZES, SegmentationConfig
from coprs_deploy.policy import PolicyRequest
from coprs_deploy.policy.transformers_policy import TransformersPolicy
from coprs_deploy.prompts import REFERENCE_TOKEN
from tests.unit.conversion.test_weight_files import shard, write_shards
from tests.unit.hub_server import Repository

PROMPT = (
    "<|im_start|>user\n<|image_pad|>\nSegment: {instruction}<|im_end|>\n<|im_start|>assistant\n"
)


def stored_tensors(checkpoint):
    return load_file(checkpoint.path / "segmentation.safetensors")


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def generate(checkpoint):
    """Run a checkpoint's policy on one request."""
    config = checkpoint.config
    limits = config.policy_image
    image = np.zeros((56, 56, 3), dtype=np.uint8)
    with TransformersPolicy(
        checkpoint.policy_path,
        config.prompt,
        min_pixels=limits.min_pixels,
        max_pixels=min(limits.max_pixels, 12_544),
    ) as policy:
        return list(policy.stream(PolicyRequest(image, "the cup", max_new_tokens=12)))[-1]


@pytest.fixture(scope="module")
def checkpoint(untuned_policy, sam_file, tmp_path_factory):
    """An untuned policy combined with SAM."""
    out = tmp_path_factory.mktemp("combined") / "checkpoint"
    return checkpoint_from_policy_and_sam(untuned_policy, sam_file, out)


class TestPolicyAndSam:
    def test_policy_and_sam_checkpoint_is_read_back(self, checkpoint):
        assert read_checkpoint(checkpoint.path) == checkpoint

    def test_policy_and_sam_weights_equal_sam_and_untrained_prior(
        self, checkpoint, sam_tensors, sam_config
    ):
        assert checkpoint.config.model == SegmentationConfig(policy_hidden_size=64, sam=sam_config)
        stored = stored_tensors(checkpoint)
        prior = {name: t for name, t in stored.items() if name.startswith("prior.")}
        assert_same({n: t for n, t in stored.items() if n not in prior}, sam_tensors)
        assert prior["prior.q_proj.weight"].shape == (64, 64)
        assert all(float(tensor.abs().max()) > 0 for tensor in prior.values())
        assert prior["prior.fuser.2.bias"].tolist() == pytest.approx([-1.8])

    def test_policy_and_sam_prior_follows_seed(self, untuned_policy, sam_file, tmp_path):
        heads = [
            stored_tensors(
                checkpoint_from_policy_and_sam(
                    untuned_policy, sam_file, tmp_path / str(i), ConversionOptions(seed=seed)
                )
            )["prior.q_proj.weight"]
            for i, seed in enumerate((5, 5, 6))
        ]
        assert torch.equal(heads[0], heads[1])
        assert not torch.equal(heads[0], heads[2])

    def test_policy_and_sam_policy_gains_token_only(self, checkpoint, untuned_policy):
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.policy_path)
        token = tokenizer.convert_tokens_to_ids(REFERENCE_TOKEN)
        assert tokenizer.added_tokens_decoder[token].special
        before, after = (
            AutoModelForImageTextToText.from_pretrained(path).state_dict()
            for path in (untuned_policy, checkpoint.policy_path)
        )
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            if not torch.equal(tensor, after[name]):
                assert name in ("model.language_model.embed_tokens.weight", "lm_head.weight")
                changed = (tensor != after[name]).any(dim=1).nonzero().flatten()
                assert changed.tolist() == [token]
                torch.testing.assert_close(after[name][token], tensor[:token].mean(dim=0))

    def test_policy_and_sam_prompt_is_default_or_given(
        self, checkpoint, untuned_policy, sam_file, tmp_path
    ):
        assert checkpoint.config.prompt == DEFAULT_PROMPTS["qwen2_5_vl"]
        options = ConversionOptions(prompt=PROMPT)
        other = checkpoint_from_policy_and_sam(untuned_policy, sam_file, tmp_path / "c", options)
        assert read_checkpoint(other.path).config.prompt.text == PROMPT
        assert other.config.prompt.image_token == "<|image_pad|>"

    def test_policy_and_sam_prompt_without_instruction_is_refused(
        self, untuned_policy, sam_file, tmp_path
    ):
        options = ConversionOptions(prompt="<|image_pad|> find it")
        with pytest.raises(ValueError, match=r"\{instruction\} 0 times"):
            checkpoint_from_policy_and_sam(untuned_policy, sam_file, tmp_path / "c", options)
        assert list(tmp_path.iterdir()) == []

    def test_options_empty_prompt_or_tail_is_refused(self):
        with pytest.raises(ValueError, match=r"\{instruction\} 0 times"):
            ConversionOptions(prompt="").template("llava")
        with pytest.raises(ValueError, match="reference_tail is ''"):
            ConversionOptions(reference_tail="").template("llava")

    def test_policy_and_sam_policy_may_be_on_the_hub(self, hub, checkpoint, sam_file, tmp_path):
        hub.repositories["lab/policy"] = Repository()
        files = {path.name: path.read_bytes() for path in checkpoint.policy_path.iterdir()}
        commit = hub.repositories["lab/policy"].commit(files)
        out = tmp_path / "checkpoint"
        made = checkpoint_from_policy_and_sam("hf://lab/policy", sam_file, out)
        assert made.config.provenance["policy"] == f"hf://lab/policy ({commit})"
        assert_same(
            load_file(made.policy_path / "model.safetensors"),
            load_file(checkpoint.policy_path / "model.safetensors"),
        )

    def test_policy_and_sam_provenance_notes_untrained_prior(self, checkpoint):
        provenance = checkpoint.config.provenance
        assert provenance["converter"] == "checkpoint_from_policy_and_sam"
        assert provenance["sam"] == "sam_vit_small.pth"
        assert "untrained" in provenance["note"]

    def test_policy_and_sam_policy_generates(self, checkpoint):
        assert generate(checkpoint).response.text.startswith("<think> this policy is untuned")

    def test_policy_and_sam_checkpoint_loads_as_model(self, checkpoint, sam_tensors):
        model = load_segmentation_model(checkpoint)
        name = "image_encoder.blocks.1.attn.rel_pos_h"
        assert torch.equal(model.state_dict()[name], sam_tensors[name])

    def test_conversion_steps_are_announced(self, untuned_policy, sam_file, tmp_path):
        steps = []
        checkpoint_from_policy_and_sam(
            untuned_policy, sam_file, tmp_path / "c", progress=steps.append
        )
        assert steps == ["read SAM", "load policy", "write checkpoint"]

    def test_policy_and_sam_unusable_source_leaves_nothing(
        self, untuned_policy, sam_file, tmp_path
    ):
        broken = tmp_path / "sources" / "sam.pth"
        broken.parent.mkdir()
        torch.save({"w": torch.zeros(2)}, broken)
        out = tmp_path / "out" / "checkpoint"
        for policy, sam in ((untuned_policy, broken), (broken.parent, sam_file)):
            with pytest.raises(ConversionError):
                checkpoint_from_policy_and_sam(policy, sam, out)
        assert not out.parent.exists() or list(out.parent.iterdir()) == []

    def test_policy_and_sam_extra_tensor_is_named(self, untuned_policy, sam_tensors, tmp_path):
        path = tmp_path / "sam.pth"
        torch.save({**sam_tensors, "image_encoder.extra": torch.zeros(1)}, path)
        with pytest.raises(CheckpointError, match=r"unexpected: image_encoder\.extra"):
            checkpoint_from_policy_and_sam(untuned_policy, path, tmp_path / "c")
        assert not (tmp_path / "c").exists()


class TestOverwriting:
    def convert(self, untuned_policy, sam_file, out, overwrite):
        options = ConversionOptions(overwrite=overwrite)
        return checkpoint_from_policy_and_sam(untuned_policy, sam_file, out, options)

    def test_convert_existing_checkpoint_is_replaced_only_with_overwrite(
        self, untuned_policy, sam_file, tmp_path
    ):
        out = random_checkpoint(tmp_path / "checkpoint").path
        before = (out / "config.json").read_bytes()
        with pytest.raises(ArtifactError, match="--overwrite"):
            self.convert(untuned_policy, sam_file, out, overwrite=False)
        assert (out / "config.json").read_bytes() == before
        self.convert(untuned_policy, sam_file, out, overwrite=True)
        provenance = read_checkpoint(out).config.provenance
        assert provenance["converter"] == "checkpoint_from_policy_and_sam"
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]

    def test_convert_foreign_directory_is_refused(self, untuned_policy, sam_file, tmp_path):
        (tmp_path / "photos").mkdir()
        (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
        with pytest.raises(ArtifactError, match=r"has no config\.json: it is not replaced"):
            self.convert(untuned_policy, sam_file, tmp_path / "photos", overwrite=True)
        assert (tmp_path / "photos" / "cat.jpg").read_bytes() == b"cat"

    def test_convert_target_is_checked_before_sources(self, tmp_path):
        (tmp_path / "taken").mkdir()
        (tmp_path / "taken" / "file").touch()
        steps = []
        for convert in (
            lambda out: checkpoint_from_policy_and_sam("no", "no", out, progress=steps.append),
            lambda out: checkpoint_from_public_training("no", "no", out, progress=steps.append),
            lambda out: random_checkpoint(out, progress=steps.append),
        ):
            with pytest.raises(ArtifactError):
                convert(tmp_path / "taken")
        assert steps == []

    def test_convert_failed_replacement_keeps_old_checkpoint(
        self, untuned_policy, sam_file, sam_tensors, tmp_path
    ):
        out = random_checkpoint(tmp_path / "checkpoint").path
        before = read_checkpoint(out).fingerprint()
        broken = tmp_path / "sam.pth"
        torch.save({**sam_tensors, "extra": torch.zeros(1)}, broken)
        with pytest.raises(CheckpointError):
            self.convert(untuned_policy, broken, out, overwrite=True)
        assert read_checkpoint(out).fingerprint() == before


def public_names(tensors):
    """Rename trained tensors to the public training code's names, without the image encoder."""
    return {
        name.replace("prior.", "heatmap_head.", 1): tensor
        for name, tensor in tensors.items()
        if not name.startswith("image_encoder.")
    }


@pytest.fixture
def public_directory(tmp_path, trained_tensors, tuned_policy):
    """Checkpoint of the public training code: modules, and a policy with weights."""
    root = tmp_path / "global_step_100"
    root.mkdir()
    torch.save(public_names(trained_tensors), root / "refseg_modules.pt")
    shutil.copytree(tuned_policy, root / "huggingface")
    return root


def replace_weights_by_shards(root, tensors, num_ranks=2):
    for file in (root / "huggingface").glob("*.safetensors*"):
        file.unlink()
    write_shards(root, tensors, num_ranks)


class TestPublicTraining:
    def test_public_training_combines_modules_and_sam_encoder(
        self, public_directory, sam_file, sam_tensors, trained_tensors, tmp_path
    ):
        checkpoint = checkpoint_from_public_training(public_directory, sam_file, tmp_path / "c")
        expected = {
            name: sam_tensors[name] if name.startswith("image_encoder.") else tensor
            for name, tensor in trained_tensors.items()
        }
        assert_same(stored_tensors(checkpoint), expected)
        assert read_checkpoint(checkpoint.path) == checkpoint
        assert checkpoint.config.provenance["policy"] == "as it was saved"

    def test_public_training_policy_with_weights_is_copied(
        self, public_directory, sam_file, tuned_policy, tmp_path
    ):
        checkpoint = checkpoint_from_public_training(public_directory, sam_file, tmp_path / "c")
        for file in tuned_policy.iterdir():
            assert (checkpoint.policy_path / file.name).read_bytes() == file.read_bytes()

    @pytest.mark.parametrize("names", ["in memory", "on the hub"])
    @pytest.mark.parametrize("size", ["tiny", "tiny-llava"])
    def test_public_training_sharded_policy_is_merged(
        self, public_directory, sam_file, tmp_path, size, names
    ):
        policy = build_random_policy(size, seed=11)
        ends = [policy.model.generation_config.eos_token_id, policy.tokenizer.pad_token_id]
        policy.model.generation_config.eos_token_id = ends
        shutil.rmtree(public_directory / "huggingface")
        policy.save(public_directory / "huggingface")
        weights = policy.model.state_dict()
        if names == "on the hub":  # older versions of transformers train under these
            weights = load_file(public_directory / "huggingface" / "model.safetensors")
        replace_weights_by_shards(public_directory, weights, num_ranks=3)

        checkpoint = checkpoint_from_public_training(public_directory, sam_file, tmp_path / "c")

        loaded = AutoModelForImageTextToText.from_pretrained(checkpoint.policy_path)
        assert_same(loaded.state_dict(), policy.model.state_dict())
        assert loaded.generation_config.eos_token_id == ends
        assert checkpoint.config.provenance["policy"] == "merged from FSDP shards"
        expected = "<think> this generated policy follows a script</think><REF_POS>"
        assert generate(checkpoint).response.text == expected

    def test_public_training_shards_that_share_memory_are_separated(
        self, public_directory, sam_file, tmp_path
    ):
        (file,) = (public_directory / "huggingface").glob("*.safetensors")
        weights = load_file(file)
        file.unlink()
        table = next(name for name in weights if name.endswith("embed_tokens.weight"))
        weights["lm_head.weight"] = weights[table]
        torch.save(weights, shard(public_directory, 1, 0))
        checkpoint = checkpoint_from_public_training(public_directory, sam_file, tmp_path / "c")
        (stored,) = checkpoint.policy_path.glob("*.safetensors")
        assert_same(load_file(stored), weights)

    @pytest.mark.parametrize("with_head", [True, False])
    def test_public_training_sharded_tied_embeddings_stay_tied(
        self, public_directory, sam_file, tmp_path, monkeypatch, with_head
    ):
        tied = dataclasses.replace(POLICY_SIZES["tiny"], tie_word_embeddings=True)
        monkeypatch.setitem(POLICY_SIZES, "tied", tied)
        policy = build_random_policy("tied", seed=11)
        shutil.rmtree(public_directory / "huggingface")
        policy.save(public_directory / "huggingface")
        weights = policy.model.state_dict()
        assert "lm_head.weight" in weights
        if not with_head:
            del weights["lm_head.weight"]
        replace_weights_by_shards(public_directory, weights)

        checkpoint = checkpoint_from_public_training(public_directory, sam_file, tmp_path / "c")

        loaded = AutoModelForImageTextToText.from_pretrained(checkpoint.policy_path)
        assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
        assert_same(loaded.state_dict(), policy.model.state_dict())

    def test_public_training_given_prompt_is_stored(self, public_directory, sam_file, tmp_path):
        options = ConversionOptions(prompt=PROMPT)
        checkpoint = checkpoint_from_public_training(
            public_directory, sam_file, tmp_path / "c", options
        )
        assert checkpoint.config.prompt.text == PROMPT

    def test_conversion_steps_are_announced(
        self, public_directory, sam_file, tuned_policy, tmp_path
    ):
        steps = []
        checkpoint_from_public_training(
            public_directory, sam_file, tmp_path / "a", progress=steps.append
        )
        weights = AutoModelForImageTextToText.from_pretrained(tuned_policy).state_dict()
        replace_weights_by_shards(public_directory, weights)
        checkpoint_from_public_training(
            public_directory, sam_file, tmp_path / "b", progress=steps.append
        )
        first = "read SAM and the trained modules"
        assert steps == [
            *(first, "load policy", "write checkpoint"),
            *(first, "merge 2 FSDP shards", "write checkpoint"),
        ]

    def test_public_training_missing_rank_is_named(
        self, public_directory, sam_file, tuned_policy, tmp_path
    ):
        weights = AutoModelForImageTextToText.from_pretrained(tuned_policy).state_dict()
        replace_weights_by_shards(public_directory, weights)
        missing = shard(public_directory, 2, 1)
        missing.unlink()
        with pytest.raises(ConversionError, match=f"lacks {missing.name}"):
            checkpoint_from_public_training(public_directory, sam_file, tmp_path / "c")
        assert not (tmp_path / "c").exists()

    def test_public_training_policy_without_weights_is_refused(
        self, public_directory, sam_file, tmp_path
    ):
        replace_weights_by_shards(public_directory, {}, num_ranks=0)
        with pytest.raises(ConversionError, match=r"neither .*huggingface has weights"):
            checkpoint_from_public_training(public_directory, sam_file, tmp_path / "c")

    def test_public_training_missing_parts_are_refused(self, public_directory, sam_file, tmp_path):
        shutil.rmtree(public_directory / "huggingface")
        with pytest.raises(ConversionError, match=r"has no huggingface/"):
            checkpoint_from_public_training(public_directory, sam_file, tmp_path / "c")
        (public_directory / "refseg_modules.pt").unlink()
        with pytest.raises(ConversionError, match=r"no file .*refseg_modules\.pt"):
            checkpoint_from_public_training(public_directory, sam_file, tmp_path / "c")

    @pytest.mark.parametrize("name", ["heatmap_head.q_proj.weight", "heatmap_head.fuser.0.weight"])
    def test_public_training_missing_head_is_named(
        self, public_directory, sam_file, trained_tensors, tmp_path, name
    ):
        lacking = {n: t for n, t in public_names(trained_tensors).items() if n != name}
        torch.save(lacking, public_directory / "refseg_modules.pt")
        with pytest.raises(ConversionError, match=f"has no {name}"):
            checkpoint_from_public_training(public_directory, sam_file, tmp_path / "c")

    def test_public_training_other_sam_size_is_named(
        self, public_directory, sam_file, trained_tensors, tmp_path
    ):
        tensors = public_names(trained_tensors)
        tensors["mask_decoder.mask_tokens.weight"] = torch.zeros(3, 64)
        torch.save(tensors, public_directory / "refseg_modules.pt")
        with pytest.raises(CheckpointError, match=r"mask_tokens\.weight is \(3, 64\), not \(4, 64"):
            checkpoint_from_public_training(public_directory, sam_file, tmp_path / "c")
        assert not (tmp_path / "c").exists()

    def test_public_training_policy_without_token_is_refused(
        self, public_directory, sam_file, untuned_policy, tmp_path
    ):
        shutil.rmtree(public_directory / "huggingface")
        shutil.copytree(untuned_policy, public_directory / "huggingface")
        with pytest.raises(ConversionError, match="has no <REF_POS>"):
            checkpoint_from_public_training(public_directory, sam_file, tmp_path / "c")

    def test_public_training_hidden_size_mismatch_is_refused(
        self, public_directory, sam_file, trained_tensors, tmp_path
    ):
        tensors = public_names(trained_tensors)
        tensors["heatmap_head.q_proj.weight"] = torch.zeros(64, 32)
        torch.save(tensors, public_directory / "refseg_modules.pt")
        with pytest.raises(ConversionError, match=r"policy hidden size 64 .* prior input size 32"):
            checkpoint_from_public_training(public_directory, sam_file, tmp_path / "c")

    def test_public_training_wrong_policy_weights_are_refused(
        self, public_directory, sam_file, tmp_path
    ):
        file = public_directory / "huggingface" / "model.safetensors"
        weights = load_file(file)
        del weights["lm_head.weight"]
        save_file(weights, file, metadata={"format": "pt"})
        with pytest.raises(ConversionError, match="missing keys"):
            checkpoint_from_public_training(public_directory, sam_file, tmp_path / "c")


class TestRandomCheckpoint:
    def test_random_checkpoint_equal_seeds_are_equal(self, tiny_checkpoint, tmp_path):
        again = random_checkpoint(tmp_path / "again")
        other = random_checkpoint(tmp_path / "other", options=ConversionOptions(seed=1))
        fingerprint = read_checkpoint(tiny_checkpoint).fingerprint()
        assert again.fingerprint() == fingerprint
        assert other.fingerprint() != fingerprint

    @pytest.mark.parametrize("size", ["tiny", "tiny-llava"])
    def test_random_checkpoint_tiny_is_complete_and_generates(self, size, request):
        name = "tiny_checkpoint" if size == "tiny" else "tiny_llava_checkpoint"
        checkpoint = read_checkpoint(request.getfixturevalue(name))
        assert checkpoint.config.model.sam == SAM_SIZES["tiny"]
        assert checkpoint.config.policy_image == POLICY_SIZES[size].image_limits
        assert "mean nothing" in checkpoint.config.provenance["note"]
        load_segmentation_model(checkpoint)
        result = generate(checkpoint)
        assert result.response.text.endswith("</think><REF_POS>")
        assert result.concentrations.shape == (1, checkpoint.config.model.policy_hidden_size)

    def test_random_checkpoint_every_weight_is_nonzero(self):
        config = SegmentationConfig(policy_hidden_size=8, sam=SAM_SIZES["tiny"])
        tensors = random_tensors(config, seed=0)
        assert {n: tuple(t.shape) for n, t in tensors.items()} == expected_shapes(config)
        silent = [name for name, tensor in tensors.items() if not tensor.any()]
        # Biases of normalizations start at zero in every implementation.
        assert [name for name in silent if not name.endswith("bias")] == []

    def test_random_checkpoint_keeps_global_random_state(self):
        torch.manual_seed(0)
        state = torch.get_rng_state()
        random_tensors(SegmentationConfig(policy_hidden_size=8, sam=SAM_SIZES["tiny"]), seed=5)
        build_random_policy("tiny", seed=5)
        assert torch.equal(torch.get_rng_state(), state)

    def test_random_checkpoint_unknown_size_names_accepted(self, tmp_path):
        with pytest.raises(ValueError, match=r"sam is 'vit_x'; .*vit_b, vit_l, vit_h, tiny"):
            random_checkpoint(tmp_path / "c", sam_size="vit_x")
        with pytest.raises(ValueError, match=r"policy-size is '8b'; .*3b, 7b, llava-7b, llava-13b"):
            random_checkpoint(tmp_path / "c", policy_size="8b")
        assert list(tmp_path.iterdir()) == []

    def test_conversion_steps_are_announced(self, tmp_path):
        steps = []
        random_checkpoint(tmp_path / "c", progress=steps.append)
        assert steps == [
            "generate the tiny policy",
            "generate the tiny segmentation model",
            "write checkpoint",
        ]
