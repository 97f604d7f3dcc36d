"""Muon: its steps are PyTorch's own but for rounding, and it goes on from a saved state."""

import copy

import pytest
import torch

from coprs_deploy.training.optim import Muon, orthogonalize

SHAPES = [(24, 16), (16, 24), (24, 16), (12, 12)]
BF16_ROUNDING = 1e-3
"""Of PyTorch's own, beside movements of about 2e-2 in five steps."""


def weights_of(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def move(optimizer, weights, steps, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()


def test_singular_values_end_near_one():
    matrices = torch.randn(3, 20, 50, generator=torch.Generator().manual_seed(0))
    for shaped in (matrices, matrices.mT):
        values = torch.linalg.svdvals(orthogonalize(shaped, 5))
        assert values.min() > 0.5
        assert values.max() < 1.3


def test_a_zero_gradient_moves_nothing():
    assert not orthogonalize(torch.zeros(1, 4, 6), 4).any()


def test_its_steps_are_those_of_pytorch():
    ours, theirs = weights_of(0), weights_of(0)
    move(Muon([{"params": ours}], lr=0.01, weight_decay=0.01), ours, 5)
    reference = torch.optim.Muon(
        theirs, lr=0.01, weight_decay=0.01, ns_steps=4, adjust_lr_fn="match_rms_adamw"
    )
    move(reference, theirs, 5)
    for one, other, start in zip(ours, theirs, weights_of(0), strict=True):
        assert (one - other).abs().max() < BF16_ROUNDING
        assert (one - start).abs().max() > 10 * BF16_ROUNDING


def test_a_saved_state_goes_on_to_the_last_digit():
    whole, halves = weights_of(0), weights_of(0)
    undisturbed = Muon([{"params": whole}])
    first = Muon([{"params": halves}])
    for optimizer, weights in ((undisturbed, whole), (first, halves)):
        move(optimizer, weights, 2)
    second = Muon([{"params": halves}])
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for optimizer, weights in ((undisturbed, whole), (second, halves)):
        move(optimizer, weights, 2, seed=2)
    assert all(torch.equal(one, other) for one, other in zip(whole, halves, strict=True))


def test_what_is_no_matrix_is_not_taken():
    with pytest.raises(AssertionError, match="moves matrices"):
        Muon([{"params": [torch.nn.Parameter(torch.zeros(3))]}])
