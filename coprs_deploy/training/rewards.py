"""Rewards of a completion: mask score and format score (paper, B.2), and a length score.

    reward = 0.7 * mask score + 0.3 * format score, unless the recipe has other weights
    mask score = 0.5 * soft IoU + 0.2 * soft dice + 0.3 * hard IoU

Masks are compared on the mask grid. The paper and its public code differ in one format rule; see
:class:`ResponseFormat`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from coprs_deploy.prompts import FormatViolation, Response
from coprs_deploy.training.settings import ResponseFormat

SOFT_IOU_WEIGHT, SOFT_DICE_WEIGHT, HARD_IOU_WEIGHT = 0.5, 0.2, 0.3
"""Parts of the mask score (paper, B.2)."""

HARD_THRESHOLD = 0.5
"""Probability threshold of the hard mask."""

IMPERFECT_FORMAT_SCORE = 0.9
"""Format score of a response with a minor violation."""

_MINOR_VIOLATIONS = {
    ResponseFormat.PAPER: FormatViolation.TEXT_AFTER_REFERENCE,
    ResponseFormat.PUBLIC_CODE: FormatViolation.LONG_TEXT_BETWEEN,
}


def mask_score(probabilities: Tensor, target: Tensor) -> Tensor:
    """Score predicted masks against the ground truth.

    Args:
        probabilities: (N, M, M) float in [0, 1], ``sigmoid`` of the mask logits; 0 in the padding.
        target: (N, M, M) float in [0, 1], share of each cell covered by the object.

    Returns:
        (N,) scores in [0, 1]: 1 for identical binary masks (two empty ones included), 0 for
        disjoint ones.

    Raises:
        ValueError: the shapes differ.
    """
    if probabilities.shape != target.shape:
        raise ValueError(
            f"target has shape {tuple(target.shape)}; accepted: the shape of probabilities, "
            f"{tuple(probabilities.shape)}"
        )
    soft, gt = probabilities.float().flatten(1), target.float().flatten(1)
    hard, hard_gt = (soft > HARD_THRESHOLD).float(), (gt > HARD_THRESHOLD).float()
    overlap, total = (soft * gt).sum(1), (soft + gt).sum(1)
    hard_overlap = (hard * hard_gt).sum(1)
    hard_union = (hard + hard_gt).sum(1) - hard_overlap
    return (
        SOFT_IOU_WEIGHT * _ratio(overlap, total - overlap)
        + SOFT_DICE_WEIGHT * _ratio(2 * overlap, total)
        + HARD_IOU_WEIGHT * _ratio(hard_overlap, hard_union)
    )


def format_score(
    response: Response,
    response_format: ResponseFormat = ResponseFormat.PAPER,
    num_targets: int = 1,
) -> float:
    """Score the format of a response.

    Args:
        response: response parsed from token ids (decoded text would have lost ``<REF_POS>``).
        response_format: format rules of the paper or of its public code.
        num_targets: required number of ``<REF_POS>``; 0 for no-match.

    Returns:
        0 unless there is exactly one non-empty reasoning, followed by ``num_targets`` times
        ``<REF_POS>``; 0.9 with a minor violation; else 1.

    Raises:
        ValueError: num_targets is negative.
    """
    if num_targets < 0:
        raise ValueError(f"num_targets is {num_targets}; accepted: 0 or more")
    violations = set(response.format_violations)
    if len(response.reference_positions) == num_targets:
        violations -= {FormatViolation.SEVERAL_REFERENCES, FormatViolation.NO_REFERENCE}
    elif num_targets != 1:
        return 0.0
    if any(violation.is_fatal for violation in violations):
        return 0.0
    minor = {
        FormatViolation.LONG_REASONING,
        FormatViolation.TEXT_BEFORE_REASONING,
        _MINOR_VIOLATIONS[response_format],
    }
    return IMPERFECT_FORMAT_SCORE if violations & minor else 1.0


def length_score(num_tokens: int, max_tokens: int, mask_score: float) -> float:
    """Score concise reasoning: 1 for none of it, 0 from ``max_tokens`` on, times the mask score.

    A short response with a wrong mask gains nothing. This score is an addition of this project.

    Raises:
        ValueError: max_tokens is not positive.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}; accepted: 1 or more")
    return mask_score * max(0.0, 1 - num_tokens / max_tokens)


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """Divide; 0 over 0 is 1: two empty masks are identical."""
    return torch.where(whole > 0, part / whole.clamp(min=torch.finfo(whole.dtype).tiny), 1.0)
