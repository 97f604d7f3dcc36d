"""Positional prior against equation 2 of the paper in plain loops."""

import math

import pytest
import torch

from coprs_deploy.model_config import SamConfig, SegmentationConfig
from coprs_deploy.models.prior import PositionalPrior
from coprs_deploy.specs import Geometry

CONFIG = SegmentationConfig(
    policy_hidden_size=5,
    prior_num_heads=2,
    sam=SamConfig(decoder_num_heads=2, geometry=Geometry(image_size=12, patch_size=4, out_chans=8)),
)
"""3 x 3 cells, 8 channels in 2 heads: small enough to compute term by term."""


def drawn_prior(config=CONFIG):
    torch.manual_seed(0)
    return PositionalPrior(config).requires_grad_(False)


def inputs(targets=1, config=CONFIG, images=1):
    generator = torch.Generator().manual_seed(1)
    geometry = config.geometry
    shape = (images, geometry.out_chans, geometry.grid_size, geometry.grid_size)
    embedding = torch.randn(shape, generator=generator)
    return embedding, torch.randn(targets, config.policy_hidden_size, generator=generator)


def convolve(maps, weight, bias):
    """3 x 3 convolution with zeros around, term by term."""
    outputs, channels = len(weight), len(maps)
    side = len(maps[0])
    result = [[[0.0] * side for _ in range(side)] for _ in range(outputs)]
    for o in range(outputs):
        for y in range(side):
            for x in range(side):
                total = bias[o]
                for c in range(channels):
                    for dy in (-1, 0, 1):
                        for dx in (-1, 0, 1):
                            if 0 <= y + dy < side and 0 <= x + dx < side:
                                kernel = weight[o][c][dy + 1][dx + 1]
                                total += kernel * maps[c][y + dy][x + dx]
                result[o][y][x] = total
    return result


def enlarge(map_, factor):
    """Bilinear with half-pixel centers, clamped at the edges."""
    side = len(map_)

    def taps(i):
        position = max((i + 0.5) / factor - 0.5, 0.0)
        low = int(position)
        return low, min(low + 1, side - 1), position - low

    result = []
    for i in range(side * factor):
        y0, y1, v = taps(i)
        row = []
        for j in range(side * factor):
            x0, x1, u = taps(j)
            top = map_[y0][x0] * (1 - u) + map_[y0][x1] * u
            bottom = map_[y1][x0] * (1 - u) + map_[y1][x1] * u
            row.append(top * (1 - v) + bottom * v)
        result.append(row)
    return result


def prior_by_hand(prior, embedding, concentration):
    """Equation 2: per head <q, k(u, v)> / sqrt(d_h), then conv, SiLU, conv, upsampling."""
    channels, side, heads = 8, 3, 2
    head_width = channels // heads
    w_q, w_k = prior.q_proj.weight.tolist(), prior.k_proj.weight[:, :, 0, 0].tolist()
    e, image = concentration.tolist(), embedding.tolist()
    q = [sum(w_q[c][d] * e[d] for d in range(5)) for c in range(channels)]
    k = [
        [
            [sum(w_k[c][i] * image[i][y][x] for i in range(channels)) for x in range(side)]
            for y in range(side)
        ]
        for c in range(channels)
    ]
    scores = [
        [
            [
                sum(q[c] * k[c][y][x] for c in range(h * head_width, (h + 1) * head_width))
                / math.sqrt(head_width)
                for x in range(side)
            ]
            for y in range(side)
        ]
        for h in range(heads)
    ]
    first, last = prior.fuser[0], prior.fuser[2]
    hidden = convolve(scores, first.weight.tolist(), first.bias.tolist())
    hidden = [[[v / (1 + math.exp(-v)) for v in row] for row in map_] for map_ in hidden]
    fused = convolve(hidden, last.weight.tolist(), last.bias.tolist())
    return torch.tensor(enlarge(fused[0], 4), dtype=torch.float64)


def test_prior_equals_equation_2_in_plain_loops():
    prior = drawn_prior().double()
    embedding, concentration = (tensor.double() for tensor in inputs())
    expected = prior_by_hand(prior, embedding[0], concentration[0])
    assert expected.std() > 1e-3
    # Double precision on both sides: only the order of the sums differs.
    torch.testing.assert_close(
        prior(embedding, concentration), expected[None, None], rtol=1e-12, atol=1e-12
    )


def test_prior_many_concentrations_equal_single_calls():
    prior = drawn_prior()
    embedding, concentrations = inputs(targets=5)
    together = prior(embedding, concentrations)
    assert together.shape == (5, 1, 12, 12)
    for n in range(5):
        alone = prior(embedding, concentrations[n : n + 1])
        # Convolutions of another batch size may sum in another order.
        torch.testing.assert_close(together[n : n + 1], alone, rtol=1e-5, atol=1e-6)
    assert (together[0] - together[1]).abs().max() > 1e-2


def test_prior_one_image_per_concentration_pairs_in_order():
    prior = drawn_prior()
    embeddings, concentrations = inputs(targets=3, images=3)
    together = prior(embeddings, concentrations)
    for n in range(3):
        alone = prior(embeddings[n : n + 1], concentrations[n : n + 1])
        torch.testing.assert_close(together[n : n + 1], alone, rtol=1e-5, atol=1e-6)  # as above


def test_prior_zero_concentration_is_constant_inside():
    config = SegmentationConfig(policy_hidden_size=5, prior_num_heads=2)
    prior = drawn_prior(config)
    embedding, concentration = inputs(config=config)
    inner = prior(embedding, torch.zeros_like(concentration))[0, 0, 16:-16, 16:-16]
    # Every score is 0, so every cell is the same sum, but for the rounding of the interpolation.
    assert float(inner.std()) < 1e-5


def test_prior_untrained_predicts_background():
    prior = PositionalPrior(CONFIG)
    assert prior.fuser[2].bias.tolist() == pytest.approx([-1.8])


def test_prior_parameters_equal_public_head():
    shapes = {
        name: tuple(tensor.shape)
        for name, tensor in PositionalPrior(SegmentationConfig(policy_hidden_size=3584))
        .state_dict()
        .items()
    }
    assert shapes == {
        "q_proj.weight": (256, 3584),
        "k_proj.weight": (256, 256, 1, 1),
        "fuser.0.weight": (4, 4, 3, 3),
        "fuser.0.bias": (4,),
        "fuser.2.weight": (1, 4, 3, 3),
        "fuser.2.bias": (1,),
    }
