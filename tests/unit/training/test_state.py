"""Checkpoints of a training state: dtypes of trained and frozen weights, weights in memory."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from coprs_deploy.checkpoint import load_segmentation_model, read_checkpoint
from coprs_deploy.conversion import random_checkpoint
from coprs_deploy.errors import CheckpointError
from coprs_deploy.training.features import encoder_fingerprint
from coprs_deploy.training.state import state_from_checkpoint


@pytest.fixture(scope="module", params=["tiny", "tiny-llava"])
def start(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("start") / "checkpoint"
    random_checkpoint(path, request.param, "tiny")
    return read_checkpoint(path)


def perturbed(start):
    """A state with weights that no half precision holds exactly."""
    state = state_from_checkpoint(start)
    with torch.no_grad():
        for part in (state.policy.model, state.segmentation):
            for weight in part.parameters():
                weight.add_(1e-4 * torch.rand_like(weight))
    return state


def test_save_checkpoint_keeps_the_weights_in_memory(start, tmp_path):
    state = perturbed(start)
    before = {n: t.clone() for n, t in state.policy.model.state_dict().items()}
    state.save_checkpoint(tmp_path / "saved", "bfloat16", {})
    after = state.policy.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_save_checkpoint_stores_all_weights_in_one_dtype(start, tmp_path, dtype):
    state = perturbed(start)
    saved = state.save_checkpoint(tmp_path / "saved", dtype, {})
    weights = load_file(saved.path / "segmentation.safetensors")
    weights |= load_file(saved.policy_path / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {getattr(torch, dtype)}
    read = state_from_checkpoint(saved).state_dict()
    for part, tensors in state.state_dict().items():
        for name, tensor in tensors.items():
            expected = tensor.to(getattr(torch, dtype)).to(tensor.dtype)
            assert torch.equal(read[part][name], expected), name


def test_save_checkpoint_stores_frozen_weights_without_loss(start, tmp_path):
    state = perturbed(start)
    state.segmentation.requires_grad_(False)
    state.segmentation.prior.requires_grad_(True)
    state.policy.model.requires_grad_(False)
    state.add_trained()
    saved = state.save_checkpoint(tmp_path / "saved", "bfloat16", {})
    weights = load_file(saved.path / "segmentation.safetensors")
    for name, tensor in weights.items():
        is_trained = name.startswith("prior.") and name in dict(
            state.segmentation.named_parameters()
        )
        assert tensor.dtype == (torch.bfloat16 if is_trained else torch.float32), name
    model = load_segmentation_model(saved)
    assert encoder_fingerprint(model) == encoder_fingerprint(state.segmentation)
    policy = state_from_checkpoint(saved).policy.model.state_dict()
    kept = state.policy.model.state_dict()
    assert all(torch.equal(policy[name], tensor) for name, tensor in kept.items())


def test_frozen_weights_that_half_precision_holds_are_stored_in_it(start, tmp_path):
    state = state_from_checkpoint(start)
    state.segmentation.requires_grad_(False)
    state.policy.model.requires_grad_(True)
    state.add_trained()
    with torch.no_grad():
        for weight in state.segmentation.parameters():
            weight.copy_(weight.half())
    saved = state.save_checkpoint(tmp_path / "saved", "bfloat16", {})
    weights = load_file(saved.path / "segmentation.safetensors")
    name = "image_encoder.blocks.0.attn.qkv.weight"
    assert weights[name].dtype == torch.float16
    assert torch.equal(weights[name].float(), state.segmentation.state_dict()[name])


def test_state_from_a_checkpoint_with_a_quantized_policy_is_refused(start, tmp_path):
    shutil.copytree(start.path, tmp_path / "quantized")
    file = tmp_path / "quantized" / "policy" / "config.json"
    quantization = {"quantization_config": {"quant_method": "compressed-tensors"}}
    file.write_text(json.dumps(json.loads(file.read_text()) | quantization))
    with pytest.raises(CheckpointError, match="training needs float weights"):
        state_from_checkpoint(read_checkpoint(tmp_path / "quantized"))
