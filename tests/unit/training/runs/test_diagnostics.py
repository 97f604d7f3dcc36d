"""Warnings from the log of a stage."""

import pytest

from coprs_deploy.training.runs.diagnostics import Diagnostics, warnings_of
from coprs_deploy.training.settings import GrpoSettings, SupervisedSettings

SETTINGS = GrpoSettings(max_steps=9, beta=0.2)

GOOD = {"loss": 0.1, "completions/clipped_ratio": 0.1, "frac_reward_zero_std": 0.2, "kl": 0.01}


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("completions/clipped_ratio", 0.75, "75% of the completions in the last 3 lines were cut"),
        ("frac_reward_zero_std", 1.0, "in 100% of the groups of the last 3 lines"),
        ("kl", 3.0, "the KL divergence is 3 in the last 3 lines"),
    ],
)
def test_condition_is_named_once_when_it_begins(key, value, text):
    diagnostics = Diagnostics("grpo", SETTINGS)
    found = [diagnostics.add(GOOD | {key: value}) for _ in range(5)]
    assert [len(each) for each in found] == [0, 0, 1, 0, 0]
    assert text in found[2][0]


def test_condition_is_named_again_after_it_ended():
    diagnostics = Diagnostics("grpo", SETTINGS)
    clipped = GOOD | {"completions/clipped_ratio": 1.0}
    lines = [clipped] * 3 + [GOOD] * 5 + [clipped] * 5
    assert [n for n, line in enumerate(lines) if diagnostics.add(line)] == [2, 10]


@pytest.mark.parametrize("settings", [SETTINGS, SupervisedSettings(max_steps=9)])
def test_loss_that_is_not_finite_is_named_at_once(settings):
    (text,) = Diagnostics("one", settings).add({"loss": float("nan"), "grad_norm": 1.0})
    assert "loss is nan; the training has diverged" in text


def test_good_lines_and_a_run_without_reference_give_no_warning():
    lines = [{"stage": "one", "step": step, **GOOD} for step in range(9)]
    assert warnings_of("one", SETTINGS, lines) == []
    without = GrpoSettings(max_steps=9, beta=0)
    assert warnings_of("one", without, [line | {"kl": 9.0} for line in lines]) == []


def test_warnings_of_names_the_step_and_skips_other_lines():
    lines = [{"stage": "one", "step": step, "loss": 1.0, "kl": 9.0} for step in (1, 2, 3)]
    lines += [{"stage": "one", "step": 3, "eval/kl": 9.0}, {"stage": "two", "step": 4, "loss": 1.0}]
    (text,) = warnings_of("one", SETTINGS, lines)
    assert text.startswith("Step 3: the KL divergence is 9")
