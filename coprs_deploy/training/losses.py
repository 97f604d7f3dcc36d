"""Losses: segmentation losses on the mask grid, and cross-entropy on the response.

Every loss is a :class:`Mean`, a sum with its divisor, so that a batch spread over several processes
gives the same mean as the same batch in one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from coprs_deploy.training.settings import SegmentationLossWeights

FOCAL_ALPHA = 0.25
"""Weight of foreground cells in the focal loss (paper, eq. 8)."""

FOCAL_GAMMA = 2.0
"""Focusing exponent of the focal loss (paper, eq. 8)."""

IGNORED_LABEL = -100
"""Label of a position without a loss."""

DICE_SMOOTHING = 1.0
"""Added to numerator and denominator of the dice ratio, so that an empty mask has a gradient."""


class Mean(NamedTuple):
    """Weighted mean as a sum of the weighted values and a sum of the weights, () float each."""

    total: Tensor
    weight: Tensor

    @classmethod
    def of(cls, values: Tensor, weights: Tensor | None = None) -> Mean:
        """Sum values of any shape, each with its weight (1 by default)."""
        if weights is None:
            return cls(values.float().sum(), values.new_tensor(values.numel(), dtype=torch.float32))
        return cls((values.float() * weights).sum(), weights.float().sum())


def inside_image(unpadded_size: Tensor, mask_size: int, mask_stride: int) -> Tensor:
    """Mark the mask cells of the valid region: those whose first pixel lies in the image.

    Args:
        unpadded_size: int64 (N, 2), height and width in pixels of the padded image.
        mask_size: side of the mask grid in cells.
        mask_stride: side of a cell in pixels.

    Returns:
        (N, 1, mask_size, mask_size) float, 1 inside and 0 in the padding.
    """
    first_pixel = mask_stride * torch.arange(mask_size, device=unpadded_size.device)
    rows = first_pixel < unpadded_size[:, :1]
    columns = first_pixel < unpadded_size[:, 1:]
    return (rows[:, None, :, None] & columns[:, None, None, :]).float()


def binary_cross_entropy(logits: Tensor, target: Tensor, inside: Tensor) -> Tensor:
    """Binary cross-entropy, averaged over the cells of each image.

    Args:
        logits: (N, 1, M, M).
        target: (N, 1, M, M), share of each cell that the object covers, in [0, 1].
        inside: (N, 1, M, M), 1 for cells of the image and 0 for padding; in between for cells of
            which a part is ignored.

    Returns:
        (N,) loss of each target.
    """
    loss = F.binary_cross_entropy_with_logits(logits.float(), target, reduction="none")
    return _mean_inside(loss, inside)


def dice(logits: Tensor, target: Tensor, inside: Tensor) -> Tensor:
    """Dice loss of ``sigmoid(logits)``; arguments and result as in :func:`binary_cross_entropy`."""
    probability = logits.float().sigmoid() * inside
    covered = target * inside
    overlap = (probability * covered).flatten(1).sum(1)
    sizes = probability.flatten(1).sum(1) + covered.flatten(1).sum(1)
    return 1 - (2 * overlap + DICE_SMOOTHING) / (sizes + DICE_SMOOTHING)


def focal(logits: Tensor, target: Tensor, inside: Tensor) -> Tensor:
    """Focal loss over the cells; arguments and result as in :func:`binary_cross_entropy`."""
    loss = F.binary_cross_entropy_with_logits(logits.float(), target, reduction="none")
    probability = logits.float().sigmoid()
    p_t = probability * target + (1 - probability) * (1 - target)
    alpha_t = FOCAL_ALPHA * target + (1 - FOCAL_ALPHA) * (1 - target)
    return _mean_inside(alpha_t * (1 - p_t) ** FOCAL_GAMMA * loss, inside)


def segmentation_losses(
    prior_logits: Tensor,
    mask_logits: Tensor,
    target: Tensor,
    inside: Tensor,
    loss_weights: SegmentationLossWeights,
    *,
    target_weights: Tensor | None = None,
) -> dict[str, Mean]:
    """Compute the segmentation losses with a weight above 0, averaged over the targets.

    Args:
        prior_logits: (N, 1, M, M), before the padding is masked.
        mask_logits: (N, 1, M, M).
        target: (N, 1, M, M), share of each cell that the object covers, in [0, 1].
        inside: (N, 1, M, M), 1 for cells of the image and 0 for padding.
        loss_weights: weights of the losses.
        target_weights: (N,) weight of each target in the mean; 1 by default.

    Returns:
        Loss name, as in ``loss_weights``, to its mean over the targets.
    """
    losses = {
        "prior_bce": (binary_cross_entropy, prior_logits),
        "prior_dice": (dice, prior_logits),
        "mask_dice": (dice, mask_logits),
        "mask_focal": (focal, mask_logits),
        "mask_bce": (binary_cross_entropy, mask_logits),
    }
    return {
        name: Mean.of(loss(logits, target, inside), target_weights)
        for name, (loss, logits) in losses.items()
        if getattr(loss_weights, name) > 0
    }


def token_cross_entropy(
    logits: Tensor, labels: Tensor, token_weights: Tensor | None = None
) -> Mean:
    """Cross-entropy of the next token, weighted by token.

    Args:
        logits: (T, V) logits of the next token.
        labels: int64 (T,), the next token.
        token_weights: (V,) weight of each token of the vocabulary as a label; 1 by default.
    """
    loss = F.cross_entropy(logits.float(), labels, reduction="none")
    return Mean.of(loss, None if token_weights is None else token_weights[labels])


def token_kl_divergence(
    logits: Tensor, reference_logits: Tensor, weights: Tensor | None = None
) -> Mean:
    """KL divergence of the next token from a reference, ``KL(reference || logits)``.

    Args:
        logits: (T, V) logits of the next token.
        reference_logits: (T, V), those of the reference.
        weights: (T,) weight of each token; 1 by default.
    """
    found, reference = (each.float().log_softmax(-1) for each in (logits, reference_logits))
    divergence = F.kl_div(found, reference, reduction="none", log_target=True)
    return Mean.of(divergence.sum(-1), weights)


def _mean_inside(loss: Tensor, inside: Tensor) -> Tensor:
    return (loss * inside).flatten(1).sum(1) / inside.flatten(1).sum(1).clamp(min=1.0)
