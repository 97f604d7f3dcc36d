"""The image encoder of a model, whatever its family; all map (B, 3, S, S) to (B, C, G, G)."""

from __future__ import annotations

from typing import TypeAlias

from coprs_deploy.encoder_config import EfficientVitConfig, ResNetConfig, TinyVitConfig
from coprs_deploy.model_config import SamConfig
from coprs_deploy.models.efficientvit import EfficientVitEncoder
from coprs_deploy.models.light_encoder import LightEncoder
from coprs_deploy.models.resnet import ResNetEncoder
from coprs_deploy.models.sam_encoder import SamImageEncoder
from coprs_deploy.models.tiny_vit import TinyVitEncoder

ImageEncoder: TypeAlias = SamImageEncoder | LightEncoder


def build_image_encoder(config: SamConfig) -> ImageEncoder:
    """Build the image encoder of a configuration with PyTorch's initial weights."""
    match config.image_encoder:
        case None:
            return SamImageEncoder(config)
        case TinyVitConfig():
            return TinyVitEncoder(config)
        case EfficientVitConfig():
            return EfficientVitEncoder(config)
        case ResNetConfig():
            return ResNetEncoder(config)
