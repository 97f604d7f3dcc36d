"""Rewards: worked values of the paper, bounds, symmetry, and every format rule."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coprs_deploy.prompts import read_response
from coprs_deploy.training.rewards import format_score, length_score, mask_score
from coprs_deploy.training.settings import ResponseFormat, RewardWeights

REFERENCE = 0


def square(left, top=0, side=128, grid=256):
    mask = torch.zeros(1, grid, grid)
    mask[0, top : top + side, left : left + side] = 1
    return mask


def respond(text):
    """Parse a response with one token per letter, ``<REF_POS>`` being one token."""
    pieces = text.split("<REF_POS>")
    ids = [ord(letter) for letter in pieces[0]]
    for piece in pieces[1:]:
        ids += [REFERENCE, *(ord(letter) for letter in piece)]
    return read_response(ids, REFERENCE, lambda part: "".join(map(chr, part)))


class TestMaskScore:
    def test_mask_score_of_identical_masks_is_one(self):
        assert mask_score(square(0), square(0)).item() == pytest.approx(1)

    def test_mask_score_of_a_square_shifted_by_half_its_side(self):
        # Soft and hard IoU are 1/3, dice is 1/2.
        expected = 0.5 / 3 + 0.2 * 0.5 + 0.3 / 3
        assert mask_score(square(0), square(64)).item() == pytest.approx(expected)
        assert expected == pytest.approx(0.3667, abs=1e-4)

    def test_mask_score_of_disjoint_masks_is_zero(self):
        assert mask_score(square(0), square(128)).item() == 0

    def test_mask_score_of_two_empty_masks_is_one(self):
        nothing = torch.zeros(1, 8, 8)
        assert mask_score(nothing, nothing).item() == pytest.approx(1)
        assert mask_score(nothing, square(0, side=4, grid=8)).item() == 0

    def test_mask_score_of_a_batch_scores_each_mask(self):
        both = mask_score(torch.cat([square(0), square(0)]), torch.cat([square(0), square(64)]))
        assert both.tolist() == pytest.approx([1, 0.36667], abs=1e-4)

    def test_mask_score_of_different_shapes_is_refused(self):
        with pytest.raises(ValueError, match="accepted: the shape of probabilities"):
            mask_score(torch.zeros(1, 4, 4), torch.zeros(2, 4, 4))

    @settings(max_examples=60, deadline=None)
    @given(st.integers(0, 2**32 - 1))
    def test_mask_score_is_bounded_and_symmetric(self, seed):
        generator = torch.Generator().manual_seed(seed)
        one, other = torch.rand(2, 3, 6, 6, generator=generator)
        score = mask_score(one, other)
        assert ((score >= 0) & (score <= 1)).all()
        assert torch.allclose(score, mask_score(other, one))

    @settings(max_examples=40, deadline=None)
    @given(st.integers(0, 2**32 - 1))
    def test_mask_score_never_falls_with_more_of_the_ground_truth(self, seed):
        generator = torch.Generator().manual_seed(seed)
        gt = (torch.rand(1, 6, 6, generator=generator) > 0.5).float()
        part = gt * (torch.rand(1, 6, 6, generator=generator) > 0.5)
        more = torch.maximum(part, gt * (torch.rand(1, 6, 6, generator=generator) > 0.5))
        assert mask_score(more, gt) >= mask_score(part, gt)


class TestFormatScore:
    @pytest.mark.parametrize(
        ("text", "paper", "public_code"),
        [
            ("<think>here</think><REF_POS>", 1, 1),
            ("<think>here</think> so: <REF_POS>", 1, 1),
            ("here<REF_POS>", 0, 0),
            ("<think> \n</think><REF_POS>", 0, 0),
            ("<think>here</think>", 0, 0),
            ("<think>here</think><REF_POS><REF_POS>", 0, 0),
            ("<think>a</think><think>b</think><REF_POS>", 0, 0),
            ("<REF_POS><think>here</think>", 0, 0),
            (f"<think>{'x' * 2048}</think><REF_POS>", 1, 1),
            (f"<think>{'x' * 2049}</think><REF_POS>", 0.9, 0.9),
            ("Well. <think>here</think><REF_POS>", 0.9, 0.9),
            (" \n<think>here</think><REF_POS> \n", 1, 1),
            ("<think>here</think><REF_POS> done", 0.9, 1),
            (f"<think>here</think>{' word' * 10}<REF_POS>", 1, 1),
            (f"<think>here</think>{' word' * 11}<REF_POS>", 1, 0.9),
        ],
    )
    def test_format_score_of_every_case_in_both_formats(self, text, paper, public_code):
        response = respond(text)
        assert format_score(response) == paper
        assert format_score(response, ResponseFormat.PUBLIC_CODE) == public_code

    @pytest.mark.parametrize(("count", "score"), [(1, 0), (2, 1), (3, 0)])
    def test_format_score_requires_as_many_references_as_targets(self, count, score):
        response = respond(f"<think>here</think>{'<REF_POS>' * count}")
        assert format_score(response, num_targets=2) == score

    @pytest.mark.parametrize(
        ("text", "score"),
        [
            ("<think>nothing is red</think>", 1),
            ("<think>nothing is red</think> None.", 1),
            ("<think>nothing is red</think><REF_POS>", 0),
            ("nothing is red", 0),
        ],
    )
    def test_format_score_of_no_match_requires_no_reference(self, text, score):
        assert format_score(respond(text), num_targets=0) == score

    def test_format_score_of_negative_targets_is_refused(self):
        with pytest.raises(ValueError, match="num_targets is -1"):
            format_score(respond("<think>x</think><REF_POS>"), num_targets=-1)


def test_length_score_rewards_concise_reasoning_with_a_right_mask():
    assert [length_score(n, 50, 1.0) for n in (0, 10, 50, 80)] == pytest.approx([1, 0.8, 0, 0])
    assert length_score(0, 50, 0.0) == 0
    assert length_score(25, 50, 0.8) == pytest.approx(0.4)
    with pytest.raises(ValueError, match="max_tokens is 0; accepted: 1 or more"):
        length_score(1, 0, 1.0)


def test_reward_weights_with_a_length_weight_add_up_to_one():
    assert RewardWeights(mask=0.6, format=0.3, length=0.1).length == 0.1
    with pytest.raises(ValueError, match=r"length = 0\.1 .*add up to 1"):
        RewardWeights(mask=0.7, format=0.3, length=0.1)


@pytest.mark.parametrize(("mask", "format_weight"), [(1.2, -0.2), (0.5, 0.3), (0.7, 0.7)])
def test_reward_weights_that_do_not_add_up_to_one_are_refused(mask, format_weight):
    with pytest.raises(ValueError, match=r"add up to 1|<= 1"):
        RewardWeights.from_json({"mask": mask, "format": format_weight})
