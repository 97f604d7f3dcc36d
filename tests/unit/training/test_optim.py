"""Muon against PyTorch's own, and the learning-rate schedule."""

import copy
import math
from itertools import pairwise

import pytest
import torch

from coprs_deploy.training.lr_schedule import lr_factor
from coprs_deploy.training.optim import Muon, orthogonalize
from coprs_deploy.training.settings import PAPER_OPTIMIZER, Optimizer

SHAPES = [(24, 16), (16, 24), (24, 16), (12, 12)]
BF16_ROUNDING = 1e-3
"""Rounding of PyTorch's own, beside updates of about 2e-2 in five steps."""


def build_weights(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def update(optimizer, weights, steps, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()


def test_orthogonalize_brings_singular_values_near_one():
    matrices = torch.randn(3, 20, 50, generator=torch.Generator().manual_seed(0))
    for shaped in (matrices, matrices.mT):
        values = torch.linalg.svdvals(orthogonalize(shaped))
        assert values.min() > 0.5
        assert values.max() < 1.3


def test_orthogonalize_of_zero_is_zero():
    assert not orthogonalize(torch.zeros(1, 4, 6)).any()


def test_muon_steps_are_those_of_pytorch():
    ours, theirs = build_weights(0), build_weights(0)
    update(Muon([{"params": ours, "lr": 0.01}], weight_decay=0.01), ours, 5)
    reference = torch.optim.Muon(
        theirs, lr=0.01, weight_decay=0.01, ns_steps=4, adjust_lr_fn="match_rms_adamw"
    )
    update(reference, theirs, 5)
    for one, other, start in zip(ours, theirs, build_weights(0), strict=True):
        assert (one - other).abs().max() < BF16_ROUNDING
        assert (one - start).abs().max() > 10 * BF16_ROUNDING


def test_muon_from_a_saved_state_gives_identical_weights():
    whole, halves = build_weights(0), build_weights(0)
    undisturbed = Muon([{"params": whole, "lr": 0.01}])
    first = Muon([{"params": halves, "lr": 0.01}])
    for optimizer, weights in ((undisturbed, whole), (first, halves)):
        update(optimizer, weights, 2)
    second = Muon([{"params": halves, "lr": 0.01}])
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for optimizer, weights in ((undisturbed, whole), (second, halves)):
        update(optimizer, weights, 2, seed=2)
    assert all(torch.equal(one, other) for one, other in zip(whole, halves, strict=True))


def test_muon_of_a_vector_is_refused():
    with pytest.raises(AssertionError, match="updates matrices"):
        Muon([{"params": [torch.nn.Parameter(torch.zeros(3))]}])


def test_lr_factor_linear_has_warmup_plateau_and_decay():
    settings = Optimizer(warmup_steps=10, lr_decay_ratio=0.5, min_lr_ratio=0.02)
    factors = [lr_factor(settings, step, 100) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9:50] == [1.0] * 41
    assert factors[75] == pytest.approx(0.5)
    assert factors[99] == pytest.approx(0.02)
    assert all(a >= b for a, b in pairwise(factors[50:]))


def test_lr_factor_of_the_paper_is_a_cosine_without_warmup():
    assert lr_factor(PAPER_OPTIMIZER, 0, 1000) == pytest.approx(1.0)
    middle = PAPER_OPTIMIZER.min_lr_ratio + (1 - PAPER_OPTIMIZER.min_lr_ratio) / 2
    assert lr_factor(PAPER_OPTIMIZER, 500, 1000) == pytest.approx(middle)
    assert lr_factor(PAPER_OPTIMIZER, 1000, 1000) == pytest.approx(1 / 6.7, abs=1e-4)
    assert math.isfinite(lr_factor(PAPER_OPTIMIZER, 999, 1000))
