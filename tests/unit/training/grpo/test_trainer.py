"""The joint loss: one backward pass with the sum of both losses, and the weights it updates."""

import dataclasses

import msgspec
import pytest
import torch

from coprs_deploy.training.grpo.attachment import ATTRIBUTE, reference_columns
from coprs_deploy.training.grpo.scores import row_losses
from coprs_deploy.training.lr_schedule import lr_factor
from coprs_deploy.training.settings import PAPER_OPTIMIZER, RewardWeights
from coprs_deploy.training.stage import reduce_means

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

GRADIENT_TOLERANCE = 2e-5
"""Relative difference of gradients summed in another order, float32."""


def one_batch(trainer):
    """Sample and score the first batch of the run."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    trainer.accelerator.gradient_state._set_sync_gradients(True)
    torch.manual_seed(3)
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def gradients(trainer, inputs):
    trainer.model.zero_grad(set_to_none=True)
    trainer.compute_loss(trainer.model, inputs).backward()
    return {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


def distance(actual, expected):
    names = actual.keys() | expected.keys()
    zero = torch.zeros(())
    squares = [(actual.get(n, zero) - expected.get(n, zero)).pow(2).sum() for n in names]
    return float(sum(squares) ** 0.5 / sum(g.pow(2).sum() for g in expected.values()) ** 0.5)


def vary_format_scores(setup):
    """Give the completions of a group different format scores."""
    setup.trainer.parts.reader.format_scores = lambda completions, counts: [
        float(i % 2) for i in range(len(completions))
    ]


def test_joint_trainer_on_the_demo_model_gives_full_format_reward(make_setup):
    setup = make_setup(max_steps=1, temperature=0.2)
    setup.trainer.train()
    (line,) = setup.lines
    assert line["rewards/format/mean"] == 1, "<REF_POS> was lost on the way"


@pytest.fixture
def scored_batch(make_setup):
    """A setup, and a batch with advantages other than zero."""
    setup = make_setup(
        segmentation_loss_weight=0.3, beta=0.2, global_batch_size=2, num_generations=4
    )
    inputs = one_batch(setup.trainer)
    generator = torch.Generator().manual_seed(5)
    inputs["advantages"] = torch.randn(inputs["advantages"].shape, generator=generator)
    return setup, inputs


def test_joint_gradient_is_the_sum_of_both_losses(scored_batch):
    setup, inputs = scored_batch
    trainer = setup.trainer
    whole = trainer.parts
    actual = {}
    for mode in ("joint", "rl", "segmentation"):
        settings = msgspec.structs.replace(whole.settings, mode=mode)
        trainer.parts = dataclasses.replace(whole, settings=settings)
        actual[mode] = gradients(trainer, inputs)
    zero = torch.zeros(())
    added = {
        name: actual["rl"].get(name, zero) + actual["segmentation"].get(name, zero)
        for name in actual["joint"]
    }
    assert distance(actual["joint"], added) < GRADIENT_TOLERANCE
    for part in ("rl", "segmentation"):
        assert distance(actual["joint"], actual[part]) > 1e-2, "one loss is not in the sum"
    inside = [n for n in actual["segmentation"] if "language_model" in n]
    assert any(actual["segmentation"][n].abs().max() > 0 for n in inside), (
        "the segmentation loss does not reach the policy through <REF_POS>"
    )
    assert not any(n.startswith(f"{ATTRIBUTE}.") for n in actual["rl"])


def test_segmentation_loss_equals_that_of_a_separate_forward_pass(scored_batch):
    setup, inputs = scored_batch
    trainer = setup.trainer
    rollout = trainer.rollout
    weights = trainer.parts.settings.loss_weights_at(0)
    parts = row_losses(rollout.decoded, rollout.ground_truth, weights)
    rows = (rollout.ground_truth.num_targets > 0).sum()
    expected = sum(getattr(weights, n) * loss / rows for n, loss in parts.items())
    settings = msgspec.structs.replace(trainer.parts.settings, mode="segmentation")
    trainer.parts = dataclasses.replace(trainer.parts, settings=settings)
    with torch.no_grad():
        actual = trainer.compute_loss(trainer.model, inputs)
    assert float(actual) == pytest.approx(0.3 * float(expected), rel=1e-5)


def test_create_optimizer_gives_each_part_its_learning_rate(make_setup):
    trainer = make_setup().trainer
    optimizer = trainer.create_optimizer()
    scheduler = trainer.create_scheduler(100)
    names = {id(p): n for n, p in trainer.model.named_parameters()}
    base = 1.6e-6
    rates = {
        round(group["peak_lr"] / base, 6): {
            ".".join(names[id(p)].split(".")[:2])
            if names[id(p)].startswith(ATTRIBUTE)
            else "policy"
            for p in group["params"]
        }
        for group in optimizer.param_groups
    }
    assert rates == {
        1: {"policy"},
        25: {"segmentation.prior"},
        10: {"segmentation.prompt_encoder"},
        5: {"segmentation.mask_decoder"},
    }
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0),
        max_lr=1.0,
        total_steps=100,
        pct_start=0.0,
        div_factor=1.0,
        final_div_factor=6.7,
        cycle_momentum=False,
    )
    for step in range(99):
        actual = optimizer.param_groups[0]["lr"] / optimizer.param_groups[0]["peak_lr"]
        assert actual == pytest.approx(lr_factor(trainer.parts.settings.optimizer, step, 100))
        assert actual == pytest.approx(cycle.get_last_lr()[0], abs=0.015)  # one step apart
        optimizer.step()
        cycle.optimizer.step()
        scheduler.step()
        cycle.step()


def test_loaded_state_has_the_learning_rates_of_the_recipe(make_setup, tmp_path):
    """torch stores rates in the state of an optimizer, and loads them."""
    old, new = (
        make_setup(optimizer=msgspec.structs.replace(PAPER_OPTIMIZER, learning_rate=rate)).trainer
        for rate in (1e-4, 1e-5)
    )
    for trainer in (old, new):
        trainer.create_optimizer_and_scheduler(10)
    for _ in range(3):
        old.optimizer.step()
        old.lr_scheduler.step()
    torch.save(old.optimizer.state_dict(), tmp_path / "optimizer.pt")
    torch.save(old.lr_scheduler.state_dict(), tmp_path / "scheduler.pt")
    peaks = [group["peak_lr"] for group in new.optimizer.param_groups]
    new._load_optimizer_and_scheduler(str(tmp_path))
    for step in (3, 4):
        factor = lr_factor(new.parts.settings.optimizer, step, 10)
        rates = [group["lr"] for group in new.optimizer.param_groups]
        assert rates == pytest.approx([peak * factor for peak in peaks])
        new.optimizer.step()
        new.lr_scheduler.step()
    assert [group["peak_lr"] for group in new.optimizer.param_groups] == peaks


@pytest.mark.parametrize(
    ("mode", "is_trained"), [("joint", True), ("rl", False), ("segmentation", True)]
)
def test_training_step_updates_the_parts_of_the_mode(make_setup, mode, is_trained):
    # Equal completions would cancel in the policy gradient; four at this temperature differ.
    sampling = {"temperature": 1.6, "num_generations": 4}
    setup = make_setup(max_steps=1, mode=mode, segmentation_loss_weight=0.3, **sampling)
    vary_format_scores(setup)
    before = {n: p.detach().clone() for n, p in setup.trainer.model.named_parameters()}
    setup.trainer.train()
    after = dict(setup.trainer.model.named_parameters())
    changed = {n for n, p in before.items() if not torch.equal(p, after[n])}
    head = {n for n in changed if n.startswith(f"{ATTRIBUTE}.")}
    assert bool(head) == is_trained
    assert changed - head, "the policy did not change"
    assert not any("output_hypernetworks_mlps.1" in n for n in changed)
    (line,) = setup.lines
    assert {"reward", "rewards/mask/mean", "rewards/format/mean", "kl", "entropy"} <= line.keys()
    assert {
        "sampled_giou",
        "sampled_prior_giou",
        "grad_norm",
        "loss/policy",
        "frac_with_reference",
    } <= line.keys()
    assert line["rewards/mask/mean"] > 0.5, "<REF_POS> was lost on the way"
    assert ("loss/prior_bce" in line) == is_trained


@pytest.mark.parametrize(
    ("loss_type", "level"), [("grpo", "token"), ("dapo", "token"), ("grpo", "sequence")]
)
def test_joint_trainer_passes_the_loss_settings_to_trl(make_setup, loss_type, level):
    setup = make_setup(
        loss_type=loss_type, importance_sampling_level=level, epsilon_high=0.28, max_steps=1
    )
    trainer = setup.trainer
    assert (trainer.loss_type, trainer.importance_sampling_level) == (loss_type, level)
    assert (trainer.epsilon_low, trainer.epsilon_high) == (0.2, 0.28)
    assert trainer.beta == 0.2
    assert trainer.args.use_bias_correction_kl is False
    assert trainer.scale_rewards == "group"
    assert trainer.reward_weights.tolist() == pytest.approx([0.7, 0.3])
    trainer.train()
    assert len(setup.lines) == 1


def test_num_iterations_reuse_one_rollout(make_setup):
    setup = make_setup(max_steps=4, num_iterations=2, per_device_train_batch_size=2)
    sampled = []
    generate = setup.trainer._generate_single_turn
    setup.trainer._generate_single_turn = lambda *a, **k: sampled.append(1) or generate(*a, **k)
    setup.trainer.train()
    assert len(sampled) == 2


def test_accumulated_gradient_equals_that_of_one_pass(make_setup):
    actual = {}
    for rows in (4, 2):
        setup = make_setup(per_device_train_batch_size=rows, segmentation_loss_weight=0.3)
        trainer = setup.trainer
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 4 // rows
        torch.manual_seed(3)
        batch = next(iter(trainer.get_train_dataloader()))
        trainer.model.zero_grad(set_to_none=True)
        for step in range(4 // rows):
            trainer._step = step
            inputs = trainer._prepare_inputs(batch)
            trainer.compute_loss(trainer.model, inputs).backward()
        actual[rows] = {
            n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None
        }
    assert distance(actual[2], actual[4]) < GRADIENT_TOLERANCE


def test_reference_columns_of_too_many_references_are_the_last():
    mark, pad = 9, 0
    ids = torch.tensor(
        [
            [9, 1, 9, 2, 9, 3],  # the first belongs to the prompt
            [1, 1, 1, 2, 9, pad],
            [9, 1, 1, 1, 1, 1],
            [1, 1, 9, 9, 9, 9],
        ]
    )
    columns, is_found = reference_columns(ids, mark, first_column=1, num_targets=2)
    assert is_found.tolist() == [[True, True], [True, False], [False, False], [True, True]]
    assert columns.tolist() == [[2, 4], [4, 0], [0, 0], [4, 5]]
    columns, is_found = reference_columns(ids, mark, first_column=1, num_targets=1)
    assert columns[:, 0].tolist() == [4, 4, 0, 5]


def test_loss_weights_at_changes_at_late_from_step(make_setup):
    settings = make_setup().trainer.parts.settings
    assert settings.loss_weights_at(1499).mask_dice == 1.5
    assert settings.loss_weights_at(1499).mask_focal == 0.0
    assert settings.loss_weights_at(1500).mask_dice == 3.0
    assert settings.loss_weights_at(1500).mask_focal == 10.0


def test_prompts_with_a_budget_have_truncated_completions(make_setup):
    setup = make_setup(truncation_ratio=1.0, max_reasoning_tokens=3, max_completion_length=64)
    trainer, tokenizer = setup.trainer, setup.state.policy.tokenizer
    inputs = one_batch(trainer)
    budgets = trainer.rollout.budgets
    assert budgets[::2] == budgets[1::2], "completions of a prompt have one budget"
    for row, budget in enumerate(budgets):
        ids = inputs["completion_ids"][row][inputs["completion_mask"][row].bool()]
        mask = inputs["tool_mask"][row][: len(ids)]
        forced = tokenizer.decode(ids[mask == 0])
        assert forced == "</think> <REF_POS><|im_end|>"
        assert mask.tolist() == sorted(mask.tolist(), reverse=True)
        assert int(mask.sum()) == 1 + budget
        assert trainer.rollout.completions[row] == ids.tolist()
    trainer.compute_loss(trainer.model, inputs).backward()
    line = reduce_means(trainer.accelerator, trainer._means)
    assert line["frac_truncated"] == line["frac_with_reference"] == 1


def test_forced_tokens_are_no_actions_of_the_policy(make_setup):
    """Without segmentation losses the gradient is that of the sampled tokens alone."""
    trainer = make_setup(mode="rl", beta=0.0, truncation_ratio=1.0, max_reasoning_tokens=2).trainer
    inputs = one_batch(trainer)
    inputs["advantages"] = torch.ones_like(inputs["advantages"])
    logps = torch.zeros(inputs["completion_ids"].shape, requires_grad=True)
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (
        logps,
        torch.zeros(logps.shape),
        None,
    )
    trainer.compute_loss(trainer.model, inputs).backward()
    is_action = inputs["completion_mask"].bool() & inputs["tool_mask"].bool()
    assert torch.equal(logps.grad != 0, is_action)
    assert (is_action.sum(1) < inputs["completion_mask"].sum(1)).all()


def test_length_reward_is_logged_with_the_others(make_setup):
    weights = RewardWeights(mask=0.6, format=0.2, length=0.2)
    setup = make_setup(max_steps=1, reward_weights=weights, length_reward_tokens=100)
    setup.trainer.train()
    (line,) = setup.lines
    rewards = [line[f"rewards/{name}/mean"] for name in ("mask", "format", "length")]
    assert 0 < rewards[2] < rewards[0]
    expected = 0.6 * rewards[0] + 0.2 * rewards[1] + 0.2 * rewards[2]
    assert line["reward"] == pytest.approx(expected, abs=1e-5)
    assert "rewards/length/mean" not in make_setup(max_steps=1).trainer.reward_func_names
