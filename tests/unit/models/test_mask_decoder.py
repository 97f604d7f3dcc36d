"""Prompt encoder and mask decoder; test_segment_anything_peer compares them with SAM."""

import math

import pytest
import torch

from coprs_deploy.model_config import SAM_SIZES
from coprs_deploy.models.mask_decoder import MaskDecoder, PromptEncoder, RandomPositionEncoding

TINY = SAM_SIZES["tiny"]
BATCHED = 1e-5
"""Relative error: batched float32 products may sum in another order than single ones."""


@pytest.fixture(scope="module")
def decoder():
    torch.manual_seed(0)
    return MaskDecoder(TINY).requires_grad_(False).eval()


def decoder_inputs(targets):
    generator = torch.Generator().manual_seed(1)
    channels, grid = TINY.geometry.out_chans, TINY.geometry.grid_size
    shape = (channels, grid, grid)
    image, positions = (torch.randn(1, *shape, generator=generator) for _ in range(2))
    return image, positions, torch.randn(targets, *shape, generator=generator)


def relative_error(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


def test_mask_decoder_many_prompts_equal_single_calls(decoder):
    image, positions, dense = decoder_inputs(targets=4)
    together = decoder(image, positions, dense)
    assert together.shape == (4, 1, 64, 64)
    for n in range(4):
        alone = decoder(image, positions, dense[n : n + 1])
        assert relative_error(together[n : n + 1], alone) < BATCHED
    assert relative_error(together[0], together[1]) > 0.01


def test_mask_decoder_returns_first_mask(decoder):
    inputs = decoder_inputs(targets=1)
    before = decoder(*inputs)
    heads = [mlp.layers[-1].bias for mlp in decoder.output_hypernetworks_mlps]
    try:
        for bias in heads[1:]:
            bias.add_(1)
        assert torch.equal(decoder(*inputs), before)
        heads[0].add_(1)
        assert relative_error(decoder(*inputs), before) > 0.01
    finally:
        for bias in heads:
            bias.sub_(1)


@pytest.mark.parametrize("part", ["iou_token", "mask_tokens"])
def test_mask_decoder_unused_tokens_take_part_in_attention(decoder, part):
    inputs = decoder_inputs(targets=1)
    before = decoder(*inputs)
    table = getattr(decoder, part).weight
    kept = table.clone()
    try:
        table[-1] += 3
        assert relative_error(decoder(*inputs), before) > 1e-4
    finally:
        table.copy_(kept)


def test_position_encoding_equals_sines_and_cosines_of_projected_centers():
    torch.manual_seed(0)
    encoding = RandomPositionEncoding(4).double()
    matrix = encoding.positional_encoding_gaussian_matrix
    found = encoding(3)
    assert found.shape == (1, 8, 3, 3)
    for row in range(3):
        for column in range(3):
            x, y = 2 * (column + 0.5) / 3 - 1, 2 * (row + 0.5) / 3 - 1
            for feature in range(4):
                angle = 2 * math.pi * float(x * matrix[0, feature] + y * matrix[1, feature])
                assert float(found[0, feature, row, column]) == pytest.approx(math.sin(angle))
                assert float(found[0, 4 + feature, row, column]) == pytest.approx(math.cos(angle))


def test_prompt_encoder_downscales_mask_to_grid():
    torch.manual_seed(0)
    encoder = PromptEncoder(TINY)
    assert encoder(torch.zeros(3, 1, 64, 64)).shape == (3, 64, 16, 16)
    assert encoder.image_positions().shape == (1, 64, 16, 16)


def test_prompt_encoder_cell_affects_only_its_embedding_cell():
    torch.manual_seed(0)
    encoder = PromptEncoder(TINY).requires_grad_(False)
    prompt = torch.zeros(1, 1, 64, 64)
    before = encoder(prompt)
    prompt[0, 0, 4 * 5 + 3, 4 * 9] = 10.0
    changed = (encoder(prompt) - before).abs().amax(dim=1)[0] > 1e-6
    assert changed.nonzero().tolist() == [[5, 9]]
