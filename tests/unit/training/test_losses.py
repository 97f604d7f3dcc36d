"""Losses on values computed by hand."""

import math

import pytest
import torch

from coprs_deploy.training.losses import (
    Mean,
    binary_cross_entropy,
    dice,
    focal,
    inside_image,
    segmentation_losses,
    token_cross_entropy,
    token_kl_divergence,
)
from coprs_deploy.training.settings import SegmentationLossWeights

EVERYWHERE = torch.ones(1, 1, 2, 2)


def test_binary_cross_entropy_of_zero_logits_is_log_two():
    loss = binary_cross_entropy(torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2), EVERYWHERE)
    assert loss.tolist() == pytest.approx([math.log(2)])


def test_dice_of_probability_one_half():
    # 4 cells at 0.5, the target covers 2: overlap 1, sizes 2 + 2, smoothing 1.
    target = torch.tensor([[[[1.0, 1.0], [0.0, 0.0]]]])
    loss = dice(torch.zeros(1, 1, 2, 2), target, EVERYWHERE)
    assert loss.tolist() == pytest.approx([1 - 3 / 5])


def test_focal_of_zero_logits_weighs_foreground_and_background():
    # (1 - 0.5)^2 log 2, weight 0.25 on foreground and 0.75 on background.
    target = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])
    loss = focal(torch.zeros(1, 1, 2, 2), target, EVERYWHERE)
    expected = 0.25 * math.log(2) * (0.25 + 3 * 0.75) / 4
    assert loss.tolist() == pytest.approx([expected])


def test_focal_of_a_correct_mask_is_small():
    target = torch.ones(1, 1, 2, 2)
    right = focal(torch.full((1, 1, 2, 2), 4.0), target, EVERYWHERE)
    wrong = focal(torch.full((1, 1, 2, 2), -4.0), target, EVERYWHERE)
    assert right < 1e-4 < wrong


@pytest.mark.parametrize("loss", [binary_cross_entropy, dice, focal])
def test_loss_ignores_padding(loss):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 1, 8, 8, generator=generator)
    target = (torch.rand(2, 1, 8, 8, generator=generator) > 0.5).float()
    inside = inside_image(torch.tensor([[16, 32], [32, 9]]), mask_size=8, mask_stride=4)
    cropped = loss(logits[:1, :, :4], target[:1, :, :4], torch.ones(1, 1, 4, 8))
    changed = torch.where(inside > 0, logits, 100.0)
    assert torch.allclose(loss(changed, target, inside), loss(logits, target, inside))
    assert torch.allclose(loss(changed, target, inside)[0], cropped[0])


def test_inside_image_keeps_the_cell_of_the_last_pixel():
    inside = inside_image(torch.tensor([[16, 9]]), mask_size=8, mask_stride=4)
    assert inside[0, 0].sum(0).tolist() == [4, 4, 4, 0, 0, 0, 0, 0]
    assert inside[0, 0].sum(1).tolist() == [3, 3, 3, 3, 0, 0, 0, 0]


def test_binary_cross_entropy_weighs_images_of_any_size_equally():
    logits, target = torch.zeros(2, 1, 8, 8), torch.zeros(2, 1, 8, 8)
    logits[1] = 3.0
    inside = inside_image(torch.tensor([[32, 32], [8, 8]]), mask_size=8, mask_stride=4)
    mean = binary_cross_entropy(logits, target, inside).mean()
    assert mean.item() == pytest.approx((math.log(2) + math.log(1 + math.exp(3))) / 2, rel=1e-5)


def test_segmentation_losses_without_weight_are_not_computed():
    weights = SegmentationLossWeights(prior_bce=1.0, mask_dice=3.0, mask_focal=10.0)
    zeros = torch.zeros(3, 1, 4, 4)
    parts = segmentation_losses(zeros, zeros, zeros, torch.ones_like(zeros), weights)
    assert set(parts) == {"prior_bce", "mask_dice", "mask_focal"}
    assert all(mean.weight.item() == 3 for mean in parts.values())


def test_loss_weights_below_zero_raise():
    with pytest.raises(ValueError, match=r">= 0.*mask_dice"):
        SegmentationLossWeights.from_json({"mask_dice": -1.0})


def test_token_cross_entropy_of_double_weight_counts_twice():
    logits = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    mean = token_cross_entropy(logits, torch.tensor([0, 1]), torch.tensor([1.0, 2.0]))
    expected = (math.log(2) + 2 * math.log(1 + math.exp(2))) / 3
    assert (mean.total / mean.weight).item() == pytest.approx(expected, rel=1e-6)


def test_token_kl_divergence_is_measured_from_the_reference():
    logits, reference = (
        torch.tensor([[0.0, 0.0], [1.0, 2.0]]),
        torch.tensor([[2.0, 0.0], [1.0, 2.0]]),
    )
    mean = token_kl_divergence(logits, reference, torch.tensor([3.0, 1.0]))
    likely = 1 / (1 + math.exp(-2))
    entropy = -likely * math.log(likely) - (1 - likely) * math.log(1 - likely)
    assert (mean.total / mean.weight).item() == pytest.approx(3 * (math.log(2) - entropy) / 4)


def test_mean_of_parts_adds_up():
    values, weights = torch.arange(6.0), torch.tensor([1.0, 2, 1, 1, 3, 1])
    whole = Mean.of(values, weights)
    first, second = Mean.of(values[:2], weights[:2]), Mean.of(values[2:], weights[2:])
    joined = Mean(first.total + second.total, first.weight + second.weight)
    assert float(joined.total / joined.weight) == pytest.approx(float(whole.total / whole.weight))
