"""EfficientViT-SAM image encoder: convolutions and linear attention at two scales.

Equivalent to the public implementation (efficientvit, ``EfficientViTSamImageEncoder``), with the
same parameter names, written for static export and for any rectangle of pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coprs_deploy.encoder_config import EfficientVitConfig
from coprs_deploy.model_config import SamConfig
from coprs_deploy.models.layers import BatchNorm2d, LayerNorm2d
from coprs_deploy.models.light_encoder import LightEncoder

NORM_EPS = 1e-6
"""Of all its norms: the public model zoo sets it after construction."""

ATTENTION_EPS = 1e-15


class ConvLayer(nn.Module):
    """Convolution with a bias or a batch normalization, and a GELU unless it ends a block."""

    def __init__(
        self,
        before: int,
        after: int,
        kernel: int = 1,
        stride: int = 1,
        *,
        groups: int = 1,
        has_norm: bool = True,
        has_bias: bool = False,
        is_last: bool = False,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            before, after, kernel, stride, padding=kernel // 2, groups=groups, bias=has_bias
        )
        self.norm = BatchNorm2d(after, NORM_EPS) if has_norm else None
        self.is_last = is_last

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H', W')."""
        x = self.conv(x)
        if self.norm is not None:
            x = self.norm(x)
        return x if self.is_last else F.gelu(x, approximate="tanh")


class ResBlock(nn.Module):
    """Two convolutions."""

    def __init__(
        self, before: int, after: int, stride: int, expand: float, fewer_norm: bool
    ) -> None:
        super().__init__()
        hidden, first = round(before * expand), {"has_norm": not fewer_norm, "has_bias": fewer_norm}
        self.conv1 = ConvLayer(before, hidden, 3, stride, **first)
        self.conv2 = ConvLayer(hidden, after, 3, is_last=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H', W')."""
        return self.conv2(self.conv1(x))


class FusedMBConv(nn.Module):
    """Spatial and pointwise convolution."""

    def __init__(
        self, before: int, after: int, stride: int, expand: float, fewer_norm: bool
    ) -> None:
        super().__init__()
        hidden, first = round(before * expand), {"has_norm": not fewer_norm, "has_bias": fewer_norm}
        self.spatial_conv = ConvLayer(before, hidden, 3, stride, **first)
        self.point_conv = ConvLayer(hidden, after, is_last=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H', W')."""
        return self.point_conv(self.spatial_conv(x))


class MBConv(nn.Module):
    """Pointwise, depthwise and pointwise convolution."""

    def __init__(
        self, before: int, after: int, stride: int, expand: float, fewer_norm: bool
    ) -> None:
        super().__init__()
        hidden, first = round(before * expand), {"has_norm": not fewer_norm, "has_bias": fewer_norm}
        self.inverted_conv = ConvLayer(before, hidden, **first)
        self.depth_conv = ConvLayer(hidden, hidden, 3, stride, groups=hidden, **first)
        self.point_conv = ConvLayer(hidden, after, is_last=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H', W')."""
        return self.point_conv(self.depth_conv(self.inverted_conv(x)))


_BLOCKS: dict[str, type[ResBlock | FusedMBConv | MBConv]] = {
    "res": ResBlock,
    "fmb": FusedMBConv,
    "mb": MBConv,
}


class LinearAttention(nn.Module):
    """Attention whose scores are products of ReLUs: keys and values are summed before queries.

    The sums run over all cells, so that it stays float32 in lower precisions, as in public code.
    """

    def forward(self, qkv: Tensor, width: int) -> Tensor:
        """Attend over all cells.

        Args:
            qkv: (B, heads * 3 * width, R, K), of which each head has query, key and value.
            width: width of a head.

        Returns:
            (B, heads * width, R, K).
        """
        batch, channels, rows, columns = qkv.shape
        heads = channels // (3 * width)
        qkv = qkv.reshape(batch, heads, 3 * width, rows * columns)
        query, key = F.relu(qkv[:, :, :width]), F.relu(qkv[:, :, width : 2 * width])
        key = key.transpose(2, 3)
        total = key.sum(dim=2, keepdim=True)  # (B, heads, 1, width)
        out = ((qkv[:, :, 2 * width :] @ key) @ query) / (total @ query + ATTENTION_EPS)
        return out.reshape(batch, heads * width, rows, columns)


class MultiScaleAttention(nn.Module):
    """Linear attention on the cells and on a local mean of them (public ``LiteMLA``)."""

    def __init__(self, width: int, head_width: int, kernel: int) -> None:
        super().__init__()
        heads = width // head_width
        inner = heads * head_width
        self.head_width = head_width
        self.qkv = ConvLayer(width, 3 * inner, has_norm=False, is_last=True)
        depthwise = nn.Conv2d(
            3 * inner, 3 * inner, kernel, padding=kernel // 2, groups=3 * inner, bias=False
        )
        pointwise = nn.Conv2d(3 * inner, 3 * inner, 1, groups=3 * heads, bias=False)
        self.aggreg = nn.ModuleList([nn.Sequential(depthwise, pointwise)])
        self.linear_attention = LinearAttention()
        self.proj = ConvLayer(2 * inner, width, is_last=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, R, K) to (B, C, R, K)."""
        qkv = self.qkv(x)
        scales = torch.cat([qkv, self.aggreg[0](qkv)], dim=1)
        return self.proj(self.linear_attention(scales, self.head_width))


