"""Image encoder: attention against its formula, and windows."""

import math

import pytest
import torch

from coprs_deploy.model_config import SAM_SIZES, SamConfig
from coprs_deploy.models.sam_encoder import EncoderBlock, RelativeAttention, SamImageEncoder
from coprs_deploy.specs import Geometry

SMALL = SamConfig(
    encoder_embed_dim=24,
    encoder_depth=2,
    encoder_num_heads=2,
    encoder_global_attn_indexes=(1,),
    window_size=3,
    mlp_ratio=2.0,
    decoder_num_heads=2,
    geometry=Geometry(image_size=32, patch_size=4, out_chans=16),
)
"""8 x 8 cells in windows of 3, so that the last windows are padded."""


def drawn(module, seed=0):
    """Draw every parameter, so that no table of positions stays zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            is_scale = "norm" in name and name.endswith("weight")
            parameter.normal_(mean=1.0 if is_scale else 0.0, std=0.2, generator=generator)
    return module.requires_grad_(False).eval()


def image(config, batch=1, seed=0):
    side = config.geometry.image_size
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(seed))


def relative_error(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


def test_relative_attention_equals_sam_definition():
    grid, heads, width = 3, 2, 8
    attention = drawn(RelativeAttention(width, heads, grid, use_rel_pos=True)).double()
    x = torch.randn(1, grid, grid, width, generator=torch.Generator().manual_seed(1)).double()
    head_width = width // heads

    qkv = attention.qkv(x)[0]
    expected = torch.zeros(grid, grid, width, dtype=torch.float64)
    for head in range(heads):
        part = slice(head * head_width, (head + 1) * head_width)
        query, key, value = (qkv[..., n * width : (n + 1) * width][..., part] for n in range(3))
        for y in range(grid):
            for x_ in range(grid):
                logits, values = [], []
                for row in range(grid):
                    for column in range(grid):
                        q = query[y, x_]
                        logits.append(
                            q @ key[row, column] / math.sqrt(head_width)
                            + q @ attention.rel_pos_h[y - row + grid - 1]
                            + q @ attention.rel_pos_w[x_ - column + grid - 1]
                        )
                        values.append(value[row, column])
                weights = torch.stack(logits).softmax(dim=0)
                expected[y, x_, part] = weights @ torch.stack(values)
    # Double precision on both sides: only the order of the sums differs.
    torch.testing.assert_close(attention(x)[0], attention.proj(expected), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("table", ["rel_pos_h", "rel_pos_w"])
def test_encoder_each_position_table_changes_embedding(table):
    encoder = drawn(SamImageEncoder(SMALL))
    before = encoder(image(SMALL))
    for block in encoder.blocks:
        getattr(block.attn, table).zero_()
    assert relative_error(encoder(image(SMALL)), before) > 1e-3


def test_encoder_without_relative_positions_has_no_tables():
    config = SamConfig.from_json({**SMALL.to_json(), "use_rel_pos": False})
    encoder = drawn(SamImageEncoder(config))
    assert not [name for name in encoder.state_dict() if "rel_pos" in name]
    assert encoder(image(config)).shape == (1, 16, 8, 8)


@pytest.mark.parametrize(
    ("cell", "window"), [((4, 2), (slice(3, 6), slice(0, 3))), ((7, 7), (slice(6, 8), slice(6, 8)))]
)
def test_windowed_block_change_stays_inside_window(cell, window):
    block = drawn(EncoderBlock(SMALL, is_global=False))
    x = torch.randn(1, 8, 8, 24, generator=torch.Generator().manual_seed(2))
    changed = x.clone()
    changed[0, cell[0], cell[1]] *= -1  # not a constant: the normalization would remove it
    difference = (block(changed) - block(x)).abs().amax(dim=-1)[0]
    inside = torch.zeros(8, 8, dtype=torch.bool)
    inside[window] = True
    assert (difference[inside] > 1e-4).all()
    # Other windows have equal inputs, but a matrix product may sum in another order.
    assert float(difference[~inside].max()) < 1e-6


def test_global_block_change_reaches_whole_grid():
    block = drawn(EncoderBlock(SMALL, is_global=True))
    x = torch.randn(1, 8, 8, 24, generator=torch.Generator().manual_seed(2))
    changed = x.clone()
    changed[0, 0, 0] *= -1
    assert ((block(changed) - block(x)).abs().amax(dim=-1) > 1e-5).all()


def test_encoder_batched_images_do_not_mix():
    encoder = drawn(SamImageEncoder(SMALL))
    batch = image(SMALL, batch=3)
    together = encoder(batch)
    for i in range(3):
        # Batched products may sum in another order than single ones.
        assert relative_error(encoder(batch[i : i + 1]), together[i : i + 1]) < 1e-5
    assert relative_error(together[0], together[1]) > 1e-2


def test_encoder_only_configured_blocks_are_global():
    encoder = SamImageEncoder(SAM_SIZES["tiny"])
    assert [block.window for block in encoder.blocks] == [6, 6, 16]
