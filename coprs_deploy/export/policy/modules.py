"""Parts of a policy as torch modules that OpenVINO can trace; the weights are transformers' own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coprs_deploy.policy.openvino_policy.positions import MASKED


class EntryModule(nn.Module):
    """Positions (axes, 1, L) and keys of a layer -> two rotations (1, 1, L, d), causal mask."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.rotary = model.model.language_model.rotary_emb
        self.axes = 3 if model.config.model_type == "qwen2_5_vl" else 1

    def forward(self, position_ids: Tensor, past_key: Tensor) -> tuple[Tensor, ...]:
        """See the class."""
        count, before = position_ids.shape[2], past_key.shape[2]
        axes = position_ids if self.axes == 3 else position_ids[0]
        cos, sin = self.rotary(past_key, axes)
        ahead = torch.arange(before + count)[None] > (torch.arange(count) + before)[:, None]
        mask = torch.where(ahead, MASKED, 0.0)[None, None]
        return cos.unsqueeze(1), sin.unsqueeze(1), mask


class LayerModule(nn.Module):
    """(1, L, D) rows, rotation, mask and the layer's cache -> rows and the extended cache."""

    def __init__(self, layer: Any, config: Any) -> None:
        super().__init__()
        self.layer = layer
        self.groups = config.num_attention_heads // config.num_key_value_heads
        self.width = head_size(config)

    def forward(  # noqa: PLR0917
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor,
        past_key: Tensor,
        past_value: Tensor,
    ) -> tuple[Tensor, ...]:
        """See the class."""
        layer, count = self.layer, x.shape[1]
        attention, y = layer.self_attn, layer.input_layernorm(x)
        q, k, v = (
            projection(y).view(1, count, -1, self.width).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        k = torch.cat((past_key, _rotate(k, cos, sin)), 2)
        v = torch.cat((past_value, v), 2)
        q = _rotate(q, cos, sin)
        y = F.scaled_dot_product_attention(q, self._repeat(k), self._repeat(v), mask)
        x = x + attention.o_proj(y.transpose(1, 2).reshape(1, count, -1))
        return x + layer.mlp(layer.post_attention_layernorm(x)), k, v

    def _repeat(self, x: Tensor) -> Tensor:
        """Repeat grouped heads in the form that the plugin's attention with cache looks for."""
        batch, heads, count, width = x.shape
        repeated = x[:, :, None].expand(batch, heads, self.groups, count, width)
        return repeated.reshape(batch, heads * self.groups, count, width)


class HeadModule(nn.Module):
    """(1, L, D) rows -> logits and post-norm hidden state of the last row."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.norm = model.model.language_model.norm
        self.head = model.get_output_embeddings()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        hidden = self.norm(x[:, -1])
        return self.head(hidden), hidden


class QwenVisionModule(nn.Module):
    """Patches in window order -> (V, D) tokens; see ``positions.vision_inputs``.

    Windows are padded to one size, so that one graph serves every image size.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.tower = model.model.visual
        self.config = model.config.vision_config
        kernel = self.tower.patch_embed.proj.weight.flatten(1)
        self.patch = nn.Linear(kernel.shape[1], kernel.shape[0], bias=False)
        self.patch.weight = nn.Parameter(kernel, requires_grad=False)

    def example(self) -> dict[str, Tensor]:
        """Return inputs to trace the module with."""
        unit = self.config.spatial_merge_size**2
        count = 8 * unit
        return {
            "patches": torch.randn(count, self.patch.in_features),
            "positions": torch.randint(0, 4, (count, 2)),
            "slots": torch.arange(count),
            "slot_mask": torch.zeros(2, 1, 1, count // 2),
            "unslot": torch.arange(count),
            "image_order": torch.arange(8),
        }

    def forward(  # noqa: PLR0917
        self,
        patches: Tensor,
        positions: Tensor,
        slots: Tensor,
        slot_mask: Tensor,
        unslot: Tensor,
        image_order: Tensor,
    ) -> Tensor:
        """See the class."""
        x, heads = self.patch(patches), self.config.num_heads
        rotation = [t.unsqueeze(1) for t in self.tower.rotary_pos_emb(x, positions)]
        windows, size = slot_mask.shape[0], slot_mask.shape[3]
        for i, block in enumerate(self.tower.blocks):
            y = block.attn.qkv(block.norm1(x)).reshape(x.shape[0], 3, heads, -1)
            parts = _rotate(y[:, 0], *rotation), _rotate(y[:, 1], *rotation), y[:, 2]
            if i in self.config.fullatt_block_indexes:
                q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in parts)
                y = F.scaled_dot_product_attention(q, k, v)
                y = y.squeeze(0).transpose(0, 1).reshape(x.shape)
            else:
                padded = (t[slots].reshape(windows, size, heads, -1) for t in parts)
                q, k, v = (t.transpose(1, 2) for t in padded)
                y = F.scaled_dot_product_attention(q, k, v, slot_mask)
                y = y.transpose(1, 2).reshape(windows * size, x.shape[1])[unslot]
            x = x + block.attn.proj(y)
            x = x + block.mlp(block.norm2(x))
        tokens: Tensor = self.tower.merger(x)[image_order]
        return tokens


class LlavaVisionModule(nn.Module):
    """(1, 3, S, S) pixels -> (V, D) tokens."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.tower = model.model.vision_tower
        self.projector = model.model.multi_modal_projector
        self.layer = model.config.vision_feature_layer
        self.keeps_class_token = model.config.vision_feature_select_strategy == "full"
        self.side = model.config.vision_config.image_size

    def example(self) -> dict[str, Tensor]:
        """Return inputs to trace the module with."""
        return {"pixel_values": torch.randn(1, 3, self.side, self.side)}

    def forward(self, pixel_values: Tensor) -> Tensor:
        """See the class."""
        x = self.tower.pre_layrnorm(self.tower.embeddings(pixel_values))
        states = [x]
        for layer in self.tower.encoder.layers:
            x = layer(x, attention_mask=None)
            x = x[0] if isinstance(x, tuple) else x
            states.append(x)
        features = states[self.layer]
        kept = features if self.keeps_class_token else features[:, 1:]
        tokens: Tensor = self.projector(kept)[0]
        return tokens


VISION_MODULES: Mapping[str, Callable[[Any], Any]] = {
    "qwen2_5_vl": QwenVisionModule,
    "llava": LlavaVisionModule,
}


def head_size(config: Any) -> int:
    """Return the size of an attention head of a text config."""
    given = getattr(config, "head_dim", None)
    return int(given or config.hidden_size // config.num_attention_heads)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin
