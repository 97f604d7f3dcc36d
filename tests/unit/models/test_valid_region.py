"""Image encoder with a valid region: exact, or with dropped padding."""

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
"""16 x 16 cells in windows of 3; two blocks before the first global one."""

GLOBAL_FIRST = SamConfig(
    encoder_embed_dim=24,
    encoder_depth=2,
    encoder_num_heads=2,
    encoder_global_attn_indexes=(0, 1),
    decoder_num_heads=2,
    geometry=GEOMETRY,
)

ROUNDING = 2e-6
"""Relative error: smaller matrix products may sum float32 in another order."""


def encoder(config=DEEP, valid_region=None):
    torch.manual_seed(0)
    model = SamImageEncoder(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    if valid_region is not None:
        model.set_valid_region(valid_region)
    return model.requires_grad_(False).eval()


def draw_image(valid_region, batch=2):
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
    """Record the grid size of each block's input."""
    counts = []

    def count(model):
        for block in model.blocks:
            block.register_forward_pre_hook(lambda _, inputs: counts.append(inputs[0].shape[1:3]))
        return counts

    return count


@pytest.mark.parametrize("aspect_ratio", [(16, 9), (9, 16), (4, 3), (7, 1), (1, 3)])
def test_valid_region_precomputed_padding_equals_whole_encoder(aspect_ratio):
    valid_region = DEEP.valid_region(aspect_ratio)
    whole, partial = encoder(), encoder(valid_region=valid_region)
    image = draw_image(valid_region)
    assert relative_error(partial(image), whole(image)) <= ROUNDING
    smaller = draw_image(ValidRegion((1, 1), valid_region.height // 2, valid_region.width // 2))
    assert relative_error(partial(smaller), whole(smaller)) <= ROUNDING


def test_valid_region_skips_whole_windows_before_first_global_block(count_cells):
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


def test_valid_region_pixels_outside_are_never_read():
    valid_region = DEEP.valid_region((64, 24))
    partial, image = encoder(valid_region=valid_region), draw_image(valid_region)
    dirty = image.clone()
    assert valid_region.height == 24
    dirty[:, :, 24:] = math.nan
    assert torch.equal(partial(dirty), partial(image))


@pytest.mark.parametrize("aspect_ratio", [(16, 9), (9, 16), (7, 1)])
def test_dropped_padding_equals_encoder_of_image_alone(aspect_ratio):
    valid_region = DEEP.valid_region(aspect_ratio, drops_padding=True)
    partial, image = encoder(valid_region=valid_region), draw_image(valid_region)
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


def test_dropped_padding_changes_embedding_and_computes_no_padding(count_cells):
    valid_region = DEEP.valid_region((16, 9), drops_padding=True)
    whole, partial, image = encoder(), encoder(valid_region=valid_region), draw_image(valid_region)
    assert relative_error(partial(image), whole(image)) > 0.01
    cells = count_cells(partial)
    partial(image)
    assert cells == [(9, 16)] * 5


def test_valid_region_keeps_weight_names():
    partial = encoder(valid_region=DEEP.valid_region((16, 9)))
    assert list(partial.state_dict()) == list(encoder().state_dict())


def test_valid_region_none_restores_encoder():
    partial, whole = (
        encoder(valid_region=DEEP.valid_region((16, 9), drops_padding=True)),
        encoder(),
    )
    partial.set_valid_region(DEEP.valid_region((9, 16), drops_padding=True))
    image = draw_image(DEEP.valid_region((9, 16)))
    again = encoder(valid_region=DEEP.valid_region((9, 16), drops_padding=True))
    assert torch.equal(partial(image), again(image))
    partial.set_valid_region(None)
    assert torch.equal(partial(image), whole(image))


@pytest.mark.parametrize(
    ("config", "aspect_ratio", "drops_padding", "message"),
    [
        (
            GLOBAL_FIRST,
            (16, 9),
            False,
            "attends globally from its first block on.*drop_padding",
        ),
        (DEEP, (1, 1), False, "1:1 saves nothing: .* every attention window.*or drop_padding"),
        (DEEP, (64, 63), False, "every attention window of the square; accepted: a more elongated"),
        (DEEP, (64, 63), True, "every cell of the square; accepted: .* aspect ratio, or none"),
    ],
)
def test_valid_region_that_saves_nothing_is_refused(config, aspect_ratio, drops_padding, message):
    with pytest.raises(ValueError, match=message):
        config.valid_region(aspect_ratio, drops_padding=drops_padding)


def test_num_local_blocks_windows_as_large_as_grid_are_global():
    assert msgspec.structs.replace(DEEP, window_size=16).num_local_blocks == 0
    assert msgspec.structs.replace(DEEP, encoder_global_attn_indexes=()).num_local_blocks == 5
    assert DEEP.num_local_blocks == 2
