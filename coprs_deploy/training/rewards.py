"""What a sampled response earns: how well its mask fits, and how well its form (paper, B.2).

    reward = 0.7 * mask score + 0.3 * format score
    mask score = 0.5 * soft IoU + 0.2 * soft dice + 0.3 * hard IoU

Masks are compared on the mask grid. The paper and its public code disagree on one point of form;
:class:`ResponseFormat` names both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from coprs_deploy.prompts import FormatViolation, Response
from coprs_deploy.training.settings import ResponseFormat, RewardWeights

SOFT_IOU_WEIGHT, SOFT_DICE_WEIGHT, HARD_IOU_WEIGHT = 0.5, 0.2, 0.3
"""Parts of the mask score (paper, B.2)."""


HARD_THRESHOLD = 0.5
"""Probability above which a cell belongs to the hard mask."""


IMPERFECT_FORMAT_SCORE = 0.9
"""Format score of a response whose form has a minor fault."""


_MINOR_FAULTS = {
    ResponseFormat.PAPER: FormatViolation.TEXT_AFTER_REFERENCE,
    ResponseFormat.PUBLIC_CODE: FormatViolation.LONG_TEXT_BETWEEN,
}


def mask_score(probabilities: Tensor, target: Tensor) -> Tensor:
    """Score predicted masks against true ones.

    Args:
        probabilities: (N, M, M) float in [0, 1], ``sigmoid`` of the mask logits; 0 in the padding.
        target: (N, M, M) float in [0, 1], share of each cell that the object covers.

    Returns:
        (N,) scores in [0, 1]: 1 for identical masks of zeros and ones, 0 for disjoint ones; two
        empty masks are identical.

    Raises:
        ValueError: the shapes differ.
    """
    if probabilities.shape != target.shape:
        raise ValueError(
            f"probabilities are {tuple(probabilities.shape)}, target is {tuple(target.shape)}; "
            "they must have one shape"
        )
    soft, truth = probabilities.float().flatten(1), target.float().flatten(1)
    hard, hard_truth = (soft > HARD_THRESHOLD).float(), (truth > HARD_THRESHOLD).float()
    overlap, total = (soft * truth).sum(1), (soft + truth).sum(1)
    hard_overlap = (hard * hard_truth).sum(1)
    hard_union = (hard + hard_truth).sum(1) - hard_overlap
    return (
        SOFT_IOU_WEIGHT * _ratio(overlap, total - overlap)
        + SOFT_DICE_WEIGHT * _ratio(2 * overlap, total)
        + HARD_IOU_WEIGHT * _ratio(hard_overlap, hard_union)
    )


def format_score(
    response: Response,
    convention: ResponseFormat = ResponseFormat.PAPER,
    num_targets: int = 1,
) -> float:
    """Score the form of a response.

    Args:
        response: read from its token ids (the text alone would have lost ``<REF_POS>``).
        convention: the paper's or its public code's.
        num_targets: how many ``<REF_POS>`` the response should hold; 0 where nothing matches.

    Returns:
        0 unless there is one thought that says something, and after it ``num_targets`` times
        ``<REF_POS>``; 0.9 for a minor fault; else 1.

    Raises:
        ValueError: num_targets is negative.
    """
    if num_targets < 0:
        raise ValueError(f"num_targets is {num_targets}; it must not be negative")
    faults = set(response.format_violations)
    if len(response.reference_positions) == num_targets:
        faults -= {FormatViolation.SEVERAL_REFERENCES, FormatViolation.NO_REFERENCE}
    elif num_targets != 1:
        return 0.0
    if any(fault.is_fatal for fault in faults):
        return 0.0
    minor = {
        FormatViolation.LONG_REASONING,
        FormatViolation.TEXT_BEFORE_REASONING,
        _MINOR_FAULTS[convention],
    }
    return IMPERFECT_FORMAT_SCORE if faults & minor else 1.0


def total_reward(
    mask_scores: Tensor, format_scores: Tensor, weights: RewardWeights | None = None
) -> Tensor:
    """Mix both scores; (N,) each, in [0, 1]."""
    weights = weights or RewardWeights()
    return weights.mask * mask_scores + (1 - weights.mask) * format_scores


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """Divide; nothing over nothing is 1, since two empty masks are the same."""
    return torch.where(whole > 0, part / whole.clamp(min=torch.finfo(whole.dtype).tiny), 1.0)
