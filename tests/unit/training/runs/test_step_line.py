"""Lines on stderr."""

import pytest

from coprs_deploy.training.runs.step_line import (
    duration,
    evaluation_text,
    progress_text,
    step_text,
)


def test_step_text_of_grpo_has_rewards_divergence_lengths_and_rates():
    line = {
        "loss": 0.0633,
        "reward": 0.924,
        "rewards/mask/mean": 0.89,
        "rewards/mask/std": 0.1,
        "rewards/format/mean": 1.0,
        "kl": 0.0123,
        "completions/mean_length": 39.4,
        "completions/clipped_ratio": 0.75,
        "grad_norm": 0.131,
        "learning_rate/policy": 9.2e-4,
        "learning_rate/prior": 1e-3,
    }
    assert step_text(line) == (
        "reward 0.924 (mask 0.89, format 1.00)  loss 0.0633  kl 0.012  length 39, cut off 75%  "
        "grad_norm 0.13  lr 9.2e-04"
    )


def test_step_text_of_a_supervised_stage_has_the_losses():
    line = {
        "loss": 0.5,
        "loss/language": 0.4,
        "loss/mask_dice": 0.1,
        "loss/auxiliary.color": 2.0,
        "grad_norm": 1.0,
        "learning_rate": 1e-4,
    }
    assert step_text(line) == (
        "loss 0.5000 (language 0.400, mask_dice 0.100)  grad_norm 1  lr 1.0e-04"
    )


def test_evaluation_text_leaves_out_question_types_and_errors():
    metrics = {"giou": 0.5, "giou_stderr": 0.1, "relation.giou": 0.2}
    assert evaluation_text(metrics) == "eval: giou 0.500"


def test_progress_text_counts_the_steps_of_this_run():
    assert progress_text(20.0, 10, 100, 1_500_000_000) == "1.50 GB  2 s/step  3 min 20 s left"
    assert progress_text(20.0, 10, 0, 500_000_000).endswith("2 s/step  done")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(7, "7 s"), (67, "1 min 07 s"), (7500, "2 h 05 min"), (273_600, "3 d 4 h")],
)
def test_duration_has_two_units(seconds, text):
    assert duration(seconds) == text
