"""Distillation objective: losses, metrics, and what is trained."""

import msgspec
import numpy as np
import pytest
import torch
from accelerate import Accelerator

from coprs_deploy.checkpoint import load_segmentation_model, read_checkpoint
from coprs_deploy.data.examples import Example
from coprs_deploy.data.synthetic import PLAIN, SceneExamples
from coprs_deploy.encoder_config import TinyVitConfig
from coprs_deploy.training.distillation.recipe import (
    DistillationSettings,
    DistilledModel,
    VitConfig,
)
from coprs_deploy.training.distillation.stage import (
    DistillationObjective,
    DistillationSets,
    DistillationStage,
    embedding_metrics,
)
from coprs_deploy.training.distillation.student import build_student
from coprs_deploy.training.optim import build_optimizers
from coprs_deploy.training.settings import Optimizer

SETTINGS = DistillationSettings(
    max_steps=4, global_batch_size=2, optimizer=Optimizer(warmup_steps=0), num_eval_examples=4
)
VIT = VitConfig(
    encoder_embed_dim=24,
    encoder_depth=1,
    encoder_num_heads=2,
    encoder_global_attn_indexes=(),
    mlp_ratio=1.0,
    use_rel_pos=False,
)
TINY_VIT = TinyVitConfig((8, 16, 16), (1, 1, 1), (1, 2, 2), (1, 4, 4), 1.0, 1.0)


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint):
    return read_checkpoint(tiny_checkpoint)


@pytest.fixture(scope="module")
def examples():
    wide = np.random.default_rng(0).integers(0, 256, (60, 100, 3), dtype=np.uint8)
    masks = np.zeros((2, 60, 100), np.bool_)
    masks[0, 10:30, 20:70] = True
    masks[1, 40:50, 0:10] = True
    two = Example("two", wide, "both", masks, "<REF_POS> and <REF_POS>")
    none = Example("none", wide, "the cat", masks[:0], "nothing")
    return [two, none, *SceneExamples(PLAIN, 2)]


@pytest.fixture
def stage_of(checkpoint, examples):
    """Build a stage whose concentrations are drawn; returns it with its state."""

    def build(encoder=VIT, has_instructions=True, **settings):
        state, teacher = build_student(DistilledModel(encoder), checkpoint, seed=0)
        width = state.segmentation.config.policy_hidden_size
        generator = torch.Generator().manual_seed(0)
        drawn = [torch.randn(len(e.masks), width, generator=generator) for e in examples]
        sets = DistillationSets(
            images=examples,
            examples=examples,
            held_out=examples,
            concentrations=drawn,
            held_out_concentrations=drawn if has_instructions else None,
            teacher_geometry=checkpoint.config.model.geometry,
            seed=0,
        )
        changed = DistillationSettings.from_json(SETTINGS.to_json() | settings)
        return DistillationStage("embedding", changed, state, teacher, sets), state

    return build


def evaluate(stage):
    return stage.evaluate(Accelerator(cpu=True), 4)


