"""TinyViT image encoder of MobileSAM and TinySAM: convolutions, then attention in windows.

Equivalent to the public implementation (MobileSAM, ``tiny_vit_sam.py``), with the same parameter
names, but without its classifier, written for static export and for any rectangle of pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coprs_deploy.encoder_config import TinyVitConfig
from coprs_deploy.model_config import SamConfig
from coprs_deploy.models.layers import BatchNorm2d, LayerNorm2d
from coprs_deploy.models.light_encoder import LightEncoder


class ConvNorm(nn.Module):
    """Convolution without bias, and batch normalization."""

    def __init__(
        self, before: int, after: int, kernel: int, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__()
        self.c = nn.Conv2d(
            before, after, kernel, stride, padding=kernel // 2, groups=groups, bias=False
        )
        self.bn = BatchNorm2d(after)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H', W')."""
        return self.bn(self.c(x))


class PatchEmbedding(nn.Module):
    """Two strided convolutions: a quarter of the resolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.seq = nn.Sequential(
            ConvNorm(3, width // 2, 3, stride=2),
            nn.GELU(),
            ConvNorm(width // 2, width, 3, stride=2),
        )

    def forward(self, image: Tensor) -> Tensor:
        """Map (B, 3, H, W) to (B, C, H / 4, W / 4)."""
        return self.seq(image)


class MBConv(nn.Module):
    """Inverted residual block of the first stage."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(width, hidden, 1)
        self.conv2 = ConvNorm(hidden, hidden, 3, groups=hidden)
        self.conv3 = ConvNorm(hidden, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H, W)."""
        hidden = F.gelu(self.conv2(F.gelu(self.conv1(x))))
        return F.gelu(self.conv3(hidden) + x)


class PatchMerging(nn.Module):
    """Change of width between two stages, with half the resolution unless it is the last."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(before, after, 1)
        self.conv2 = ConvNorm(after, after, 3, stride=stride, groups=after)
        self.conv3 = ConvNorm(after, after, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H', W')."""
        return self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(x)))))


class WindowAttention(nn.Module):
    """Multi-head self-attention in square windows, with a bias for each distance."""

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.window = window
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.attention_biases = nn.Parameter(torch.zeros(heads, window * window))

    def forward(self, x: Tensor) -> Tensor:
        """Attend within the windows of (B, R, K, C) cells; the last ones may be partly padding.

        The public code pads with zeros before the norm, for which ``qkv`` returns one vector. It is
        written directly, and the padding is never projected.
        """
        window, rows, columns = self.window, x.shape[1], x.shape[2]
        down, across = -(-rows // window), -(-columns // window)
        qkv = self._pad(self.qkv(self.norm(x)), down * window - rows, across * window - columns)
        batch, channels = qkv.shape[0], qkv.shape[-1]
        qkv = qkv.reshape(batch, down, window, across, window, channels)
        qkv = qkv.permute(0, 1, 3, 2, 4, 5)
        x = self._attend(qkv.reshape(batch * down * across, window * window, channels))
        x = x.reshape(batch, down, across, window, window, -1).permute(0, 1, 3, 2, 4, 5)
        x = x.reshape(batch, down * window, across * window, -1)
        return self.proj(x[:, :rows, :columns])

    def _attend(self, qkv: Tensor) -> Tensor:
        """Map (windows, tokens, 3 C), of which each head has query, key and value, to (..., C)."""
        tokens = qkv.shape[1]
        qkv = qkv.reshape(-1, tokens, self.heads, 3, qkv.shape[-1] // (3 * self.heads))
        query, key, value = qkv.permute(3, 0, 2, 1, 4).unbind(0)  # (windows, heads, tokens, width)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=self._bias()[None])
        return out.transpose(1, 2).reshape(-1, tokens, self.heads * out.shape[-1])

    def _bias(self) -> Tensor:
        """Index the biases by the distance of two cells: (heads, tokens, tokens)."""
        index = torch.arange(self.window, device=self.attention_biases.device)
        distance = (index[:, None] - index[None, :]).abs()
        offset = distance[:, None, :, None] * self.window + distance[None, :, None, :]
        tokens = self.window**2
        return self.attention_biases[:, offset.reshape(tokens, tokens)]

    def _pad(self, qkv: Tensor, below: int, right: int) -> Tensor:
        """Append rows and columns of what a zero token gives to a (B, R, K, 3 C) grid."""
        if not below and not right:
            return qkv
        batch, rows, columns, channels = qkv.shape
        blank = self.qkv.weight @ self.norm.bias + self.qkv.bias
        if right:
            qkv = torch.cat([qkv, blank.expand(batch, rows, right, channels)], dim=2)
        if below:
            qkv = torch.cat([qkv, blank.expand(batch, below, columns + right, channels)], dim=1)
        return qkv


class NormedMlp(nn.Module):
    """Normalization, linear, GELU, linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., C) to (..., C)."""
        return self.fc2(F.gelu(self.fc1(self.norm(x))))


class TinyVitBlock(nn.Module):
    """Attention in windows, a depthwise convolution, and an MLP."""

    def __init__(self, width: int, heads: int, window: int, hidden: int) -> None:
        super().__init__()
        self.attn = WindowAttention(width, heads, window)
        self.mlp = NormedMlp(width, hidden)
        self.local_conv = ConvNorm(width, width, 3, groups=width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, R, K) to (B, C, R, K)."""
        x = x.permute(0, 2, 3, 1)
        x = x + self.attn(x)
        x = self.local_conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = x + self.mlp(x)
        return x.permute(0, 3, 1, 2)


class Stage(nn.Module):
    """Blocks of one width, and the change to the next; ``downsample`` is None for the last."""

    def __init__(self, blocks: list[nn.Module], downsample: PatchMerging | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H', W')."""
        for block in self.blocks:
            x = block(x)
        return x if self.downsample is None else self.downsample(x)


class TinyVitEncoder(LightEncoder):
    """TinyViT and SAM's neck."""

    def __init__(self, config: SamConfig) -> None:
        super().__init__(config)
        sizes = config.image_encoder
        assert isinstance(sizes, TinyVitConfig)
        widths, channels = sizes.embed_dims, config.geometry.out_chans
        self.patch_embed = PatchEmbedding(widths[0])
        self.layers = nn.ModuleList(self._stage(sizes, number) for number in range(len(widths)))
        self.neck = nn.Sequential(
            nn.Conv2d(widths[-1], channels, kernel_size=1, bias=False),
            LayerNorm2d(channels),
            nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False),
            LayerNorm2d(channels),
        )

    @staticmethod
    def _stage(sizes: TinyVitConfig, number: int) -> Stage:
        widths, width, last = sizes.embed_dims, sizes.embed_dims[number], len(sizes.embed_dims) - 1
        if number == 0:
            hidden = int(width * sizes.mbconv_expand_ratio)
            blocks: list[nn.Module] = [MBConv(width, hidden) for _ in range(sizes.depths[0])]
        else:
            heads, window = sizes.num_heads[number], sizes.window_sizes[number]
            hidden = int(width * sizes.mlp_ratio)
            blocks = [
                TinyVitBlock(width, heads, window, hidden) for _ in range(sizes.depths[number])
            ]
        if number == last:
            return Stage(blocks, None)
        stride = 1 if number + 1 == last else 2
        return Stage(blocks, PatchMerging(width, widths[number + 1], stride))

    def embed(self, image: Tensor) -> Tensor:
        """Map (B, 3, H, W) pixels to the (B, C, R, K) embedding of their cells."""
        x = self.patch_embed(image)
        for stage in self.layers:
            x = stage(x)
        return self.neck(x)
