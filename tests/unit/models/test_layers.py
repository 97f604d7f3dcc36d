"""Shared layers against their formulas."""

import pytest
import torch
from torch import nn

from coprs_deploy.models.layers import LayerNorm2d, TwoLayerMlp


@pytest.mark.parametrize("shape", [(1, 8, 1, 1), (2, 3, 5, 7), (1, 64, 16, 16)])
def test_layer_norm_2d_equals_formula_over_channels(shape):
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(shape, generator=generator, dtype=torch.float64) + 5
    norm = LayerNorm2d(shape[1]).double()
    nn.init.normal_(norm.weight, generator=generator)
    nn.init.normal_(norm.bias, generator=generator)

    mean = x.mean(dim=1, keepdim=True)
    variance = ((x - mean) ** 2).mean(dim=1, keepdim=True)
    expected = (x - mean) / (variance + 1e-6).sqrt()
    expected = norm.weight[:, None, None] * expected + norm.bias[:, None, None]

    # Double precision on both sides: only the order of the sums differs.
    torch.testing.assert_close(norm(x), expected, rtol=1e-12, atol=1e-12)


def test_layer_norm_2d_constant_input_stays_finite():
    norm = LayerNorm2d(4)
    assert torch.equal(norm(torch.full((1, 4, 2, 2), 7.0)), torch.zeros(1, 4, 2, 2))


@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU])
def test_two_layer_mlp_equals_linear_activation_linear(activation):
    torch.manual_seed(0)
    mlp = TwoLayerMlp(4, 6, activation).double()
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    inner = activation()(x @ mlp.lin1.weight.T + mlp.lin1.bias)
    expected = inner @ mlp.lin2.weight.T + mlp.lin2.bias
    torch.testing.assert_close(mlp(x), expected, rtol=1e-12, atol=1e-12)  # double, order of sums