def test_embedding_loss_is_the_mean_square_inside_the_image(stage_of):
    stage, state = stage_of()
    batch = stage._collect(stage._sets.images[:1], [stage._no_concentration()])
    output = stage.objective(batch)
    difference = state.segmentation.image_encoder(batch.images) - stage.objective.teacher_embedding(
        batch
    )
    rows = -(-77 // 8)  # 60 x 100 pixels are resized to 77 x 128
    expected = difference[:, :, :rows].square().mean()
    assert list(output.losses) == ["embedding"]
    assert output.losses["embedding"].total.item() == pytest.approx(expected.item(), rel=1e-5)


def test_padding_has_no_influence_on_the_metrics():
    generator = torch.Generator().manual_seed(0)
    found, expected = torch.randn(2, 1, 8, 4, 4, generator=generator)
    cells = torch.zeros(1, 1, 4, 4)
    cells[:, :, :2] = 1
    metrics = embedding_metrics(found, expected, cells)
    other = torch.cat([found[:, :, :2], 100 * found[:, :, 2:]], dim=2)
    again = embedding_metrics(other, expected, cells)
    assert metrics["embedding_error"].total == again["embedding_error"].total
    assert metrics["embedding_cosine"].total == again["embedding_cosine"].total


@pytest.mark.parametrize("loss", ["mse", "huber"])
@pytest.mark.parametrize("encoder", [VIT, TINY_VIT], ids=["vit", "tiny_vit"])
def test_loss_falls_on_a_repeated_batch_and_only_the_encoder_is_trained(stage_of, encoder, loss):
    stage, state = stage_of(encoder, embedding_loss=loss, decoding_loss_weight=0.5)
    kept = {n: t.clone() for n, t in state.segmentation.state_dict().items()}
    teacher = {n: t.clone() for n, t in stage.objective._teacher[0].state_dict().items()}
    optimizers = build_optimizers(stage.objective, stage.settings.optimizer)
    batch, coefficients, totals = stage.batch(0, 0, 1), stage.loss_coefficients(1.0), []
    stage.objective.train()
    for _ in range(12):
        output = stage.objective(batch)
        total = sum(coefficients[n] * m.total / m.weight for n, m in output.losses.items())
        totals.append(total.item())
        total.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert set(output.losses) == {"embedding", "prior_bce", "mask_dice", "mask_bce"}
    assert totals[-1] < 0.8 * totals[0]
    changed = {n for n, t in state.segmentation.state_dict().items() if not t.equal(kept[n])}
    assert changed
    assert all(name.startswith("image_encoder.") for name in changed)
    assert all(t.equal(teacher[n]) for n, t in stage.objective._teacher[0].state_dict().items())


def test_states_of_a_run_hold_no_teacher(stage_of):
    stage, _ = stage_of()
    assert all(name.startswith("segmentation.") for name in stage.objective.state_dict())


def test_student_equal_to_the_teacher_agrees_in_everything(stage_of, checkpoint):
    sam = checkpoint.config.model.sam
    same = VitConfig(
        **{n: getattr(sam, n) for n in VitConfig.__struct_fields__ if n != "patch_size"}
    )
    stage, state = stage_of(same)
    state.segmentation.load_state_dict(load_segmentation_model(checkpoint).state_dict())
    metrics = evaluate(stage)
    assert metrics["embedding_error"] == pytest.approx(0, abs=1e-6)
    assert metrics["embedding_cosine"] == pytest.approx(1)
    for name in ("giou", "prior_giou"):
        assert metrics[name] == metrics[f"teacher_{name}"]
    assert metrics["agreement_giou"] == 1
    assert metrics["agreement_prior_giou"] == 1


def test_other_student_is_measured_against_teacher_and_ground_truth(stage_of):
    metrics = evaluate(stage_of()[0])
    assert metrics["embedding_error"] > 0.1
    assert metrics["embedding_cosine"] < 0.999
    assert metrics["agreement_giou"] < 1
    assert set(metrics) >= {"giou", "prior_giou", "precision_at_50", "teacher_giou"}


def test_images_without_instructions_are_compared_with_drawn_concentrations(stage_of):
    stage, _ = stage_of(has_instructions=False)
    metrics = evaluate(stage)
    assert 0 < metrics["agreement_giou"] < 1
    assert not {"giou", "teacher_giou"} & metrics.keys()
    assert len(stage._sets.drawn) == 4
    assert evaluate(stage) == metrics  # the same concentrations each time


def test_batch_without_targets_has_the_losses_and_metrics_of_others(stage_of, examples):
    """They are added in all processes, of which one may have no target."""
    stage, _ = stage_of(decoding_loss_weight=0.5)
    concentrations, outputs = stage._sets.concentrations, []
    for rows in (slice(0, 1), slice(1, 2)):  # two targets, none
        batch = stage._collect(examples[rows], concentrations[rows], with_masks=True)
        with torch.no_grad():
            outputs.append(stage.objective(batch))
    assert outputs[0].losses.keys() == outputs[1].losses.keys()
    assert outputs[0].metrics.keys() == outputs[1].metrics.keys()
    assert outputs[1].losses["mask_bce"] == outputs[1].metrics["giou"] == (0, 0)
    output = stage.objective(stage._collect(examples[1:2], concentrations[1:2]))
    sum(mean.total for mean in output.losses.values()).backward()
    weights = stage.objective.segmentation.image_encoder.parameters()
    assert all(weight.grad.isfinite().all() for weight in weights if weight.grad is not None)


def test_student_of_another_input_size_sees_its_own_pixels(stage_of):
    stage, _ = stage_of(msgspec.structs.replace(VIT, patch_size=4))
    batch = stage.batch(0, 0, 1)
    assert batch.images.shape[-1] == 64
    assert batch.teacher.shape[-1] == 128
    assert stage.objective(batch).losses["embedding"].total > 0


def test_last_layers_start_from_the_teachers(checkpoint):
    state, teacher = build_student(DistilledModel(VIT), checkpoint, seed=0)
    own, expected = state.segmentation.image_encoder.state_dict(), teacher.state_dict()
    assert own["neck.2.weight"].equal(expected["neck.2.weight"])
    assert own["neck.0.weight"].shape != expected["neck.0.weight"].shape
    assert own["pos_embed"].std() > 0.05


def test_teacher_with_batch_normalization_is_never_in_training_mode(checkpoint):
    state, _ = build_student(DistilledModel(TINY_VIT), checkpoint, seed=0)
    objective = DistillationObjective(state, state.segmentation.image_encoder, SETTINGS)
    _, teacher = build_student(DistilledModel(VIT), checkpoint, seed=0)
    objective = DistillationObjective(state, teacher.train(), SETTINGS)
    objective.train()
    assert not objective._teacher[0].training
    assert state.segmentation.image_encoder.training
