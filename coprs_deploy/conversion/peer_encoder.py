"""segment-anything's own image encoder, in the size and with the weights of a checkpoint."""

from __future__ import annotations

import importlib.util
import sys
import types
from functools import partial
from typing import TYPE_CHECKING, Any

from coprs_deploy.checkpoint import Checkpoint, load_segmentation_model
from coprs_deploy.errors import MissingDependencyError

if TYPE_CHECKING:
    import torch


def segment_anything_encoder(checkpoint: Checkpoint) -> torch.nn.Module:
    """Build segment-anything's ``ImageEncoderViT`` and fill it with a checkpoint's weights.

    Raises:
        MissingDependencyError: segment-anything is not installed.
    """
    import torch

    sam = checkpoint.config.model.sam
    encoder: torch.nn.Module = _image_encoder_class()(
        depth=sam.encoder_depth,
        embed_dim=sam.encoder_embed_dim,
        img_size=sam.geometry.image_size,
        mlp_ratio=sam.mlp_ratio,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
        num_heads=sam.encoder_num_heads,
        patch_size=sam.geometry.patch_size,
        qkv_bias=True,
        use_rel_pos=sam.use_rel_pos,
        global_attn_indexes=sam.encoder_global_attn_indexes,
        window_size=sam.window_size,
        out_chans=sam.geometry.out_chans,
    )
    encoder.load_state_dict(load_segmentation_model(checkpoint).image_encoder.state_dict())
    return encoder.requires_grad_(False).eval()


def _image_encoder_class() -> Any:
    """Import the encoder alone: the package itself imports torchvision, which may be missing."""
    spec = importlib.util.find_spec("segment_anything")
    if spec is None or spec.submodule_search_locations is None:
        raise MissingDependencyError(
            "segment-anything is not installed; pip install segment-anything"
        )
    package = types.ModuleType("segment_anything")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules.setdefault("segment_anything", package)
    return importlib.import_module("segment_anything.modeling").ImageEncoderViT
