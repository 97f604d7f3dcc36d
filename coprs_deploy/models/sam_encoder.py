"""SAM's image encoder: a ViT with windowed attention and decomposed relative positions.

Same function and parameter names as ``ImageEncoderViT`` of segment-anything, written for static
export: no shape is read from data, and each attention is one matrix product, one softmax and one
matrix product. Loading weights is left to :mod:`coprs_deploy.checkpoint`.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coprs_deploy.architecture import SamConfig
from coprs_deploy.models.layers import LayerNorm2d, TwoLayerMlp

AttentionForm = Literal["bias", "augmented", "blocked"]
"""How relative positions enter attention; all forms are exact.

``bias`` adds a (tokens, tokens) matrix to the attention logits. ``blocked`` does the same for one
head and some rows of queries at a time, so that the logits of a block stay in the processor's cache
and are never all in memory. ``augmented`` appends the position scores to the queries and one-hot
rows and columns to the keys, so that no such matrix exists at all. docs/cpu-speed.md has the times:
``blocked`` takes the least memory in ONNX Runtime and minutes to export; OpenVINO fuses ``bias``.
"""

BLOCK_ROWS = 16
"""Rows of queries in a block: 1024 queries of SAM, whose logits take 16 MB. Half as many are 3%
faster in ONNX Runtime and double the nodes, of which there are eight a block."""

UNBLOCKED_BYTES = 16_777_216
"""Logits of one head that are too small to be worth blocks: those of windows and small grids."""

LAYER_NORM_EPS = 1e-6


class RelativeAttention(nn.Module):
    """Multi-head self-attention over a square grid, with optional relative positions."""

    def __init__(self, width: int, heads: int, grid: int, relative_positions: bool) -> None:
        super().__init__()
        self.heads = heads
        self.grid = grid
        self.head_width = width // heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.relative_positions = relative_positions
        self.form: AttentionForm = "bias"
        if relative_positions:
            self.rel_pos_h = nn.Parameter(torch.zeros(2 * grid - 1, self.head_width))
            self.rel_pos_w = nn.Parameter(torch.zeros(2 * grid - 1, self.head_width))

    def forward(self, x: Tensor) -> Tensor:
        """Attend within each grid.

        Args:
            x: (B, G, G, C), one grid a row.

        Returns:
            (B, G, G, C).
        """
        return self.proj(self.attend(self.qkv(x)))

    def attend(self, qkv: Tensor) -> Tensor:
        """Attend within each grid, between the two projections.

        Args:
            qkv: (B, G, G, 3 C), what ``self.qkv`` gives.

        Returns:
            (B, G, G, C), what ``self.proj`` takes.
        """
        batch, grid = qkv.shape[0], self.grid
        tokens, scale = grid * grid, self.head_width**-0.5
        qkv = qkv.reshape(batch, tokens, 3, self.heads, self.head_width)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, tokens, head_width)
        if not self.relative_positions:
            out = F.scaled_dot_product_attention(query, key, value)
        else:
            by_row, by_column = self._position_scores(query)
            if self.form == "augmented":
                cells = self._one_hot_cells(key).expand(batch, self.heads, -1, -1)
                query = torch.cat([query * scale, by_row, by_column], dim=-1)
                key = torch.cat([key, cells], dim=-1)
                out = F.scaled_dot_product_attention(query, key, value, scale=1.0)
            elif self.form == "blocked" and self._logits_bytes(batch) > UNBLOCKED_BYTES:
                out = self._attend_in_blocks(query, key, value, by_row, by_column)
            else:
                bias = by_row[..., :, None] + by_column[..., None, :]
                bias = bias.reshape(batch, self.heads, tokens, tokens)
                out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return out.transpose(1, 2).reshape(batch, grid, grid, self.heads * self.head_width)

    def _logits_bytes(self, batch: int) -> int:
        """Size of one head's logits in float32."""
        return 4 * batch * self.grid**4

    def _attend_in_blocks(
        self, query: Tensor, key: Tensor, value: Tensor, by_row: Tensor, by_column: Tensor
    ) -> Tensor:
        """Attend one head and :data:`BLOCK_ROWS` rows of queries at a time; loops are unrolled."""
        heads = []
        for head in (slice(h, h + 1) for h in range(self.heads)):
            blocks = []
            for start in range(0, self.grid, BLOCK_ROWS):
                rows = slice(start * self.grid, min(start + BLOCK_ROWS, self.grid) * self.grid)
                bias = by_row[:, head, rows, :, None] + by_column[:, head, rows, None, :]
                blocks.append(
                    F.scaled_dot_product_attention(
                        query[:, head, rows],
                        key[:, head],
                        value[:, head],
                        attn_mask=bias.flatten(start_dim=3),
                    )
                )
            heads.append(torch.cat(blocks, dim=2))
        return torch.cat(heads, dim=1)

    def _position_scores(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Score each query against the rows and the columns, two (B, heads, tokens, G) tensors."""
        batch, grid = query.shape[0], self.grid
        cells = query.reshape(batch * self.heads, grid, grid, self.head_width)
        by_row = cells @ self._distance_table(self.rel_pos_h)
        by_column = cells.transpose(1, 2) @ self._distance_table(self.rel_pos_w)
        shape = (batch, self.heads, grid * grid, grid)
        return by_row.reshape(shape), by_column.transpose(1, 2).reshape(shape)

    def _distance_table(self, relative: Tensor) -> Tensor:
        """Lay the (2G - 1, head_width) table out by query and key: (G, head_width, G)."""
        index = torch.arange(self.grid, device=relative.device)
        distance = index[:, None] - index[None, :] + (self.grid - 1)
        return relative[distance].transpose(1, 2)

    def _one_hot_cells(self, like: Tensor) -> Tensor:
        """Mark each token's row and column: (tokens, 2 G)."""
        identity = torch.eye(self.grid, dtype=like.dtype, device=like.device)
        rows = identity[:, None, :].expand(self.grid, self.grid, self.grid)
        columns = identity[None, :, :].expand(self.grid, self.grid, self.grid)
        return torch.cat([rows, columns], dim=-1).reshape(self.grid * self.grid, 2 * self.grid)


class EncoderBlock(nn.Module):
    """One pre-norm transformer block; attention over windows, or over the whole grid."""

    def __init__(self, config: SamConfig, is_global: bool) -> None:
        super().__init__()
        width = config.encoder_width
        self.grid = config.geometry.grid_size
        self.window = self.grid if is_global else config.window_size
        self.norm1 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.attn = RelativeAttention(
            width, config.encoder_heads, self.window, config.relative_positions
        )
        self.norm2 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.mlp = TwoLayerMlp(width, int(width * config.mlp_ratio), nn.GELU)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, G, G, C) to (B, G, G, C)."""
        attended = self._attend(self.norm1(x))
        x = x + attended
        return x + self.mlp(self.norm2(x))

    def _attend(self, x: Tensor) -> Tensor:
        """Attend over the grid, or over windows; what pads the last windows is not projected.

        SAM pads the normalized tokens with zeros, of which ``qkv`` leaves nothing but its bias: the
        queries, keys and values of the padding are written directly.
        """
        grid, window = self.grid, self.window
        if window == grid:
            return self.attn(x)
        per_side = -(-grid // window)
        qkv = self._pad(self.attn.qkv(x), per_side * window - grid)
        batch, channels = qkv.shape[0], qkv.shape[-1]
        qkv = qkv.reshape(batch, per_side, window, per_side, window, channels)
        qkv = qkv.permute(0, 1, 3, 2, 4, 5)
        x = self.attn.attend(qkv.reshape(batch * per_side**2, window, window, channels))
        x = x.reshape(batch, per_side, per_side, window, window, -1).permute(0, 1, 3, 2, 4, 5)
        x = x.reshape(batch, per_side * window, per_side * window, -1)
        return self.attn.proj(x[:, :grid, :grid])

    def _pad(self, qkv: Tensor, padding: int) -> Tensor:
        """Append ``padding`` columns and rows of the bias to a (B, G, G, 3 C) grid."""
        if not padding:
            return qkv
        batch, rows, columns, channels = qkv.shape
        bias = self.attn.qkv.bias
        qkv = torch.cat([qkv, bias.expand(batch, rows, padding, channels)], dim=2)
        return torch.cat([qkv, bias.expand(batch, padding, columns + padding, channels)], dim=1)


class PatchEmbedding(nn.Module):
    """Cut the image into patches and project each to the encoder's width."""

    def __init__(self, config: SamConfig) -> None:
        super().__init__()
        side = config.geometry.patch_size
        self.proj = nn.Conv2d(3, config.encoder_width, kernel_size=side, stride=side)

    def forward(self, image: Tensor) -> Tensor:
        """Map (B, 3, S, S) pixels to (B, G, G, C) patches."""
        return self.proj(image).permute(0, 2, 3, 1)


