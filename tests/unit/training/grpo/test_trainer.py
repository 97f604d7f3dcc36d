"""The joint loss: one backward pass that carries the sum of both, and what moves by it."""

import dataclasses

import msgspec
import pytest
import torch

from coprs_deploy.training.grpo.attachment import ATTRIBUTE, reference_columns
from coprs_deploy.training.grpo.scores import row_losses
from coprs_deploy.training.optim import relative_rate

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

GRADIENT_TOLERANCE = 2e-5
"""Relative difference of gradients that are summed in another order, float32."""


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


def distance(found, wanted):
    names = found.keys() | wanted.keys()
    zero = torch.zeros(())
    squares = [(found.get(n, zero) - wanted.get(n, zero)).pow(2).sum() for n in names]
    return float(sum(squares) ** 0.5 / sum(g.pow(2).sum() for g in wanted.values()) ** 0.5)


def spread_forms(bench):
    """Give the responses of a group different scores, whatever they are."""
    bench.trainer.parts.reader.format_scores = lambda responses, counts: [
        float(i % 2) for i in range(len(responses))
    ]


def test_responses_of_a_good_policy_keep_their_form(make_bench):
    bench = make_bench(steps=1, temperature=0.2)
    bench.trainer.train()
    (line,) = bench.lines
    assert line["rewards/format/mean"] == 1, "<REF_POS> was lost on the way"


@pytest.fixture
def spread_batch(make_bench):
    """A bench whose batch has advantages other than zero, and the batch."""
    bench = make_bench(
        segmentation_loss_weight=0.3, beta=0.2, global_batch_size=2, num_generations=4
    )
    inputs = one_batch(bench.trainer)
    generator = torch.Generator().manual_seed(5)
    inputs["advantages"] = torch.randn(inputs["advantages"].shape, generator=generator)
    return bench, inputs


def test_the_joint_gradient_is_the_sum_of_both(spread_batch):
    bench, inputs = spread_batch
    trainer = bench.trainer
    whole = trainer.parts
    found = {}
    for mode in ("joint", "rl", "segmentation"):
        settings = msgspec.structs.replace(whole.settings, mode=mode)
        trainer.parts = dataclasses.replace(whole, settings=settings)
        found[mode] = gradients(trainer, inputs)
    zero = torch.zeros(())
    added = {
        name: found["rl"].get(name, zero) + found["segmentation"].get(name, zero)
        for name in found["joint"]
    }
    assert distance(found["joint"], added) < GRADIENT_TOLERANCE
    for part in ("rl", "segmentation"):
        assert distance(found["joint"], found[part]) > 1e-2, "one loss is not in the sum"
    inside = [n for n in found["segmentation"] if "language_model" in n]
    assert any(found["segmentation"][n].abs().max() > 0 for n in inside), (
        "the segmentation loss does not reach the policy through <REF_POS>"
    )
    assert not any(n.startswith(f"{ATTRIBUTE}.") for n in found["rl"])


def test_the_segmentation_loss_is_that_of_the_same_masks(spread_batch):
    """The loss inside the joint step equals one computed from a forward pass of its own."""
    bench, inputs = spread_batch
    trainer = bench.trainer
    rollout = trainer.rollout
    weights = trainer.parts.settings.loss_weights(0)
    parts = row_losses(rollout.decoded, rollout.truth, weights)
    rows = (rollout.truth.num_targets > 0).sum()
    wanted = sum(getattr(weights, n) * loss / rows for n, loss in parts.items())
    settings = msgspec.structs.replace(trainer.parts.settings, mode="segmentation")
    trainer.parts = dataclasses.replace(trainer.parts, settings=settings)
    with torch.no_grad():
        found = trainer.compute_loss(trainer.model, inputs)
    assert float(found) == pytest.approx(0.3 * float(wanted), rel=1e-5)


