"""Forward pass of the tiny Qwen2.5-VL policy on packed rows, for training.

It computes what transformers computes from the same weights (a test compares the two), but takes a
batch of images of one size, an attention bias that separates packed questions, and plain attention:
on a CPU the backward pass of fused attention takes half of a step. The blocks may be compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from coprs_deploy.curriculum.packing import PackedRows, attention_bias

VISION_ROPE_THETA = 10_000.0
"""Base of the rotary frequencies of Qwen2.5-VL's vision tower."""

VISION_EPS = 1e-6
"""Epsilon of the vision tower's norms."""


class Rotation(NamedTuple):
    """Cosine and sine of the rotary angles, each broadcastable to (B, heads, L, head_size)."""

    cosine: Tensor
    sine: Tensor


class BlockWeights(NamedTuple):
    """Weights of one pre-norm transformer block of either tower; absent biases are None."""

    attention_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor
    out: Tensor
    out_bias: Tensor | None
    mlp_norm: Tensor
    gate_up_proj: Tensor
    gate_up_proj_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None


class PolicyStates(NamedTuple):
    """Hidden states of a forward pass.

    Attributes:
        hidden: (B, L, D) after the final norm, or None after an early stop.
        middle: (B, L, D) after the requested layer.
        image_features: (B, T, D), image tokens at the input of the language model.
    """

    hidden: Tensor | None
    middle: Tensor
    image_features: Tensor


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm in float32."""
    hidden = hidden.float()
    return hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + eps) * weight


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Apply the rotary embedding to queries or keys (B, heads, L, head_size)."""
    half = x.shape[-1] // 2
    rotated = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * rotation.cosine + rotated * rotation.sine


def transformer_block(
    hidden: Tensor,
    rotation: Rotation,
    bias: Tensor | None,
    weights: BlockWeights,
    *,
    num_heads: int,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """Run one block on hidden states, (B, L, D) float32 to the same.

    Args:
        hidden: hidden states.
        rotation: rotary angles of queries and keys.
        bias: attention bias, broadcastable to (B, heads, L, L).
        weights: weights of the block, float32.
        num_heads: number of attention heads.
        eps: epsilon of the norms.
        dtype: dtype of matrix products.
    """

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))

    batch, length, hidden_size = hidden.shape
    head_size = hidden_size // num_heads
    x = rms_norm(hidden, weights.attention_norm, eps)
    qkv = linear(x, weights.qkv, weights.qkv_bias)
    query, key, value = qkv.view(batch, length, 3, num_heads, head_size).permute(2, 0, 3, 1, 4)
    query = (rotate(query.float(), rotation) * head_size**-0.5).to(dtype)
    key = rotate(key.float(), rotation).to(dtype)
    scores = torch.matmul(query, key.transpose(-1, -2)).float()
    if bias is not None:
        scores = scores + bias
    mixed = torch.matmul(scores.softmax(-1).to(dtype), value)
    mixed = mixed.transpose(1, 2).reshape(batch, length, hidden_size)
    hidden = hidden + linear(mixed, weights.out, weights.out_bias).float()
    x = rms_norm(hidden, weights.mlp_norm, eps)
    gate_proj, up_proj = linear(x, weights.gate_up_proj, weights.gate_up_proj_bias).chunk(2, dim=-1)
    return hidden + linear(F.silu(gate_proj) * up_proj, weights.down, weights.down_bias).float()


