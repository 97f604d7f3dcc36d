"""Stages of the curriculum: loss coefficients, and the initialization of the query head."""

import msgspec
import pytest
import torch
from accelerate import Accelerator

from coprs_deploy.curriculum.reasoning_stage import ridge_regression
from coprs_deploy.curriculum.recipe import CurriculumRecipe
from coprs_deploy.curriculum.run import build_context, build_stage
from coprs_deploy.training.losses import IGNORED_LABEL
from coprs_deploy.training.recipe import load_recipe
from coprs_deploy.training.runs.run import Run
from coprs_deploy.training.runs.run_directory import RunDirectory
from coprs_deploy.training.trainer import loss_coefficient


@pytest.fixture(scope="module")
def recipe(write_recipe):
    return load_recipe(str(write_recipe()), recipe_type=CurriculumRecipe)


@pytest.fixture(scope="module")
def context(recipe, scenes_dir, tmp_path_factory):
    directory = RunDirectory(tmp_path_factory.mktemp("run"))
    return build_context(Run(recipe, Accelerator(cpu=True), directory, 0.0), scenes_dir)


@pytest.mark.parametrize("name", ["perception", "segmentation", "joint"])
def test_stage_has_a_coefficient_for_every_loss(name, recipe, context):
    stage = build_stage(name, recipe.stages[name], context)
    losses = stage.objective(stage.batch(0, 0, 1)).losses
    coefficients = stage.loss_coefficients(0.5)
    assert losses
    assert all(loss_coefficient(loss, coefficients) > 0 for loss in losses)
    assert not any("/" in loss for loss in losses)


def test_loss_coefficient_of_a_group_yields_to_that_of_the_loss():
    coefficients = {"auxiliary.foreground": 0.5, "auxiliary.*": 0.125, "language": 1.0}
    assert loss_coefficient("auxiliary.foreground", coefficients) == 0.5
    assert loss_coefficient("auxiliary.color", coefficients) == 0.125
    assert loss_coefficient("language", coefficients) == 1.0


def test_loss_coefficient_missing_is_an_assertion_error():
    with pytest.raises(AssertionError, match="mask_dice has no coefficient"):
        loss_coefficient("mask_dice", {"language": 1.0})


def test_reasoning_stage_with_truncations_supervises_their_references(recipe, context):
    given = msgspec.structs.replace(recipe.stages["joint"], max_packed_length=0)
    plain = build_stage("joint", given, context).batch(0, 0, 1)
    settings = msgspec.structs.replace(given, num_truncations=3)
    stage = build_stage("joint", settings, context)
    batch, again = stage.batch(0, 0, 1), stage.batch(0, 0, 1)
    assert torch.equal(batch.rows.truncations, again.rows.truncations)
    assert len(plain.targets) > 0
    assert len(batch.targets) == 4 * len(plain.targets)
    assert batch.targets[::4].tolist() == plain.targets.tolist()
    for row, column in batch.rows.references.tolist():
        position = batch.rows.positions[0, row, column]
        is_cut = batch.rows.truncations[row, column] > 0
        assert not is_cut or position - batch.rows.truncations[row, column] == 2
    found = stage.objective(batch)
    assert found.losses["reference_head.row"].weight == len(batch.targets)
    metrics = stage.evaluate(Accelerator(cpu=True), 2)
    assert {"giou", "no_reasoning_giou", "no_reasoning_precision_at_50"} <= set(metrics)


def test_reasoning_stage_with_kl_loss_measures_the_drift_of_the_responses(recipe, context):
    settings = msgspec.structs.replace(
        recipe.stages["joint"], num_truncations=2, kl_loss_weight=2.0, max_packed_length=0
    )
    stage = build_stage("joint", settings, context)
    batch = stage.batch(0, 0, 1)
    kl = stage.objective(batch).losses["kl"]
    is_complete = batch.rows.truncations == 0
    labels = batch.rows.labels[is_complete & (batch.rows.labels != IGNORED_LABEL)]
    assert torch.equal(kl.weight, stage.objective.token_weights[labels].sum())
    assert kl.total.item() == pytest.approx(0.0, abs=1e-4)  # roundings of float32
    chosen = is_complete & (batch.rows.labels != IGNORED_LABEL)
    assert not stage.objective._initial_policy.logits(batch, chosen).requires_grad
    assert stage.loss_coefficients(0.5)["kl"] == 2.0
    weight = context.state.policy.model.model.language_model.norm.weight
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.mul_(2.0)
        assert stage.objective(batch).losses["kl"].total > 1.0
    finally:
        weight.data.copy_(before)
    names = [name for name, _ in stage.objective.named_parameters()]
    assert not any("initial" in name for name in names)


def test_reasoning_stage_without_train_image_encoder_freezes_it(recipe, context):
    settings = msgspec.structs.replace(recipe.stages["joint"], train_image_encoder=False)
    stage = build_stage("joint", settings, context)
    encoder = stage.objective.segmentation.image_encoder
    assert not any(p.requires_grad for p in encoder.parameters())


def test_ridge_regression_recovers_a_linear_map():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(400, 8, generator=generator)
    expected = torch.randn(8, 3, generator=generator)
    solution, r2 = ridge_regression(inputs, inputs @ expected)
    assert torch.allclose(solution, expected, atol=1e-2)
    assert r2 == pytest.approx(1.0, abs=1e-4)
