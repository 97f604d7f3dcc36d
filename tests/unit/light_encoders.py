"""Light image encoders in tiny sizes, on the decoder of the tiny SAM."""

import shutil

import msgspec

from coprs_deploy.checkpoint import (
    expected_shapes,
    load_segmentation_model,
    read_checkpoint,
    write_checkpoint,
)
from coprs_deploy.conversion.converters import random_tensors
from coprs_deploy.encoder_config import EfficientVitConfig, ResNetConfig, TinyVitConfig
from coprs_deploy.model_config import SAM_SIZES

ENCODERS = {
    "tiny_vit": TinyVitConfig(
        embed_dims=(16, 16, 32, 32),
        depths=(1, 1, 2, 1),
        num_heads=(1, 2, 2, 2),
        window_sizes=(1, 3, 5, 3),
        mlp_ratio=2.0,
        mbconv_expand_ratio=2.0,
    ),
    "efficientvit": EfficientVitConfig(
        width_list=(16, 16, 16, 32, 32),
        depth_list=(1, 1, 0, 1, 1),
        expand_list=(1.0, 1.0, 1.0, 1.0, 2.0),
        qkv_dim=8,
        head_width=32,
        head_depth=1,
    ),
    "resnet": ResNetConfig(widths=(16, 16, 32, 32), depths=(1, 1, 1, 1), neck_channels=32),
}

SAM = {name: SAM_SIZES["tiny"].with_image_encoder(encoder) for name, encoder in ENCODERS.items()}
"""Tiny SAM with each of the encoders, by family."""


def write_light_checkpoint(path, source, family, seed=0, change=lambda tensors: None, swap=False):
    """Write a random checkpoint with a light encoder and the policy of another checkpoint.

    ``swap`` keeps everything but the encoder of that checkpoint.
    """
    original = read_checkpoint(source)
    model = msgspec.structs.replace(original.config.model, sam=SAM[family])
    tensors = random_tensors(model, seed)
    if swap:
        kept = load_segmentation_model(original).state_dict()
        tensors |= {n: t for n, t in kept.items() if not n.startswith("image_encoder.")}
        tensors = {n: t for n, t in tensors.items() if n in expected_shapes(model)}
    change(tensors)
    return write_checkpoint(
        path,
        msgspec.structs.replace(original.config, model=model),
        tensors,
        lambda folder: shutil.copytree(original.policy_path, folder, dirs_exist_ok=True),
    )