class SamImageEncoder(nn.Module):
    """The vision keys of CoPRS: one embedding of the padded image, shared by every question."""

    def __init__(self, config: SamConfig) -> None:
        super().__init__()
        grid, channels = config.geometry.grid_size, config.geometry.embedding_channels
        self.patch_embed = PatchEmbedding(config)
        self.pos_embed = nn.Parameter(torch.zeros(1, grid, grid, config.encoder_width))
        self.blocks = nn.ModuleList(
            EncoderBlock(config, is_global=i in config.global_attention_blocks)
            for i in range(config.encoder_depth)
        )
        self.neck = nn.Sequential(
            nn.Conv2d(config.encoder_width, channels, kernel_size=1, bias=False),
            LayerNorm2d(channels),
            nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False),
            LayerNorm2d(channels),
        )

    def set_attention_form(self, form: AttentionForm) -> None:
        """Choose how relative positions enter attention; see :data:`AttentionForm`."""
        if form not in get_args(AttentionForm):
            raise ValueError(
                f"form is {form!r}; accepted: {', '.join(map(repr, get_args(AttentionForm)))}"
            )
        for module in self.modules():
            if isinstance(module, RelativeAttention):
                module.form = form

    def forward(self, image: Tensor) -> Tensor:
        """Encode a padded image.

        Args:
            image: (B, 3, S, S) float, normalized RGB, zero where padded.

        Returns:
            (B, C, G, G) image embedding.
        """
        x = self.patch_embed(image) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.neck(x.permute(0, 3, 1, 2))
