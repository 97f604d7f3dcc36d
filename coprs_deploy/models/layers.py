"""Layers shared by all parts of SAM, under segment-anything's parameter names."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LayerNorm2d(nn.Module):
    """Normalize over the channels of a (B, C, H, W) tensor.

    Computed as a layer normalization in channels-last order, so that it is exported as one
    ``LayerNormalization`` node, which stays float32 in lower precisions.
    """

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized tensor, (B, C, H, W)."""
        last = x.permute(0, 2, 3, 1)
        last = F.layer_norm(last, (last.shape[-1],), self.weight, self.bias, self.eps)
        return last.permute(0, 3, 1, 2)


class TwoLayerMlp(nn.Module):
    """Linear, activation, linear; input and output have the same width."""

    def __init__(self, width: int, hidden: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.lin1 = nn.Linear(width, hidden)
        self.lin2 = nn.Linear(hidden, width)
        self.act = activation()

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., width) to (..., width)."""
        return self.lin2(self.act(self.lin1(x)))
