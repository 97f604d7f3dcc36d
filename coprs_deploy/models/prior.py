"""Positional prior: a query from the policy, scored against every cell of the image embedding.

Paper, section 3.1, equation 2 and algorithm 1; the fusion and its initial bias follow the public
code. The output stays a logit: its ``sigmoid`` is the heat map.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coprs_deploy.model_config import SegmentationConfig

INITIAL_LOGIT = -1.8
"""Initial bias of the last convolution: an untrained prior predicts mostly background."""


class PositionalPrior(nn.Module):
    """Multi-head dot products of the concentration with the image embedding, fused to one map."""

    def __init__(self, config: SegmentationConfig) -> None:
        super().__init__()
        channels, heads = config.geometry.out_chans, config.prior_num_heads
        self.heads = heads
        self.head_width = channels // heads
        self.mask_size = config.geometry.mask_size
        self.q_proj = nn.Linear(config.policy_hidden_size, channels, bias=False)
        self.k_proj = nn.Conv2d(channels, channels, kernel_size=1, bias=False)
        last = nn.Conv2d(heads, 1, kernel_size=3, padding=1)
        assert last.bias is not None
        nn.init.constant_(last.bias, INITIAL_LOGIT)
        self.fuser = nn.Sequential(
            nn.Conv2d(heads, heads, kernel_size=3, padding=1), nn.SiLU(), last
        )

    def forward(self, image_embedding: Tensor, concentration: Tensor) -> Tensor:
        """Score how strongly each cell of the image matches the concentration (paper, eq. 2).

        Args:
            image_embedding: (B, C, G, G); B is 1 (one image, N targets) or N.
            concentration: (N, D) hidden state of <REF_POS>; D is the policy's hidden size.

        Returns:
            (N, 1, 4 G, 4 G) logits; 0 is undecided, the padding is not yet masked.
        """
        keys = self.k_proj(image_embedding)  # (B, C, G, G)
        grid = keys.shape[-1]
        keys = keys.reshape(keys.shape[0], self.heads, self.head_width, grid * grid)
        query = self.q_proj(concentration) * self.head_width**-0.5
        query = query.reshape(-1, self.heads, 1, self.head_width)
        scores = torch.matmul(query, keys)  # (N, heads, 1, G * G)
        scores = scores.reshape(-1, self.heads, grid, grid)
        size = (self.mask_size, self.mask_size)
        return F.interpolate(self.fuser(scores), size=size, mode="bilinear", align_corners=False)
