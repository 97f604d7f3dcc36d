"""Small files in public formats: SAM weights and training checkpoints."""

from pathlib import Path

import pytest
import torch

from coprs_deploy.conversion.converters import random_tensors
from coprs_deploy.conversion.random_policy import build_random_policy
from coprs_deploy.model_config import SamConfig, SegmentationConfig
from coprs_deploy.specs import Geometry

WIDTH = 64
"""Hidden size of the tiny policies."""

SCRIPT_WITHOUT_REFERENCE = ("<think>", " this", " policy", " is", " untuned", "</think>")


@pytest.fixture(scope="session")
def sam_config() -> SamConfig:
    """Sizes that weights can show: the decoder has the eight heads of the public SAM."""
    return SamConfig(
        encoder_embed_dim=48,
        encoder_depth=2,
        encoder_num_heads=4,
        encoder_global_attn_indexes=(1,),
        window_size=3,
        mlp_ratio=2.0,
        mask_in_chans=8,
        decoder_mlp_dim=32,
        iou_head_hidden_dim=16,
        geometry=Geometry(image_size=64, patch_size=8, out_chans=64),
    )


@pytest.fixture(scope="session")
def trained_tensors(sam_config) -> dict[str, torch.Tensor]:
    """Weights of a segmentation model, as if trained."""
    config = SegmentationConfig(policy_hidden_size=WIDTH, sam=sam_config)
    tensors = random_tensors(config, seed=7)
    generator = torch.Generator().manual_seed(8)
    return {
        name: tensor + 0.01 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in tensors.items()
    }


@pytest.fixture(scope="session")
def sam_tensors(sam_config) -> dict[str, torch.Tensor]:
    """Weights of SAM, different from ``trained_tensors``."""
    tensors = random_tensors(SegmentationConfig(policy_hidden_size=WIDTH, sam=sam_config), seed=1)
    return {name: t for name, t in tensors.items() if not name.startswith("prior.")}


@pytest.fixture(scope="session")
def sam_file(sam_tensors, tmp_path_factory) -> Path:
    """``sam_tensors`` as a ``.pth`` file."""
    path = tmp_path_factory.mktemp("sam") / "sam_vit_small.pth"
    torch.save(sam_tensors, path)
    return path


@pytest.fixture(scope="session")
def untuned_policy(tmp_path_factory) -> Path:
    """Policy directory without ``<REF_POS>`` in its tokenizer, with spare embedding rows."""
    directory = tmp_path_factory.mktemp("untuned")
    script = SCRIPT_WITHOUT_REFERENCE
    build_random_policy("tiny", script=script, has_reference_token=False).save(directory)
    return directory


@pytest.fixture(scope="session")
def tuned_policy(tmp_path_factory) -> Path:
    """Policy directory whose tokenizer has ``<REF_POS>``."""
    directory = tmp_path_factory.mktemp("tuned")
    build_random_policy("tiny", seed=3).save(directory)
    return directory
