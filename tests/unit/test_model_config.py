"""Sizes of the model: the public ones, and refusing impossible ones."""

import pytest

from coprs_deploy.encoder_config import ENCODERS
from coprs_deploy.model_config import SAM_SIZES, SamConfig, SegmentationConfig
from coprs_deploy.specs import Geometry


@pytest.mark.parametrize(
    ("name", "width", "depth", "heads", "global_blocks"),
    [
        ("vit_b", 768, 12, 12, (2, 5, 8, 11)),
        ("vit_l", 1024, 24, 16, (5, 11, 17, 23)),
        ("vit_h", 1280, 32, 16, (7, 15, 23, 31)),
    ],
)
def test_sam_sizes_public_equal_sam(name, width, depth, heads, global_blocks):
    config = SAM_SIZES[name]
    assert (config.encoder_embed_dim, config.encoder_depth, config.encoder_num_heads) == (
        width,
        depth,
        heads,
    )
    assert config.encoder_global_attn_indexes == global_blocks
    assert config.window_size == 14
    assert config.geometry == Geometry()
    assert (config.decoder_depth, config.decoder_num_heads, config.decoder_mlp_dim) == (2, 8, 2048)


def test_sam_sizes_names_are_complete():
    assert list(SAM_SIZES) == ["vit_b", "vit_l", "vit_h", "tiny", *ENCODERS]


@pytest.mark.parametrize("name", SAM_SIZES)
def test_sam_sizes_survive_json(name):
    config = SegmentationConfig(policy_hidden_size=64, sam=SAM_SIZES[name])
    assert SegmentationConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"encoder_embed_dim": 770}, "encoder_embed_dim is 770; it must be a multiple of 12"),
        ({"decoder_num_heads": 24}, "out_chans is 256; it must be a multiple of 48"),
        (
            {"geometry": Geometry(out_chans=36), "decoder_num_heads": 2},
            "out_chans is 36; it must be a multiple of 8",
        ),
        ({"mask_in_chans": 6}, "mask_in_chans is 6; it must be a multiple of 4"),
        (
            {"encoder_global_attn_indexes": (2, 12)},
            "names block 12; accepted: 0 to 11",
        ),
        ({"encoder_global_attn_indexes": (-1,)}, "names block -1; accepted: 0 to 11"),
        ({"encoder_depth": 129999}, "encoder_depth is 129999; it must be at most 1000"),
        ({"decoder_depth": 29999}, "decoder_depth is 29999; it must be at most 1000"),
        ({"num_mask_tokens": 49999}, "num_mask_tokens is 49999; it must be at most 1000"),
    ],
)
def test_sam_config_impossible_sizes_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        SamConfig(**values)


def test_sam_config_without_global_blocks_is_accepted():
    assert SamConfig(encoder_global_attn_indexes=()).encoder_global_attn_indexes == ()


@pytest.mark.parametrize("width", [0, -64])
def test_segmentation_config_hidden_size_below_one_is_refused(width):
    with pytest.raises(ValueError, match=f"policy_hidden_size is {width}; it must be at least 1"):
        SegmentationConfig(policy_hidden_size=width)


def test_segmentation_config_prior_heads_must_divide_channels():
    assert SegmentationConfig(policy_hidden_size=8, prior_num_heads=16).prior_num_heads == 16
    with pytest.raises(ValueError, match="prior_num_heads is 3; it must divide the 256 embedding"):
        SegmentationConfig(policy_hidden_size=8, prior_num_heads=3)


def test_segmentation_config_nested_error_has_its_path():
    data = SegmentationConfig(policy_hidden_size=8).to_json()
    data["sam"]["geometry"]["patch_size"] = 15
    with pytest.raises(ValueError, match=r"patch_size is 15.*\$\.sam\.geometry"):
        SegmentationConfig.from_json(data)


@pytest.mark.parametrize("name", ["encoder_num_heads", "decoder_num_heads", "prior_num_heads"])
def test_segmentation_config_zero_heads_are_refused(name):
    data = SegmentationConfig(policy_hidden_size=8).to_json()
    place = data if name in data else data["sam"]
    place[name] = 0
    with pytest.raises(ValueError, match=name):
        SegmentationConfig.from_json(data)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("encoder_embed_dim", 0),
        ("encoder_embed_dim", -768),
        ("window_size", -1),
        ("num_mask_tokens", 0),
        ("mask_in_chans", 0),
        ("decoder_depth", -2),
        ("iou_head_hidden_dim", 0),
    ],
)
def test_sam_config_size_below_one_is_refused(name, value):
    with pytest.raises(ValueError, match=name):
        SamConfig(**{name: value})


@pytest.mark.parametrize("channels", [0, -256])
def test_geometry_channels_below_one_are_refused(channels):
    with pytest.raises(ValueError, match="out_chans"):
        Geometry(out_chans=channels)
