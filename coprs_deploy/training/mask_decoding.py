"""Mask decoding during training: from image embeddings and hidden states to masks and their IoU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from coprs_deploy.models import SegmentationModel
from coprs_deploy.models.mask_decoder import MaskDecoder, PromptEncoder
from coprs_deploy.models.prior import PositionalPrior
from coprs_deploy.specs import OUTSIDE_IMAGE_LOGIT, Geometry
from coprs_deploy.training.losses import Mean, inside_image


@contextmanager
def fast_attention(device: torch.device) -> Iterator[None]:
    """Select the attention with the fastest backward pass: on a CPU the plain one, in its dtype.

    One step of the segmentation stage, 16 images on one core in bf16: 289 ms fused, 306 ms plain
    with products in float32, 249 ms plain in bf16.
    """
    if device.type != "cpu":
        yield
        return
    previous: bool = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()  # type: ignore[no-untyped-call]
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(previous)


def encode_images(model: SegmentationModel, images: Tensor) -> Tensor:
    """Run the image encoder, (B, 3, S, S) to (B, C, G, G)."""
    with fast_attention(images.device):
        embedding: Tensor = model.image_encoder(images)
    return embedding


class Decoding(Protocol):
    """The part of the segmentation path behind the image encoder."""

    prior: PositionalPrior
    prompt_encoder: PromptEncoder
    mask_decoder: MaskDecoder


def decode_targets(
    model: Decoding, image_embedding: Tensor, concentration: Tensor, inside: Tensor
) -> tuple[Tensor, Tensor]:
    """Decode one target per embedding, as the exported graphs do, each with its own padding.

    Args:
        model: prior, prompt encoder and mask decoder.
        image_embedding: (N, C, G, G).
        concentration: (N, D).
        inside: (N, 1, 4 G, 4 G), 1 for cells of the image and 0 for padding.

    Returns:
        Prior logits and mask logits, each (N, 1, 4 G, 4 G).
    """
    prior_logits = model.prior(image_embedding, concentration)
    prompt = torch.where(inside > 0, prior_logits, OUTSIDE_IMAGE_LOGIT)
    positions = model.prompt_encoder.image_positions()
    dense = model.prompt_encoder(prompt)
    with fast_attention(image_embedding.device):
        return prior_logits, model.mask_decoder(image_embedding, positions, dense)


def mask_targets(masks: Tensor, mask_size: int) -> Tensor:
    """Return how much of each mask cell (N, S, S) bool masks cover, (N, 1, M, M) in [0, 1]."""
    return F.adaptive_avg_pool2d(masks.float()[:, None], mask_size)


def whole_images(count: int, geometry: Geometry, device: torch.device) -> Tensor:
    """Mark every cell as valid, (N, 1, M, M): generated scenes have no padding."""
    size = torch.full((count, 2), geometry.image_size, device=device)
    return inside_image(size, geometry.mask_size, geometry.mask_stride)


def mask_metrics(prior_logits: Tensor, mask_logits: Tensor, masks: Tensor) -> dict[str, Mean]:
    """Measure the IoU of logits (N, 1, M, M) with (N, S, S) bool masks, at the masks' size."""
    iou = intersection_over_union(mask_logits.detach(), masks)
    prior_iou = intersection_over_union(prior_logits.detach(), masks)
    return {
        "giou": Mean.of(iou),
        "precision_at_50": Mean.of((iou > 0.5).float()),
        "prior_giou": Mean.of(prior_iou),
    }


def intersection_over_union(logits: Tensor, masks: Tensor) -> Tensor:
    """Return the IoU (N,) of the thresholded logits with the masks; 0 where both are empty."""
    size = masks.shape[-2:]
    resized = F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)
    predicted = resized[:, 0] > 0
    intersection = (predicted & masks).flatten(1).sum(1).float()
    union = (predicted | masks).flatten(1).sum(1).float()
    return intersection / union.clamp(min=1)


def fit_ignore_mask(
    mask: NDArray[np.bool_] | None, unpadded_size: Sequence[int] | Tensor, geometry: Geometry
) -> Tensor:
    """Resize an ignore mask as :func:`fit_mask` does; zeros without one."""
    if mask is None:
        return torch.zeros(1, geometry.mask_size, geometry.mask_size)
    return fit_mask(mask, unpadded_size, geometry)


def fit_mask(
    mask: NDArray[np.bool_], unpadded_size: Sequence[int] | Tensor, geometry: Geometry
) -> Tensor:
    """Resize a mask to the mask grid: the share of each cell that it covers.

    Args:
        mask: (H, W) bool, at the original image size.
        unpadded_size: height and width of the resized image in pixels of the padded image.
        geometry: geometry of the segmentation path.

    Returns:
        (1, M, M) float32 in [0, 1], 0 in the padding.
    """
    height, width = map(int, unpadded_size)
    resized = F.interpolate(
        torch.from_numpy(mask).float()[None, None],
        size=(height, width),
        mode="bilinear",
        align_corners=False,
        antialias=True,
    )
    size = geometry.image_size
    padded = F.pad(resized, (0, size - width, 0, size - height))
    return F.avg_pool2d(padded, geometry.mask_stride)[0]
