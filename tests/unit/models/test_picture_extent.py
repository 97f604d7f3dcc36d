"""An encoder that leaves out padding: bit by bit the same where it may, and another where asked."""

import math

import pytest
import torch

from coprs_deploy.architecture import SamConfig
from coprs_deploy.images import extent_of_aspect
from coprs_deploy.models.sam_encoder import SamImageEncoder
from coprs_deploy.specs import Geometry, PictureExtent

GEOMETRY = Geometry(image_size=64, patch_size=4, embedding_channels=16)
DEEP = SamConfig(
    encoder_width=24,
    encoder_depth=5,
    encoder_heads=2,
    global_attention_blocks=(2, 4),
    window_size=3,
    mlp_ratio=2.0,
    decoder_heads=2,
    geometry=GEOMETRY,
)
"""A grid of 16 cells a side in windows of 3; two blocks come before the first global one."""

GLOBAL_FIRST = SamConfig(
    encoder_width=24,
    encoder_depth=2,
    encoder_heads=2,
    global_attention_blocks=(0, 1),
    decoder_heads=2,
    geometry=GEOMETRY,
)

ROUNDING = 2e-6
"""Relative: products of fewer rows may take their float32 sums in another order."""


def encoder(config=DEEP, extent=None):
    torch.manual_seed(0)
    model = SamImageEncoder(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    if extent is not None:
        model.set_picture_extent(extent)
    return model.requires_grad_(False).eval()


def picture(extent, batch=2):
    image = torch.zeros(batch, 3, 64, 64)
    image[:, :, : extent.height, : extent.width] = torch.randn(
        batch, 3, extent.height, extent.width, generator=torch.Generator().manual_seed(1)
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


@pytest.mark.parametrize("aspect", [(16, 9), (9, 16), (4, 3), (7, 1), (1, 3)])
@pytest.mark.parametrize("form", ["bias", "augmented", "blocked"])
def test_windows_of_padding_before_the_first_global_block_are_known_beforehand(aspect, form):
    extent = extent_of_aspect(*aspect, GEOMETRY)
    whole, partial = encoder(), encoder(extent=extent)
    for model in (whole, partial):
        model.set_attention_form(form)
    image = picture(extent)
    assert relative_error(partial(image), whole(image)) <= ROUNDING
    smaller = picture(PictureExtent(extent.height // 2, extent.width // 2))
    assert relative_error(partial(smaller), whole(smaller)) <= ROUNDING


def test_whole_windows_are_left_out_and_only_up_to_the_first_global_block(count_cells):
    partial = encoder(extent=extent_of_aspect(16, 9, GEOMETRY))  # 36 of 64 pixels: 9 of 16 cells
    cells = count_cells(partial)
    partial(torch.zeros(1, 3, 64, 64))
    assert cells == [(9, 16), (9, 16), (16, 16), (16, 16), (16, 16)]
    between = encoder(extent=PictureExtent(37, 64))  # one row of pixels in a tenth row of cells
    cells.clear()
    count_cells(between)
    between(torch.zeros(1, 3, 64, 64))
    assert cells[:3] == [(12, 16), (12, 16), (16, 16)]


def test_what_lies_beyond_the_extent_is_never_read():
    extent = PictureExtent(24, 64)
    partial, image = encoder(extent=extent), picture(extent)
    dirty = image.clone()
    dirty[:, :, 24:] = math.nan
    assert torch.equal(partial(dirty), partial(image))


@pytest.mark.parametrize("aspect", [(16, 9), (9, 16), (7, 1)])
@pytest.mark.parametrize("form", ["bias", "augmented", "blocked"])
def test_dropped_padding_is_what_an_encoder_of_the_picture_alone_computes(aspect, form):
    extent = extent_of_aspect(*aspect, GEOMETRY, drops_padding=True)
    partial, image = encoder(extent=extent), picture(extent)
    partial.set_attention_form(form)
    rows, columns = -(-extent.height // 4), -(-extent.width // 4)
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
    extent = extent_of_aspect(16, 9, GEOMETRY, drops_padding=True)
    whole, partial, image = encoder(), encoder(extent=extent), picture(extent)
    assert relative_error(partial(image), whole(image)) > 0.01
    cells = count_cells(partial)
    partial(image)
    assert cells == [(9, 16)] * 5


def test_the_weights_of_an_encoder_keep_their_names():
    partial = encoder(extent=extent_of_aspect(16, 9, GEOMETRY))
    assert list(partial.state_dict()) == list(encoder().state_dict())


@pytest.mark.parametrize(
    ("config", "aspect", "drops_padding", "message"),
    [
        (GLOBAL_FIRST, (16, 9), False, "attends globally from its first block on.*drop_padding"),
        (
            DEEP,
            (1, 1),
            False,
            "nothing is saved for pictures at least as high as 1:1.*every window",
        ),
        (DEEP, (64, 63), False, "every window of 16 x 16 cells; accepted: a longer aspect"),
        (DEEP, (64, 63), True, "every cell of 16 x 16 cells; accepted: a longer aspect, or none"),
    ],
)
def test_an_aspect_that_saves_nothing_is_refused(config, aspect, drops_padding, message):
    extent = extent_of_aspect(*aspect, GEOMETRY, drops_padding=drops_padding)
    with pytest.raises(ValueError, match=message):
        encoder(config, extent)
