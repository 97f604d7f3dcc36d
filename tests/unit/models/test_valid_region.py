"""An encoder that leaves out padding: bit by bit the same where it may, and another where asked."""

import math

import msgspec
import pytest
import torch

from coprs_deploy.model_config import SamConfig
from coprs_deploy.models.sam_encoder import SamImageEncoder
from coprs_deploy.specs import Geometry, ValidRegion

GEOMETRY = Geometry(image_size=64, patch_size=4, out_chans=16)
DEEP = SamConfig(
    encoder_embed_dim=24,
    encoder_depth=5,
    encoder_num_heads=2,
    encoder_global_attn_indexes=(2, 4),
    window_size=3,
    mlp_ratio=2.0,
    decoder_num_heads=2,
    geometry=GEOMETRY,
)
"""A grid of 16 cells a side in windows of 3; two blocks come before the first global one."""

GLOBAL_FIRST = SamConfig(
    encoder_embed_dim=24,
    encoder_depth=2,
    encoder_num_heads=2,
    encoder_global_attn_indexes=(0, 1),
    decoder_num_heads=2,
    geometry=GEOMETRY,
)

ROUNDING = 2e-6
"""Relative: products of fewer rows may take their float32 sums in another order."""


def encoder(config=DEEP, valid_region=None):
    torch.manual_seed(0)
    model = SamImageEncoder(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    if valid_region is not None:
        model.set_valid_region(valid_region)
    return model.requires_grad_(False).eval()


def picture(valid_region, batch=2):
    image = torch.zeros(batch, 3, 64, 64)
    image[:, :, : valid_region.height, : valid_region.width] = torch.randn(
        batch,
        3,
        valid_region.height,
        valid_region.width,
        generator=torch.Generator().manual_seed(1),
    )
    return image


def relative_error(found, wanted):
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.fixture
def count_cells(monkeypatch):
    """Count the cells that each block is given."""
    counts = []

    def count(model):
        for block in model.blocks:
            block.register_forward_pre_hook(lambda _, inputs: counts.append(inputs[0].shape[1:3]))
        return counts

    return count


@pytest.mark.parametrize("aspect_ratio", [(16, 9), (9, 16), (4, 3), (7, 1), (1, 3)])
def test_windows_of_padding_before_the_first_global_block_are_known_beforehand(aspect_ratio):
    valid_region = DEEP.valid_region(aspect_ratio)
    whole, partial = encoder(), encoder(valid_region=valid_region)
    image = picture(valid_region)
    assert relative_error(partial(image), whole(image)) <= ROUNDING
    smaller = picture(ValidRegion((1, 1), valid_region.height // 2, valid_region.width // 2))
    assert relative_error(partial(smaller), whole(smaller)) <= ROUNDING


def test_whole_windows_are_left_out_and_only_up_to_the_first_global_block(count_cells):
    partial = encoder(valid_region=DEEP.valid_region((16, 9)))  # 36 of 64 pixels: 9 of 16 cells
    cells = count_cells(partial)
    partial(torch.zeros(1, 3, 64, 64))
    assert cells == [(9, 16), (9, 16), (16, 16), (16, 16), (16, 16)]
    valid_region = DEEP.valid_region((64, 37))  # one row of pixels in a tenth row of cells
    assert (valid_region.height, valid_region.width) == (48, 64)
    between = encoder(valid_region=valid_region)
    cells.clear()
    count_cells(between)
    between(torch.zeros(1, 3, 64, 64))
    assert cells[:3] == [(12, 16), (12, 16), (16, 16)]


def test_what_lies_beyond_the_extent_is_never_read():
    valid_region = DEEP.valid_region((64, 24))
    partial, image = encoder(valid_region=valid_region), picture(valid_region)
    dirty = image.clone()
    assert valid_region.height == 24
    dirty[:, :, 24:] = math.nan
    assert torch.equal(partial(dirty), partial(image))


@pytest.mark.parametrize("aspect_ratio", [(16, 9), (9, 16), (7, 1)])
def test_dropped_padding_is_what_an_encoder_of_the_picture_alone_computes(aspect_ratio):
    valid_region = DEEP.valid_region(aspect_ratio, drops_padding=True)
    partial, image = encoder(valid_region=valid_region), picture(valid_region)
    rows, columns = valid_region.height // 4, valid_region.width // 4
    assert partial.padding_from == len(partial.blocks)

    alone = encoder()
    x = alone.patch_embed(image[:, :, : 4 * rows, : 4 * columns])
    x = x + alone.pos_embed[:, :rows, :columns]
    for block in alone.blocks:
        x = block(x)
    blank = torch.zeros(1, 3, 64, 64)
    cells = alone.patch_embed(blank) + alone.pos_embed
    for block in alone.blocks:
        cells = block(cells)
    expected = cells.repeat(2, 1, 1, 1)
    expected[:, :rows, :columns] = x
    assert relative_error(partial(image), alone.neck(expected.permute(0, 3, 1, 2))) <= ROUNDING


def test_dropped_padding_is_another_function_and_computes_no_padding(count_cells):
    valid_region = DEEP.valid_region((16, 9), drops_padding=True)
    whole, partial, image = encoder(), encoder(valid_region=valid_region), picture(valid_region)
    assert relative_error(partial(image), whole(image)) > 0.01
    cells = count_cells(partial)
    partial(image)
    assert cells == [(9, 16)] * 5


def test_the_weights_of_an_encoder_keep_their_names():
    partial = encoder(valid_region=DEEP.valid_region((16, 9)))
    assert list(partial.state_dict()) == list(encoder().state_dict())


def test_an_extent_can_be_taken_back():
    partial, whole = (
        encoder(valid_region=DEEP.valid_region((16, 9), drops_padding=True)),
        encoder(),
    )
    partial.set_valid_region(DEEP.valid_region((9, 16), drops_padding=True))
    image = picture(DEEP.valid_region((9, 16)))
    again = encoder(valid_region=DEEP.valid_region((9, 16), drops_padding=True))
    assert torch.equal(partial(image), again(image))
    partial.set_valid_region(None)
    assert torch.equal(partial(image), whole(image))


@pytest.mark.parametrize(
    ("config", "aspect_ratio", "drops_padding", "message"),
    [
        (GLOBAL_FIRST, (16, 9), False, "attends globally from its first block on.*drop_padding"),
        (DEEP, (1, 1), False, "nothing is saved for 1:1.*every attention window.*or drop_padding"),
        (DEEP, (64, 63), False, "every attention window of the square; accepted: a longer aspect"),
        (DEEP, (64, 63), True, "every cell of the square; accepted: a longer aspect, or none"),
    ],
)
def test_an_aspect_that_saves_nothing_is_refused(config, aspect_ratio, drops_padding, message):
    with pytest.raises(ValueError, match=message):
        config.valid_region(aspect_ratio, drops_padding=drops_padding)


def test_windows_as_large_as_the_grid_see_everything():
    assert msgspec.structs.replace(DEEP, window_size=16).num_local_blocks == 0
    assert msgspec.structs.replace(DEEP, encoder_global_attn_indexes=()).num_local_blocks == 5
    assert DEEP.num_local_blocks == 2
