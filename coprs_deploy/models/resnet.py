"""NanoSAM's image encoder: a ResNet of basic blocks, and convolutions at twice its resolution.

Equivalent to the public ``TimmImageEncoder`` with timm's ResNet-18, with the same parameter names.
It was trained on images resized to the square, without padding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coprs_deploy.encoder_config import ResNetConfig
from coprs_deploy.model_config import SamConfig
from coprs_deploy.models.layers import BatchNorm2d
from coprs_deploy.models.light_encoder import LightEncoder


class BasicBlock(nn.Module):
    """Two convolutions and a shortcut, which is projected where the size changes."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.bn1 = BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.bn2 = BatchNorm2d(after)
        self.downsample: nn.Module | None = None
        if stride > 1 or before != after:
            self.downsample = nn.Sequential(
                nn.Conv2d(before, after, 1, stride, bias=False), BatchNorm2d(after)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H', W')."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(x + shortcut)


class ResNet(nn.Module):
    """ResNet without its classifier."""

    def __init__(self, sizes: ResNetConfig) -> None:
        super().__init__()
        before = sizes.widths[0]
        self.conv1 = nn.Conv2d(3, before, 7, stride=2, padding=3, bias=False)
        self.bn1 = BatchNorm2d(before)
        self.num_stages = len(sizes.widths)
        for number, (width, depth) in enumerate(zip(sizes.widths, sizes.depths, strict=True)):
            first = BasicBlock(before, width, 1 if number == 0 else 2)
            others = [BasicBlock(width, width, 1) for _ in range(depth - 1)]
            self.add_module(f"layer{number + 1}", nn.Sequential(first, *others))
            before = width

    def forward(self, image: Tensor) -> Tensor:
        """Map (B, 3, H, W) to (B, C, H / 32, W / 32) for four stages."""
        x = F.relu(self.bn1(self.conv1(image)))
        x = F.max_pool2d(x, kernel_size=3, stride=2, padding=1)
        for number in range(self.num_stages):
            x = self.get_submodule(f"layer{number + 1}")(x)
        return x


class ResNetEncoder(LightEncoder):
    """ResNet, a neck at twice its resolution, and a learned position for each cell."""

    def __init__(self, config: SamConfig) -> None:
        super().__init__(config)
        sizes = config.image_encoder
        assert isinstance(sizes, ResNetConfig)
        width, grid = sizes.neck_channels, config.geometry.grid_size
        channels = config.geometry.out_chans
        self.backbone = ResNet(sizes)
        self.up_1 = nn.Sequential(
            nn.Conv2d(sizes.widths[-1], width, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GELU(),
            nn.ConvTranspose2d(width, width, 3, stride=2, padding=1, output_padding=1),
            nn.GELU(),
        )
        self.proj = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.GELU(), nn.Conv2d(width, channels, 1)
        )
        self.pos_embedding = nn.Parameter(torch.zeros(1, channels, grid, grid))

    def embed(self, image: Tensor) -> Tensor:
        """Map (B, 3, H, W) pixels to the (B, C, R, K) embedding of their cells."""
        x = self.proj(self.up_1(self.backbone(image)))
        return x + self.pos_embedding[:, :, : x.shape[2], : x.shape[3]]
