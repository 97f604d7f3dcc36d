"""What training minimizes: segmentation losses on the mask grid, and cross-entropy on the response.

Every loss is handed over as a :class:`Mean`, a sum and what to divide it by, so that a batch that
is spread over several processes gives the same mean as the same batch in one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from coprs_deploy.training.settings import SegmentationLossWeights

FOCAL_ALPHA = 0.25


FOCAL_GAMMA = 2.0
"""Weight of foreground cells and focusing exponent (paper, eq. 8)."""


IGNORED_LABEL = -100
"""Marks a position whose next token is not learned."""


DICE_SMOOTHING = 1.0
"""Added to both parts of the dice ratio, so that an empty mask has a gradient."""


class Mean(NamedTuple):
    """A mean in two parts.

    Attributes:
        total: () float, the sum of all weighted values.
        weight: () float, the sum of their weights.
    """

    total: Tensor
    weight: Tensor

    @classmethod
    def of(cls, values: Tensor, weights: Tensor | None = None) -> Mean:
        """Add up values of any shape, each with its weight (1 by default)."""
        if weights is None:
            return cls(values.float().sum(), values.new_tensor(values.numel(), dtype=torch.float32))
        return cls((values.float() * weights).sum(), weights.float().sum())

    def value(self) -> Tensor:
        """Return the mean over this process; 0 where there is nothing."""
        return self.total / self.weight.clamp(min=torch.finfo(torch.float32).tiny)


def inside_image(unpadded_size: Tensor, mask_size: int, mask_stride: int) -> Tensor:
    """Mark the mask cells that belong to the image: those whose first pixel does.

    Args:
        unpadded_size: int64 (N, 2), height and width in pixels of the padded image.
        mask_size: side of the mask grid in cells.
        mask_stride: pixels along one cell.

    Returns:
        (N, 1, mask_size, mask_size) float, 1 inside and 0 in the padding.
    """
    first_pixel = mask_stride * torch.arange(mask_size, device=unpadded_size.device)
    rows = first_pixel < unpadded_size[:, :1]
    columns = first_pixel < unpadded_size[:, 1:]
    return (rows[:, None, :, None] & columns[:, None, None, :]).float()


def binary_cross_entropy(logits: Tensor, target: Tensor, inside: Tensor) -> Tensor:
    """Average the binary cross-entropy over the cells of each image.

    Args:
        logits: (N, 1, M, M).
        target: (N, 1, M, M), share of each cell that the object covers, in [0, 1].
        inside: (N, 1, M, M), 1 for cells of the image and 0 for padding.

    Returns:
        (N,) loss a target.
    """
    loss = F.binary_cross_entropy_with_logits(logits.float(), target, reduction="none")
    return _mean_inside(loss, inside)


def dice(logits: Tensor, target: Tensor, inside: Tensor) -> Tensor:
    """One minus the soft dice of ``sigmoid(logits)``; arguments and result as above."""
    probability = logits.float().sigmoid() * inside
    covered = target * inside
    overlap = (probability * covered).flatten(1).sum(1)
    sizes = probability.flatten(1).sum(1) + covered.flatten(1).sum(1)
    return 1 - (2 * overlap + DICE_SMOOTHING) / (sizes + DICE_SMOOTHING)


def focal(logits: Tensor, target: Tensor, inside: Tensor) -> Tensor:
    """Average the focal loss over the cells of each image; arguments and result as above."""
    loss = F.binary_cross_entropy_with_logits(logits.float(), target, reduction="none")
    probability = logits.float().sigmoid()
    right = probability * target + (1 - probability) * (1 - target)
    balance = FOCAL_ALPHA * target + (1 - FOCAL_ALPHA) * (1 - target)
    return _mean_inside(balance * (1 - right) ** FOCAL_GAMMA * loss, inside)


def segmentation_losses(
    prior_logits: Tensor,
    mask_logits: Tensor,
    target: Tensor,
    inside: Tensor,
    weights: SegmentationLossWeights,
) -> dict[str, Mean]:
    """Compute the parts of the segmentation loss that have a weight.

    Args:
        prior_logits: (N, 1, M, M), before the padding is masked.
        mask_logits: (N, 1, M, M).
        target: (N, 1, M, M), share of each cell that the object covers, in [0, 1].
        inside: (N, 1, M, M), 1 for cells of the image and 0 for padding.
        weights: which parts are wanted.

    Returns:
        Part to its mean over the targets; a part's name is its field in ``weights``.
    """
    losses = target_losses(prior_logits, mask_logits, target, inside, weights)
    return {name: Mean.of(loss) for name, loss in losses.items()}


def target_losses(
    prior_logits: Tensor,
    mask_logits: Tensor,
    target: Tensor,
    inside: Tensor,
    weights: SegmentationLossWeights,
) -> dict[str, Tensor]:
    """Compute the same parts, (N,) each: one loss a target."""
    parts = {
        "prior_bce": (binary_cross_entropy, prior_logits),
        "prior_dice": (dice, prior_logits),
        "mask_dice": (dice, mask_logits),
        "mask_focal": (focal, mask_logits),
        "mask_bce": (binary_cross_entropy, mask_logits),
    }
    return {
        name: loss(logits, target, inside)
        for name, (loss, logits) in parts.items()
        if getattr(weights, name) > 0
    }


def token_cross_entropy(logits: Tensor, labels: Tensor, token_weights: Tensor) -> Mean:
    """Average the cross-entropy of the next token, some tokens counting more than others.

    Args:
        logits: (T, V) scores of the next token.
        labels: int64 (T,), the token that follows.
        token_weights: (V,) weight of each token of the vocabulary as a label.
    """
    loss = F.cross_entropy(logits.float(), labels, reduction="none")
    return Mean.of(loss, token_weights[labels])


def _mean_inside(loss: Tensor, inside: Tensor) -> Tensor:
    return (loss * inside).flatten(1).sum(1) / inside.flatten(1).sum(1).clamp(min=1.0)