class Residual(nn.Module):
    """A block, with a shortcut unless it changes the size."""

    def __init__(self, main: nn.Module, has_shortcut: bool = True) -> None:
        super().__init__()
        self.main = main
        self.has_shortcut = has_shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H', W')."""
        return self.main(x) + x if self.has_shortcut else self.main(x)


class EfficientVitBlock(nn.Module):
    """Linear attention, and an inverted residual block."""

    def __init__(self, width: int, head_width: int, kernel: int, expand: float) -> None:
        super().__init__()
        self.context_module = Residual(MultiScaleAttention(width, head_width, kernel))
        self.local_module = Residual(MBConv(width, width, 1, expand, fewer_norm=True))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, R, K) to (B, C, R, K)."""
        return self.local_module(self.context_module(x))


class OpSequential(nn.Module):
    """Modules one after the other."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.op_list = nn.ModuleList(modules)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H', W')."""
        for module in self.op_list:
            x = module(x)
        return x


class Backbone(nn.Module):
    """Stages, each at half the resolution of the one before it."""

    def __init__(self, sizes: EfficientVitConfig) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            self._stage(sizes, number) for number in range(len(sizes.width_list))
        )

    @staticmethod
    def _stage(sizes: EfficientVitConfig, number: int) -> OpSequential:
        width, kind = sizes.width_list[number], sizes.block_list[number]
        expand, fewer_norm = sizes.expand_list[number], sizes.fewer_norm_list[number]
        if number == 0:
            first: nn.Module = ConvLayer(3, width, 3, stride=2)
        else:
            # The public code widens four times more where it halves the resolution.
            block = _BLOCKS["fmb" if kind == "fmb" else "mb"]
            before = sizes.width_list[number - 1]
            first = Residual(block(before, width, 2, 4 * expand, fewer_norm), has_shortcut=False)
        if kind.startswith("att"):
            kernel = int(kind[-1])
            others: list[nn.Module] = [
                EfficientVitBlock(width, sizes.qkv_dim, kernel, expand)
                for _ in range(sizes.depth_list[number])
            ]
        else:
            others = [
                Residual(_BLOCKS[kind](width, width, 1, expand, fewer_norm))
                for _ in range(sizes.depth_list[number])
            ]
        return OpSequential(first, *others)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Return the output of the last three stages, the finest first."""
        outputs, x = list[Tensor](), image
        for stage in self.stages:
            x = stage(x)
            outputs.append(x)
        return outputs[-3:]


class Neck(nn.Module):
    """Sum of the last three stages at the resolution of the finest, and blocks on it."""

    def __init__(self, sizes: EfficientVitConfig, channels: int) -> None:
        super().__init__()
        width = sizes.head_width
        self.input_ops = nn.ModuleList(
            OpSequential(ConvLayer(before, width, is_last=True))
            for before in reversed(sizes.width_list[-3:])  # the coarsest first, as in public code
        )
        self.middle = OpSequential(
            *(
                Residual(FusedMBConv(width, width, 1, sizes.head_expand, fewer_norm=False))
                for _ in range(sizes.head_depth)
            )
        )
        last = ConvLayer(width, channels, has_norm=False, has_bias=True, is_last=True)
        self.output_ops = nn.ModuleList([OpSequential(last)])

    def forward(self, stages: list[Tensor]) -> Tensor:
        """Map the outputs of three stages, the finest first, to (B, C, R, K)."""
        finest, middle, coarsest = stages
        size = finest.shape[-2:]
        x = self._resize(self.input_ops[0](coarsest), size)
        x = x + self._resize(self.input_ops[1](middle), size) + self.input_ops[2](finest)
        return self.output_ops[0](self.middle(x))

    @staticmethod
    def _resize(x: Tensor, size: torch.Size) -> Tensor:
        return F.interpolate(x, size=size, mode="bicubic", align_corners=False)


class EfficientVitEncoder(LightEncoder):
    """EfficientViT, its neck and a normalization."""

    def __init__(self, config: SamConfig) -> None:
        super().__init__(config)
        sizes = config.image_encoder
        assert isinstance(sizes, EfficientVitConfig)
        channels = config.geometry.out_chans
        self.backbone = Backbone(sizes)
        self.neck = Neck(sizes, channels)
        self.norm = LayerNorm2d(channels, NORM_EPS)

    def embed(self, image: Tensor) -> Tensor:
        """Map (B, 3, H, W) pixels to the (B, C, R, K) embedding of their cells."""
        return self.norm(self.neck(self.backbone(image)))
