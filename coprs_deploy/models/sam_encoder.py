"""SAM's image encoder: a ViT with windowed attention and decomposed relative positions.

Equivalent to segment-anything's ``ImageEncoderViT``, with the same parameter names, but written for
static export: no shape depends on data, and each attention is one matrix product, one softmax and
one matrix product. Loading weights is left to :mod:`coprs_deploy.checkpoint`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coprs_deploy.model_config import SamConfig
from coprs_deploy.models.layers import LayerNorm2d, TwoLayerMlp
from coprs_deploy.specs import ValidRegion

LAYER_NORM_EPS = 1e-6


class RelativeAttention(nn.Module):
    """Multi-head self-attention over at most G x G cells, optionally with relative positions."""

    def __init__(self, width: int, heads: int, grid: int, use_rel_pos: bool) -> None:
        super().__init__()
        self.heads = heads
        self.grid = grid
        self.head_width = width // heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.use_rel_pos = use_rel_pos
        if use_rel_pos:
            self.rel_pos_h = nn.Parameter(torch.zeros(2 * grid - 1, self.head_width))
            self.rel_pos_w = nn.Parameter(torch.zeros(2 * grid - 1, self.head_width))

    def forward(self, x: Tensor) -> Tensor:
        """Attend within each (B, R, K, C) grid of at most G rows R and columns K; same shape."""
        return self.proj(self.attend(self.qkv(x)))

    def attend(self, qkv: Tensor) -> Tensor:
        """Map the output of ``self.qkv``, (B, R, K, 3 C), to the input of ``self.proj``."""
        batch, rows, columns = qkv.shape[:3]
        tokens = rows * columns
        qkv = qkv.reshape(batch, tokens, 3, self.heads, self.head_width)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, tokens, head_width)
        bias = None
        if self.use_rel_pos:
            by_row, by_column = self._position_scores(query, rows, columns)
            bias = by_row[..., :, None] + by_column[..., None, :]
            bias = bias.reshape(batch, self.heads, tokens, tokens)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return out.transpose(1, 2).reshape(batch, rows, columns, self.heads * self.head_width)

    def _position_scores(self, query: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """Return the position logits by row, (B, heads, tokens, R), and by column, (..., K)."""
        batch, tokens = query.shape[0], rows * columns
        cells = query.reshape(batch * self.heads, rows, columns, self.head_width)
        by_row = cells @ self._distance_table(self.rel_pos_h, rows)
        by_column = cells.transpose(1, 2) @ self._distance_table(self.rel_pos_w, columns)
        return (
            by_row.reshape(batch, self.heads, tokens, rows),
            by_column.transpose(1, 2).reshape(batch, self.heads, tokens, columns),
        )

    def _distance_table(self, relative: Tensor, size: int) -> Tensor:
        """Index the (2 G - 1, head_width) table by query and key: (size, head_width, size)."""
        index = torch.arange(size, device=relative.device)
        distance = index[:, None] - index[None, :] + (self.grid - 1)
        return relative[distance].transpose(1, 2)


class EncoderBlock(nn.Module):
    """Pre-norm transformer block with windowed or global attention."""

    def __init__(self, config: SamConfig, is_global: bool) -> None:
        super().__init__()
        width = config.encoder_embed_dim
        self.grid = config.geometry.grid_size
        self.window = self.grid if is_global else config.window_size
        self.norm1 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.attn = RelativeAttention(
            width, config.encoder_num_heads, self.window, config.use_rel_pos
        )
        self.norm2 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.mlp = TwoLayerMlp(width, int(width * config.mlp_ratio), nn.GELU)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, R, K, C) to (B, R, K, C): the whole grid or its upper left part."""
        x = x + self._attend(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def _attend(self, x: Tensor) -> Tensor:
        """Attend over the whole grid, or within windows.

        SAM pads the last windows with zero tokens after the norm, for which ``qkv`` returns its
        bias. Here the bias is written directly, and the padding is never projected.
        """
        if self.window == self.grid:
            return self.attn(x)
        window, rows, columns = self.window, x.shape[1], x.shape[2]
        down, across = -(-rows // window), -(-columns // window)
        qkv = self._pad(self.attn.qkv(x), down * window - rows, across * window - columns)
        batch, channels = qkv.shape[0], qkv.shape[-1]
        qkv = qkv.reshape(batch, down, window, across, window, channels)
        qkv = qkv.permute(0, 1, 3, 2, 4, 5)
        x = self.attn.attend(qkv.reshape(batch * down * across, window, window, channels))
        x = x.reshape(batch, down, across, window, window, -1).permute(0, 1, 3, 2, 4, 5)
        x = x.reshape(batch, down * window, across * window, -1)
        return self.attn.proj(x[:, :rows, :columns])

    def _pad(self, qkv: Tensor, below: int, right: int) -> Tensor:
        """Append rows and columns of the qkv bias to a (B, R, K, 3 C) grid."""
        batch, rows, columns, channels = qkv.shape
        bias = self.attn.qkv.bias
        if right:
            qkv = torch.cat([qkv, bias.expand(batch, rows, right, channels)], dim=2)
        if below:
            qkv = torch.cat([qkv, bias.expand(batch, below, columns + right, channels)], dim=1)
        return qkv


class PatchEmbedding(nn.Module):
    """Split the image into patches and project each to the encoder's width."""

    def __init__(self, config: SamConfig) -> None:
        super().__init__()
        side = config.geometry.patch_size
        self.proj = nn.Conv2d(3, config.encoder_embed_dim, kernel_size=side, stride=side)

    def forward(self, image: Tensor) -> Tensor:
        """Map (B, 3, S, S) pixels to (B, G, G, C) patches."""
        return self.proj(image).permute(0, 2, 3, 1)


class SamImageEncoder(nn.Module):
    """Image encoder of CoPRS: one embedding of the padded image, shared by all targets.

    Attributes:
        padding_from: index of the block before which the padding cells join the others; None if
            all cells are computed from the first block on. See :meth:`set_valid_region`.
        int8_operators: ONNX operators whose products with a learned weight an int8 export
            quantizes; patch embedding and neck are a hundredth of the work.
    """

    int8_operators = ("MatMul",)
    padding_from: int | None
    padding_below: Tensor
    padding_right: Tensor

    def __init__(self, config: SamConfig) -> None:
        super().__init__()
        grid, channels = config.geometry.grid_size, config.geometry.out_chans
        self.config = config
        self.patch_embed = PatchEmbedding(config)
        self.pos_embed = nn.Parameter(torch.zeros(1, grid, grid, config.encoder_embed_dim))
        self.blocks = nn.ModuleList(
            EncoderBlock(config, is_global=i in config.encoder_global_attn_indexes)
            for i in range(config.encoder_depth)
        )
        self.neck = nn.Sequential(
            nn.Conv2d(config.encoder_embed_dim, channels, kernel_size=1, bias=False),
            LayerNorm2d(channels),
            nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False),
            LayerNorm2d(channels),
        )
        self.padding_from = None

    def set_valid_region(self, valid_region: ValidRegion | None) -> None:
        """Skip the padding that all images of a valid region share.

        Before the first global block, windows of pure padding do not depend on the image: their
        values are computed here, once, on a blank image. With ``drops_padding`` the padding joins
        the other cells only after the last block, and image cells never attend to it. None selects
        the whole square.
        """
        self.padding_from = None
        if valid_region is None:
            return
        joins = len(self.blocks) if valid_region.drops_padding else self.config.num_local_blocks
        size, patch = self.config.geometry.image_size, self.config.geometry.patch_size
        rows, columns = valid_region.height // patch, valid_region.width // patch
        with torch.no_grad():
            blank = self._cells(self.pos_embed.new_zeros(1, 3, size, size))
            for block in self.blocks[:joins]:
                blank = block(blank)
        self.register_buffer("padding_below", blank[:, rows:].clone(), persistent=False)
        self.register_buffer("padding_right", blank[:, :rows, columns:].clone(), persistent=False)
        self.padding_from = joins

    def forward(self, image: Tensor) -> Tensor:
        """Encode padded images.

        Args:
            image: (B, 3, S, S) float, normalized RGB, zero where padded.

        Returns:
            (B, C, G, G) image embeddings.
        """
        x = self._cells(image)
        for number, block in enumerate(self.blocks):
            if number == self.padding_from:
                x = self._with_padding(x)
            x = block(x)
        if self.padding_from == len(self.blocks):
            x = self._with_padding(x)
        return self.neck(x.permute(0, 3, 1, 2))

    def _cells(self, image: Tensor) -> Tensor:
        """Embed the patches of the computed cells, (B, R, K, C)."""
        if self.padding_from is None:
            return self.patch_embed(image) + self.pos_embed
        patch, grid = self.config.geometry.patch_size, self.config.geometry.grid_size
        rows, columns = grid - self.padding_below.shape[1], grid - self.padding_right.shape[2]
        inside = image[:, :, : rows * patch, : columns * patch]
        return self.patch_embed(inside) + self.pos_embed[:, :rows, :columns]

    def _with_padding(self, x: Tensor) -> Tensor:
        """Append the precomputed padding: (B, R, K, C) to (B, G, G, C)."""
        for padding, dimension in ((self.padding_right, 2), (self.padding_below, 1)):
            if padding.shape[dimension]:
                x = torch.cat([x, padding.expand(x.shape[0], -1, -1, -1)], dim=dimension)
        return x
