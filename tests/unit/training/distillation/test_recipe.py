"""Recipes of a distillation: students, and what the settings accept."""

import pytest

from coprs_deploy.checkpoint import read_checkpoint
from coprs_deploy.demo import CHECKPOINT
from coprs_deploy.encoder_config import ENCODERS, TinyVitConfig
from coprs_deploy.model_config import SAM_SIZES
from coprs_deploy.training.distillation.estimate import encoder_costs
from coprs_deploy.training.distillation.recipe import (
    DistillationRecipe,
    DistilledModel,
    VitConfig,
)
from coprs_deploy.training.recipe import load_recipe

RECIPES = ("distill", "distill_demo", "distill_masks")


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_survives_json(name):
    recipe = load_recipe(name, recipe_type=DistillationRecipe)
    assert DistillationRecipe.from_json(recipe.to_json()) == recipe
    assert list(recipe.stages) == ["embedding", "decoding"][: len(recipe.stages)]


@pytest.mark.parametrize("name", ENCODERS)
def test_named_student_takes_the_place_of_vit_h(name):
    student = DistilledModel(name).student(SAM_SIZES["vit_h"])
    assert student.image_encoder == ENCODERS[name]
    assert student.geometry.grid_size == 64
    assert student.decoder_mlp_dim == SAM_SIZES["vit_h"].decoder_mlp_dim


def test_student_of_sams_architecture_may_have_another_input_size():
    teacher = SAM_SIZES["tiny"]
    small = DistilledModel(VitConfig(encoder_embed_dim=24, encoder_depth=6)).student(teacher)
    assert (small.geometry, small.encoder_embed_dim) == (teacher.geometry, 24)
    coarse = DistilledModel(VitConfig(patch_size=4)).student(teacher)
    assert (coarse.geometry.image_size, coarse.geometry.grid_size) == (64, 16)
    assert coarse.geometry.out_chans == teacher.geometry.out_chans


def test_student_with_three_stages_has_the_input_of_the_demo_model():
    encoder = TinyVitConfig((16, 32, 48), (1, 1, 1), (1, 2, 3), (8, 8, 8))
    student = DistilledModel(encoder).student(read_checkpoint(CHECKPOINT).config.model.sam)
    assert student.geometry.image_size == 128


def test_student_of_the_demo_recipe_has_a_third_of_the_multiply_adds():
    recipe = load_recipe("distill_demo", recipe_type=DistillationRecipe)
    costs = encoder_costs(recipe, read_checkpoint(CHECKPOINT))
    assert costs["student"].multiply_adds <= costs["teacher"].multiply_adds / 3
    assert costs["student"].parameters < costs["teacher"].parameters


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.image_encoder=tinyvit", "image_encoder is 'tinyvit'; accepted: tinyvit_5m, effici"),
        ("model.image_encoder={ family = 'vitt' }", "Invalid value 'vitt'"),
        ("stages.embedding.embedding_loss=l1", "Invalid enum value 'l1'"),
        ("stages.embedding.thresholds.embedding_error=1", "'embedding_error', and an evaluation"),
        ("image=x", "there is no key 'image' in this recipe; did you mean images?"),
    ],
)
def test_wrong_setting_is_refused_with_what_is_accepted(setting, message):
    with pytest.raises(ValueError, match=message):
        load_recipe("distill", [setting], DistillationRecipe)


def test_student_of_another_family_replaces_that_of_the_base(tmp_path):
    text = 'base = "distill_demo"\n[model]\nimage_encoder = { family = "tiny_vit" }'
    (tmp_path / "mine.toml").write_text(text)
    recipe = load_recipe(str(tmp_path / "mine.toml"), recipe_type=DistillationRecipe)
    assert recipe.model.image_encoder == TinyVitConfig()