def test_every_part_moves_at_its_own_rate(make_bench):
    trainer = make_bench().trainer
    optimizer = trainer.create_optimizer()
    scheduler = trainer.create_scheduler(100)
    names = {id(p): n for n, p in trainer.model.named_parameters()}
    base = 1.6e-6
    rates = {
        round(group["peak_rate"] / base, 6): {
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
        found = optimizer.param_groups[0]["lr"] / optimizer.param_groups[0]["peak_rate"]
        assert found == pytest.approx(relative_rate(trainer.parts.settings.optimizer, step, 100))
        assert found == pytest.approx(cycle.get_last_lr()[0], abs=0.015)  # one step apart
        optimizer.step()
        cycle.optimizer.step()
        scheduler.step()
        cycle.step()


@pytest.mark.parametrize(
    ("mode", "moves"), [("joint", True), ("rl", False), ("segmentation", True)]
)
def test_steps_move_what_the_mode_trains(make_bench, mode, moves):
    bench = make_bench(steps=1, mode=mode, segmentation_loss_weight=0.3, temperature=0.2)
    spread_forms(bench)
    before = {n: p.detach().clone() for n, p in bench.trainer.model.named_parameters()}
    bench.trainer.train()
    after = dict(bench.trainer.model.named_parameters())
    moved = {n for n, p in before.items() if not torch.equal(p, after[n])}
    head = {n for n in moved if n.startswith(f"{ATTRIBUTE}.")}
    assert bool(head) == moves
    assert moved - head, "the policy did not move"
    assert not any("output_hypernetworks_mlps.1" in n for n in moved)
    (line,) = bench.lines
    assert {"reward", "rewards/mask/mean", "rewards/format/mean", "kl", "entropy"} <= line.keys()
    assert {"mask_iou", "prior_iou", "grad_norm", "loss.policy"} <= line.keys()
    assert line["rewards/mask/mean"] > 0.5, "<REF_POS> was lost on the way"
    assert ("loss.prior_bce" in line) == moves


@pytest.mark.parametrize(
    ("algorithm", "loss", "level"),
    [("grpo", "grpo", "token"), ("dapo", "dapo", "token"), ("gspo", "grpo", "sequence")],
)
def test_the_algorithms_are_those_of_their_papers(make_bench, algorithm, loss, level):
    trainer = make_bench(algorithm=algorithm, epsilon_high=0.28, steps=1).trainer
    assert (trainer.loss_type, trainer.importance_sampling_level) == (loss, level)
    assert (trainer.epsilon_low, trainer.epsilon_high) == (0.2, 0.28)
    assert trainer.beta == 0.2
    assert trainer.args.use_bias_correction_kl is False
    assert trainer.scale_rewards == "group"
    trainer.train()


def test_several_updates_learn_from_one_rollout(make_bench):
    bench = make_bench(steps=4, num_iterations=2, per_device_train_batch_size=2)
    sampled = []
    generate = bench.trainer._generate_single_turn
    bench.trainer._generate_single_turn = lambda *a, **k: sampled.append(1) or generate(*a, **k)
    bench.trainer.train()
    assert len(sampled) == 2


def test_passes_add_up_to_the_gradient_of_one(make_bench):
    found = {}
    for rows in (4, 2):
        bench = make_bench(per_device_train_batch_size=rows, segmentation_loss_weight=0.3)
        trainer = bench.trainer
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 4 // rows
        torch.manual_seed(3)
        batch = next(iter(trainer.get_train_dataloader()))
        trainer.model.zero_grad(set_to_none=True)
        for step in range(4 // rows):
            trainer._step = step
            inputs = trainer._prepare_inputs(batch)
            trainer.compute_loss(trainer.model, inputs).backward()
        found[rows] = {
            n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None
        }
    assert distance(found[2], found[4]) < GRADIENT_TOLERANCE


def test_the_last_references_of_a_response_count():
    mark, pad = 9, 0
    ids = torch.tensor(
        [
            [9, 1, 9, 2, 9, 3],  # the first stands in the prompt
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


def test_the_loss_weights_change_at_their_step(make_bench):
    settings = make_bench().trainer.parts.settings
    assert settings.loss_weights(1499).mask_dice == 1.5
    assert settings.loss_weights(1499).mask_focal == 0.0
    assert settings.loss_weights(1500).mask_dice == 3.0
    assert settings.loss_weights(1500).mask_focal == 10.0
