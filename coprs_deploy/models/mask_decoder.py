"""SAM's prompt encoder (mask prompts only) and two-way mask decoder, one mask per target.

Parameter names follow segment-anything, so that its weights load strictly. Point prompts, box
prompts and the IoU head have parameters here but no code, because CoPRS never calls them.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coprs_deploy.model_config import SamConfig
from coprs_deploy.models.layers import LayerNorm2d, TwoLayerMlp

NUM_POINT_LABELS = 4
"""Background point, foreground point and the two corners of a box."""


class RandomPositionEncoding(nn.Module):
    """Sine and cosine of random projections of a position in [0, 1] x [0, 1]."""

    positional_encoding_gaussian_matrix: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("positional_encoding_gaussian_matrix", torch.randn(2, features))

    def forward(self, grid: int) -> Tensor:
        """Encode the cell centers of a square grid: (1, 2 * features, grid, grid)."""
        matrix = self.positional_encoding_gaussian_matrix
        center = (torch.arange(grid, device=matrix.device, dtype=matrix.dtype) + 0.5) / grid
        y, x = torch.meshgrid(center, center, indexing="ij")
        angle = 2 * math.pi * ((2 * torch.stack([x, y], dim=-1) - 1) @ matrix)
        return torch.cat([angle.sin(), angle.cos()], dim=-1).permute(2, 0, 1)[None]


class PromptEncoder(nn.Module):
    """SAM's prompt encoder for mask prompts; the prompt is the prior."""

    def __init__(self, config: SamConfig) -> None:
        super().__init__()
        channels, hidden = config.geometry.out_chans, config.mask_in_chans
        self.grid = config.geometry.grid_size
        self.pe_layer = RandomPositionEncoding(channels // 2)
        self.point_embeddings = nn.ModuleList(
            nn.Embedding(1, channels) for _ in range(NUM_POINT_LABELS)
        )
        self.not_a_point_embed = nn.Embedding(1, channels)
        self.mask_downscaling = nn.Sequential(
            nn.Conv2d(1, hidden // 4, kernel_size=2, stride=2),
            LayerNorm2d(hidden // 4),
            nn.GELU(),
            nn.Conv2d(hidden // 4, hidden, kernel_size=2, stride=2),
            LayerNorm2d(hidden),
            nn.GELU(),
            nn.Conv2d(hidden, channels, kernel_size=1),
        )
        self.no_mask_embed = nn.Embedding(1, channels)

    def image_positions(self) -> Tensor:
        """Return the position encoding of every cell: (1, C, G, G)."""
        return self.pe_layer(self.grid)

    def forward(self, mask_prompt: Tensor) -> Tensor:
        """Embed mask prompts, (N, 1, 4 G, 4 G) logits to (N, C, G, G)."""
        return self.mask_downscaling(mask_prompt)


class DecoderAttention(nn.Module):
    """Multi-head attention whose inner width may be smaller than its outer width."""

    def __init__(self, width: int, heads: int, downsample: int = 1) -> None:
        super().__init__()
        inner = width // downsample
        self.heads = heads
        self.head_width = inner // heads
        self.q_proj = nn.Linear(width, inner)
        self.k_proj = nn.Linear(width, inner)
        self.v_proj = nn.Linear(width, inner)
        self.out_proj = nn.Linear(inner, width)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend from (N, Q, C) queries to (N, K, C) keys; returns (N, Q, C)."""
        out = F.scaled_dot_product_attention(
            self._split(self.q_proj(query)),
            self._split(self.k_proj(key)),
            self._split(self.v_proj(value)),
        )
        out = out.transpose(1, 2)
        return self.out_proj(out.reshape(-1, out.shape[1], self.heads * self.head_width))

    def _split(self, x: Tensor) -> Tensor:
        return x.reshape(-1, x.shape[1], self.heads, self.head_width).transpose(1, 2)


class TwoWayBlock(nn.Module):
    """Tokens attend to each other and to the image, then the image attends to the tokens."""

    def __init__(self, config: SamConfig, is_first: bool) -> None:
        super().__init__()
        width, heads = config.geometry.out_chans, config.decoder_num_heads
        self.is_first = is_first
        self.self_attn = DecoderAttention(width, heads)
        self.norm1 = nn.LayerNorm(width)
        self.cross_attn_token_to_image = DecoderAttention(width, heads, downsample=2)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = TwoLayerMlp(width, config.decoder_mlp_dim, nn.ReLU)
        self.norm3 = nn.LayerNorm(width)
        self.norm4 = nn.LayerNorm(width)
        self.cross_attn_image_to_token = DecoderAttention(width, heads, downsample=2)

    def forward(
        self, tokens: Tensor, image: Tensor, token_positions: Tensor, image_positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return updated tokens (N, T, C) and image cells (N, G * G, C)."""
        if self.is_first:  # the tokens are their own position encoding
            tokens = self.self_attn(tokens, tokens, tokens)
        else:
            positioned = tokens + token_positions
            tokens = tokens + self.self_attn(positioned, positioned, tokens)
        tokens = self.norm1(tokens)
        positioned_image = image + image_positions
        tokens = tokens + self.cross_attn_token_to_image(
            tokens + token_positions, positioned_image, image
        )
        tokens = self.norm2(tokens)
        tokens = self.norm3(tokens + self.mlp(tokens))
        image = image + self.cross_attn_image_to_token(
            positioned_image, tokens + token_positions, tokens
        )
        return tokens, self.norm4(image)


class TwoWayTransformer(nn.Module):
    """Two-way blocks, and a final attention of the tokens to the image."""

    def __init__(self, config: SamConfig) -> None:
        super().__init__()
        width, heads = config.geometry.out_chans, config.decoder_num_heads
        self.layers = nn.ModuleList(
            TwoWayBlock(config, is_first=i == 0) for i in range(config.decoder_depth)
        )
        self.final_attn_token_to_image = DecoderAttention(width, heads, downsample=2)
        self.norm_final_attn = nn.LayerNorm(width)

    def forward(
        self, tokens: Tensor, image: Tensor, image_positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return tokens (N, T, C) and image cells (N, G * G, C)."""
        token_positions = tokens
        for layer in self.layers:
            tokens, image = layer(tokens, image, token_positions, image_positions)
        attended = self.final_attn_token_to_image(
            tokens + token_positions, image + image_positions, image
        )
        return self.norm_final_attn(tokens + attended), image


class ReluMlp(nn.Module):
    """Linear layers with ReLU between them (SAM's ``MLP``)."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., widths[0]) to (..., widths[-1])."""
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class MaskDecoder(nn.Module):
    """SAM's mask decoder; returns the first of its masks for each prompt."""

    def __init__(self, config: SamConfig) -> None:
        super().__init__()
        width, masks = config.geometry.out_chans, config.num_mask_tokens
        self.transformer = TwoWayTransformer(config)
        self.iou_token = nn.Embedding(1, width)
        self.mask_tokens = nn.Embedding(masks, width)
        self.output_upscaling = nn.Sequential(
            nn.ConvTranspose2d(width, width // 4, kernel_size=2, stride=2),
            LayerNorm2d(width // 4),
            nn.GELU(),
            nn.ConvTranspose2d(width // 4, width // 8, kernel_size=2, stride=2),
            nn.GELU(),
        )
        self.output_hypernetworks_mlps = nn.ModuleList(
            ReluMlp(width, width, width, width // 8) for _ in range(masks)
        )
        hidden = config.iou_head_hidden_dim
        self.iou_prediction_head = ReluMlp(width, hidden, hidden, masks)

    def forward(self, image_embedding: Tensor, image_positions: Tensor, dense: Tensor) -> Tensor:
        """Decode one mask for each dense prompt.

        Args:
            image_embedding: (B, C, G, G); B is 1 or N.
            image_positions: (1, C, G, G) position encoding of the cells.
            dense: (N, C, G, G) embedded mask prompts.

        Returns:
            (N, 1, 4 G, 4 G) mask logits.
        """
        image = image_embedding + dense  # (N, C, G, G): one image, N prompts
        grid, channels = image.shape[-1], image.shape[1]
        tokens = torch.cat([self.iou_token.weight, self.mask_tokens.weight])[None]
        tokens = tokens.expand(image.shape[0], -1, -1)
        tokens, cells = self.transformer(
            tokens, image.flatten(2).transpose(1, 2), image_positions.flatten(2).transpose(1, 2)
        )
        cells = cells.transpose(1, 2).reshape(-1, channels, grid, grid)
        upscaled = self.output_upscaling(cells)  # (N, C / 8, 4 G, 4 G)
        weights = self.output_hypernetworks_mlps[0](tokens[:, 1])  # (N, C / 8)
        logits = weights[:, None] @ upscaled.flatten(2)
        return logits.reshape(-1, 1, 4 * grid, 4 * grid)
