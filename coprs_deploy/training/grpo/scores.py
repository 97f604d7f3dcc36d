"""From sampled responses and their masks to scores, and to segmentation losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from coprs_deploy.prompts import Response, read_response
from coprs_deploy.training.grpo.batch import GroundTruth
from coprs_deploy.training.losses import Mean, target_losses
from coprs_deploy.training.mask_decoding import intersection_over_union
from coprs_deploy.training.rewards import format_score, mask_score
from coprs_deploy.training.settings import ResponseFormat, SegmentationLossWeights


class DecodedMasks(NamedTuple):
    """What the segmentation path gave for B responses.

    Attributes:
        prior_logits: (B, K, M, M).
        mask_logits: (B, K, M, M).
        is_found: bool (B, K), whether the response holds the ``<REF_POS>``.
    """

    prior_logits: Tensor
    mask_logits: Tensor
    is_found: Tensor


class ResponseReader:
    """Reads responses by token ids: decoded text would have lost ``<REF_POS>``.

    Args:
        reference_id: id of ``<REF_POS>``.
        decode: token ids to text, special tokens left out.
        convention: which convention judges the form.
    """

    def __init__(
        self,
        reference_id: int,
        decode: Callable[[Sequence[int]], str],
        convention: ResponseFormat,
    ) -> None:
        self._reference_id = reference_id
        self._decode = decode
        self._convention = convention

    def read(self, ids: Sequence[int]) -> Response:
        """Read one response."""
        return read_response(ids, self._reference_id, self._decode)

    def format_scores(
        self, responses: Sequence[Sequence[int]], num_targets: Sequence[int]
    ) -> list[float]:
        """Score the form of each response, given how many targets there are."""
        return [
            format_score(self.read(ids), self._convention, count)
            for ids, count in zip(responses, num_targets, strict=True)
        ]


def mask_scores(decoded: DecodedMasks, truth: GroundTruth) -> Tensor:
    """Score the masks of responses, (B,) in [0, 1].

    The mean over a prompt's targets, 0 for one that was not named. Where nothing matches, a
    response that names nothing has 1, any other 0.
    """
    rows, targets = decoded.is_found.shape
    probabilities = decoded.mask_logits.float().sigmoid() * truth.inside
    scores = mask_score(probabilities.flatten(0, 1), truth.masks.flatten(0, 1))
    counted = scores.view(rows, targets) * decoded.is_found * truth.is_target
    mean = counted.sum(1) / truth.num_targets.clamp(min=1)
    refused = (~decoded.is_found.any(1)).float()
    return torch.where(truth.num_targets > 0, mean, refused)


def overlaps(decoded: DecodedMasks, truth: GroundTruth) -> dict[str, Mean]:
    """Compare priors and masks with the truth on the mask grid, where there is something."""
    wanted = truth.is_target
    if not wanted.any():
        nothing = decoded.mask_logits.new_zeros(())
        return {name: Mean(nothing, nothing) for name in ("mask_iou", "prior_iou")}
    hidden = -torch.finfo(torch.float32).max
    inside = (truth.inside > 0).expand_as(decoded.mask_logits)
    figures = {}
    for name, logits in (
        ("mask_iou", decoded.mask_logits),
        ("prior_iou", decoded.prior_logits),
    ):
        shown = torch.where(inside, logits.detach().float(), hidden)[wanted]
        iou = intersection_over_union(shown[:, None], truth.masks[wanted] > 0.5)
        figures[name] = Mean.of(iou * decoded.is_found[wanted])
    return figures


def row_losses(
    decoded: DecodedMasks, truth: GroundTruth, weights: SegmentationLossWeights
) -> dict[str, Tensor]:
    """Compute the segmentation losses of the rows, () each: the sum over rows with a target.

    The targets of a row are averaged first (paper, eq. 8: per image, then over the batch). A target
    that was not named was decoded from a zero state and counts (public code).
    """
    wanted = truth.is_target
    row = torch.nonzero(wanted)[:, 0]
    share = 1 / truth.num_targets[row].float()
    inside = truth.inside[row]
    prior, mask = decoded.prior_logits[wanted][:, None], decoded.mask_logits[wanted][:, None]
    target = truth.masks[wanted][:, None]
    return {
        name: (loss * share).sum()
        for name, loss in target_losses(prior, mask, target, inside, weights).items()
    }
