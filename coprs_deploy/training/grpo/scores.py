"""Scores and segmentation losses of completions and their decoded masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from coprs_deploy.prompts import REFERENCE_TOKEN, Response, read_response
from coprs_deploy.training.grpo.batch import GroundTruth
from coprs_deploy.training.losses import Mean, segmentation_losses
from coprs_deploy.training.mask_decoding import intersection_over_union
from coprs_deploy.training.rewards import format_score, length_score, mask_score
from coprs_deploy.training.settings import GrpoSettings, ResponseFormat, SegmentationLossWeights
from coprs_deploy.training.truncation import ReasoningTruncator


class DecodedMasks(NamedTuple):
    """Decoded priors and masks of B completions, (B, K, M, M) each.

    ``is_found``, bool (B, K), says whether the completion has this ``<REF_POS>``.
    """

    prior_logits: Tensor
    mask_logits: Tensor
    is_found: Tensor


class ResponseReader:
    """Parse completions from token ids: decoded text would have lost ``<REF_POS>``."""

    def __init__(self, tokenizer: Any, response_format: ResponseFormat) -> None:
        self._tokenizer, self._response_format = tokenizer, response_format
        self._reference_id = tokenizer.convert_tokens_to_ids(REFERENCE_TOKEN)

    def read(self, ids: Sequence[int]) -> Response:
        """Parse one completion."""
        return read_response(
            ids,
            self._reference_id,
            lambda ids: self._tokenizer.decode(list(ids), skip_special_tokens=True),
        )

    def format_scores(
        self, completions: Sequence[Sequence[int]], num_targets: Sequence[int]
    ) -> list[float]:
        """Return the format score of each completion, given its number of targets."""
        return [
            format_score(self.read(ids), self._response_format, count)
            for ids, count in zip(completions, num_targets, strict=True)
        ]


def length_scores(
    completions: Sequence[Sequence[int]],
    scores: Sequence[float],
    truncator: ReasoningTruncator,
    settings: GrpoSettings,
) -> list[float]:
    """Return the length score of each completion, given its mask score."""
    most = settings.length_reward_tokens
    return [
        length_score(len(truncator.columns(ids)), most, score)
        for ids, score in zip(completions, scores, strict=True)
    ]


def total_rewards(
    settings: GrpoSettings,
    scores: Sequence[float],
    formats: Sequence[float],
    lengths: Sequence[float],
) -> list[float]:
    """Return the weighted sum of mask, format and length scores of each completion."""
    weights = settings.reward_weights
    return [
        weights.mask * score + weights.format * of_format + weights.length * of_length
        for score, of_format, of_length in zip(scores, formats, lengths, strict=True)
    ]


def mask_scores(decoded: DecodedMasks, gt: GroundTruth) -> Tensor:
    """Return the mask score of each completion, (B,) in [0, 1].

    The mean over the targets of the prompt; a target without ``<REF_POS>`` scores 0. For a no-match
    prompt, a completion without ``<REF_POS>`` scores 1, any other 0.
    """
    rows, targets = decoded.is_found.shape
    probabilities = decoded.mask_logits.float().sigmoid() * gt.counted
    scores = mask_score(probabilities.flatten(0, 1), (gt.masks * gt.counted).flatten(0, 1))
    counted = scores.view(rows, targets) * decoded.is_found * gt.is_target
    mean = counted.sum(1) / gt.num_targets.clamp(min=1)
    has_no_reference = (~decoded.is_found.any(1)).float()
    return torch.where(gt.num_targets > 0, mean, has_no_reference)


def grid_ious(decoded: DecodedMasks, gt: GroundTruth) -> dict[str, Mean]:
    """Compute the IoU of masks and priors of sampled completions on the mask grid.

    ``sampled_giou`` and ``sampled_prior_giou`` are means over the targets of all rows; a target
    without ``<REF_POS>`` counts as 0.
    """
    is_target = gt.is_target
    if not is_target.any():
        nothing = decoded.mask_logits.new_zeros(())
        return {name: Mean(nothing, nothing) for name in ("sampled_giou", "sampled_prior_giou")}
    outside = -torch.finfo(torch.float32).max
    counted = (gt.counted > 0.5).expand_as(decoded.mask_logits)
    metrics = {}
    for name, logits in (
        ("sampled_giou", decoded.mask_logits),
        ("sampled_prior_giou", decoded.prior_logits),
    ):
        visible = torch.where(counted, logits.detach().float(), outside)[is_target]
        iou = intersection_over_union(visible[:, None], ((gt.masks > 0.5) & counted)[is_target])
        metrics[name] = Mean.of(iou * decoded.is_found[is_target])
    return metrics


def row_losses(
    decoded: DecodedMasks, gt: GroundTruth, weights: SegmentationLossWeights
) -> dict[str, Tensor]:
    """Compute the segmentation losses, () each: the sum over rows with a target.

    The targets of a row are averaged first (paper, eq. 8: per image, then over the batch). A target
    without ``<REF_POS>`` is decoded from a zero state and counts (public code).
    """
    is_target = gt.is_target
    row = torch.nonzero(is_target)[:, 0]
    share = 1 / gt.num_targets[row].float()
    counted = gt.counted[row]
    prior = decoded.prior_logits[is_target][:, None]
    mask = decoded.mask_logits[is_target][:, None]
    target = gt.masks[is_target][:, None]
    losses = segmentation_losses(prior, mask, target, counted, weights, target_weights=share)
    return {name: mean.total for name, mean in losses.items()}