class PackedForward:
    """Forward pass of a policy on packed rows with square images of one size.

    Args:
        policy: a ``Qwen2_5_VLForConditionalGeneration`` without grouped keys, with full attention
            in all blocks of the vision tower.
        image_size: side of the images in pixels.
        dtype: dtype of matrix products.
        torch_compile: whether the blocks are compiled for training passes.

    Raises:
        ValueError: the policy has grouped keys or windows.
    """

    def __init__(
        self, policy: Any, image_size: int, dtype: torch.dtype, torch_compile: bool = False
    ) -> None:
        text, vision = policy.config.text_config, policy.config.vision_config
        if text.num_key_value_heads != text.num_attention_heads:
            raise ValueError(
                f"num_key_value_heads is {text.num_key_value_heads}, num_attention_heads is "
                f"{text.num_attention_heads}; packed rows need equal numbers"
            )
        if len(vision.fullatt_block_indexes) != vision.depth:
            raise ValueError(
                f"fullatt_block_indexes is {vision.fullatt_block_indexes}; packed rows need full "
                "attention in every block of the vision tower"
            )
        self._visual = policy.model.visual
        self._language = policy.model.language_model
        self._text, self._vision = text, vision
        self._dtype = dtype
        self._patches = image_size // vision.patch_size
        self._vision_rotation = self._patch_rotation()
        self._compiled: Callable[..., Tensor] = (
            torch.compile(transformer_block, dynamic=False) if torch_compile else transformer_block
        )

    def __call__(
        self, images: Tensor, rows: PackedRows, image_start: int, middle: int, stop: bool = False
    ) -> PolicyStates:
        """Run the policy.

        Args:
            images: (B, 3, S, S) normalized pixels.
            rows: packed rows.
            image_start: column of the first image token.
            middle: language layer, from 1, whose output is returned too.
            stop: whether to stop behind it.
        """
        features = self.image_features(images)
        embedded = F.embedding(rows.input_ids, self._language.embed_tokens.weight)
        stop_column = image_start + features.shape[1]
        hidden = torch.cat([embedded[:, :image_start], features, embedded[:, stop_column:]], dim=1)
        bias = attention_bias(rows, self._dtype)
        rotation = self._token_rotation(rows.positions)
        layers = self._language.layers
        eps = self._text.rms_norm_eps
        middle_states = hidden
        for number, layer in enumerate(layers[:middle] if stop else layers, start=1):
            weights, num_heads = _language_weights(layer), self._text.num_attention_heads
            hidden = self._run_block(hidden, rotation, bias, weights, num_heads=num_heads, eps=eps)
            if number == middle:
                middle_states = hidden
        if stop:
            return PolicyStates(None, middle_states, features)
        final = rms_norm(hidden, self._language.norm.weight, eps)
        return PolicyStates(final, middle_states, features)

    def image_features(self, images: Tensor) -> Tensor:
        """Run the vision tower, (B, 3, S, S) to (B, T, D)."""
        hidden = self._embed_patches(images)
        for block in self._visual.blocks:
            weights, num_heads = _vision_weights(block), self._vision.num_heads
            hidden = self._run_block(
                hidden, self._vision_rotation, None, weights, num_heads=num_heads, eps=VISION_EPS
            )
        merger = self._visual.merger
        merged = rms_norm(hidden, merger.ln_q.weight, VISION_EPS)
        merged = merged.reshape(hidden.shape[0], -1, merger.hidden_size)
        features: Tensor = merger.mlp(merged)
        return features.float()

    def _run_block(self, *tensors: Any, **settings: Any) -> Tensor:
        run = self._compiled if torch.is_grad_enabled() else transformer_block
        return run(*tensors, **settings, dtype=self._dtype)

    def _embed_patches(self, images: Tensor) -> Tensor:
        """Embed patches in Qwen's order: the four of an image token are adjacent."""
        batch, half, side = images.shape[0], self._patches // 2, self._vision.patch_size
        x = images.reshape(batch, 3, half, 2, side, half, 2, side)
        x = x.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(batch, 4 * half * half, -1)
        # An image is repeated along time, so the two halves of the kernel add up.
        kernel = self._visual.patch_embed.proj.weight.sum(2).flatten(1)
        return F.linear(x.to(self._dtype), kernel.to(self._dtype)).float()

    def _patch_rotation(self) -> Rotation:
        """Rotary angles of row and column of each patch, in Qwen's order."""
        half = self._patches // 2
        rows, columns = torch.meshgrid(
            torch.arange(self._patches), torch.arange(self._patches), indexing="ij"
        )
        width = self._vision.hidden_size // self._vision.num_heads // 2
        exponents = torch.arange(0, width, 2).float() / width
        frequencies = VISION_ROPE_THETA**-exponents

        def in_order(cells: Tensor) -> Tensor:
            return cells.reshape(half, 2, half, 2).permute(0, 2, 1, 3).reshape(-1, 1).float()

        angles = torch.cat([in_order(rows) * frequencies, in_order(columns) * frequencies], dim=-1)
        angles = torch.cat([angles, angles], dim=-1).to(self._visual.device)
        return Rotation(angles.cos(), angles.sin())

    def _token_rotation(self, positions: Tensor) -> Rotation:
        """Rotary angles of tokens: each section of frequencies belongs to time, row or column."""
        frequencies = self._language.rotary_emb.inv_freq
        angles = positions[..., None].float() * frequencies  # (3, B, L, head_size / 2)
        sections = angles.split(self._text.rope_parameters["mrope_section"], dim=-1)
        mixed = torch.cat([part[axis % 3] for axis, part in enumerate(sections)], dim=-1)
        doubled = torch.cat([mixed, mixed], dim=-1)[:, None]
        return Rotation(doubled.cos(), doubled.sin())


def _language_weights(layer: Any) -> BlockWeights:
    attention, mlp = layer.self_attn, layer.mlp
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    return BlockWeights(
        layer.input_layernorm.weight,
        torch.cat([p.weight for p in projections]),
        torch.cat([p.bias for p in projections]),
        attention.o_proj.weight,
        None,
        layer.post_attention_layernorm.weight,
        torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]),
        None,
        mlp.down_proj.weight,
        None,
    )


def _vision_weights(block: Any) -> BlockWeights:
    attention, mlp = block.attn, block.mlp
    return BlockWeights(
        block.norm1.weight,
        attention.qkv.weight,
        attention.qkv.bias,
        attention.proj.weight,
        attention.proj.bias,
        block.norm2.weight,
        torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]),
        torch.cat([mlp.gate_proj.bias, mlp.up_proj.bias]),
        mlp.down_proj.weight,
        mlp.down_proj.bias,
    )
