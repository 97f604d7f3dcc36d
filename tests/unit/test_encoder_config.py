"""Sizes of light image encoders: names, geometry, refused values."""

import pytest

from coprs_deploy.encoder_config import (
    ENCODERS,
    TITLES,
    EfficientVitConfig,
    ResNetConfig,
    TinyVitConfig,
)
from coprs_deploy.model_config import SAM_SIZES, SamConfig
from coprs_deploy.specs import Geometry


@pytest.mark.parametrize("name", ENCODERS)
def test_public_encoder_has_title_and_embedding_of_sam(name):
    config = SAM_SIZES[name]
    assert config.encoder_name == TITLES[name]
    assert config.geometry.grid_size == 64
    assert config.geometry.image_size == (512 if name.startswith("efficientvit_l") else 1024)
    assert SamConfig.from_json(config.to_json()) == config


def test_sam_encoder_names():
    assert [SAM_SIZES[name].encoder_name for name in ("vit_b", "vit_h", "tiny")] == [
        "SAM ViT-B",
        "SAM ViT-H",
        "SAM ViT, width 96, 3 blocks",
    ]
    other = SamConfig().with_image_encoder(ResNetConfig(depths=(3, 4, 6, 3)))
    assert other.encoder_name == "NanoSAM ResNet of other sizes"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: TinyVitConfig(depths=(2, 2)), "the lists have"),
        (lambda: TinyVitConfig(num_heads=(2, 4, 0, 10)), "num_heads 0"),
        (lambda: TinyVitConfig(num_heads=(2, 4, 3, 10)), "embed_dims has 160, num_heads 3"),
        (lambda: TinyVitConfig(depths=(2, 2, 6, 10**4)), "depths has 10000"),
        (lambda: EfficientVitConfig(block_list=("res", "fmb", "x", "mb", "att@5")), "'x'"),
        (lambda: EfficientVitConfig(head_depth=-1), "head_depth is -1"),
        (lambda: EfficientVitConfig(head_expand=0.0), "above 0"),
        (lambda: EfficientVitConfig(qkv_dim=0), "qkv_dim is 0"),
        (lambda: ResNetConfig(widths=(64, 128, 256, 0)), "1 and more"),
        (lambda: ResNetConfig(neck_channels=0), "neck_channels is 0"),
        (lambda: SamConfig(image_encoder=EfficientVitConfig()), "geometry.patch_size is 16"),
        (
            lambda: SamConfig(
                image_encoder=ResNetConfig(), geometry=Geometry(image_size=1008, patch_size=16)
            ),
            "accepts multiples of 32",
        ),
    ],
)
def test_encoder_config_refuses(make, words):
    with pytest.raises(ValueError, match=words):
        make()
