"""Pixels as the two towers take them, for batches of equal images on any device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from coprs_deploy.specs import Geometry


def normalize_pixels(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Turn uint8 (B, S, S, 3) into normalized (B, 3, S, S); mean and std in 0..255."""
    return ((images.float() - mean) / std).permute(0, 3, 1, 2)


def policy_pixels(images: Tensor, image_processor: Any) -> Tensor:
    """Normalize pixels as the policy's image processor does."""
    mean = torch.tensor(image_processor.image_mean, device=images.device)
    std = torch.tensor(image_processor.image_std, device=images.device)
    return normalize_pixels(images, 255 * mean, 255 * std)


def segmentation_pixels(images: Tensor, geometry: Geometry) -> Tensor:
    """Normalize pixels as :func:`coprs_deploy.images.prepare_image` does."""
    mean = torch.tensor(geometry.pixel_mean, device=images.device)
    std = torch.tensor(geometry.pixel_std, device=images.device)
    return normalize_pixels(images, mean, std)
