"""Layers shared by image encoders and mask decoder, under the public parameter names."""

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


class BatchNorm2d(nn.Module):
    """Batch normalization of a (B, C, H, W) tensor, without PyTorch's counter of batches."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized tensor, (B, C, H, W)."""
        statistics = (self.running_mean, self.running_var)
        return F.batch_norm(
            x, *statistics, self.weight, self.bias, training=self.training, eps=self.eps
        )


def fold_batch_norms(module: nn.Module) -> None:
    """Fold each batch normalization into the convolution before it, in place.

    Rounding to half precision then meets one weight instead of five, and a quantized convolution
    includes its normalization. The convolutions keep their names.
    """
    for parent in module.modules():
        before: nn.Module | None = None
        for name, child in list(parent.named_children()):
            if isinstance(child, BatchNorm2d):
                assert isinstance(before, nn.Conv2d), f"{name} follows no convolution"
                _fold(before, child)
                setattr(parent, name, nn.Identity())
            before = child


def _fold(convolution: nn.Conv2d, norm: BatchNorm2d) -> None:
    with torch.no_grad():
        scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        shift = norm.bias.double() - norm.running_mean.double() * scale
        if convolution.bias is not None:
            shift = shift + convolution.bias.double() * scale
        weight = convolution.weight.double() * scale[:, None, None, None]
        dtype = convolution.weight.dtype
        convolution.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
        convolution.bias = nn.Parameter(shift.to(dtype), requires_grad=False)


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
