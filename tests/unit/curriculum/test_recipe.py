"""Recipes of the tiny model: loading, overriding and refusing."""

import pytest

from coprs_deploy.curriculum.recipe import CurriculumRecipe, TinyPolicy
from coprs_deploy.training.recipe import changed_keys, load_recipe, model_kind

FULL_RECIPES = ["full", "full_further", "full_truncated"]
RECIPES = ["demo", "demo_truncated", *FULL_RECIPES]


def load(source, *settings):
    return load_recipe(str(source), settings, CurriculumRecipe)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_survives_json(name):
    recipe = load(name)
    assert model_kind(name) == "tiny"
    assert CurriculumRecipe.from_json(recipe.to_json()) == recipe


@pytest.mark.parametrize("name", ["demo", "full"])
def test_recipe_runs_its_stages_in_order(name):
    assert list(load(name).stages) == ["perception", "segmentation", "reasoning", "joint"]


def test_load_recipe_with_settings_changes_these_values_only():
    changed = load(
        "demo",
        "stages.reasoning.max_steps=7",
        "data.preset=full",
        "stages.reasoning.optimizer.betas=[0.9, 0.99]",
        "stages.joint.thresholds.giou=0.5",
    )
    assert changed.stages["reasoning"].max_steps == 7
    assert list(changed_keys(load("demo").to_json(), changed.to_json())) == [
        "data.preset",
        "stages.joint.thresholds.giou",
        "stages.reasoning.max_steps",
        "stages.reasoning.optimizer.betas",
    ]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("stages.reasonin.max_steps=7", "did you mean stages.reasoning.max_steps"),
        ("stages.reasoning.max_step=7", "did you mean stages.reasoning.max_steps"),
        ("sed=1", "did you mean seed"),
        ("stages.reasoning.max_steps=many", "Expected `int`"),
        ("stages.reasoning.max_steps=0", "Expected `int` >= 1"),
        ("data.preset=plane", "Invalid enum value 'plane'"),
        ("seed", "takes key=value"),
        ("model.segmentation.policy_hidden_size=96", "must be equal"),
        ("stages.reasoning.kind=grpo", "accepted: perception, segmentation, reasoning"),
        ("data.kind=examples", "accepted: synthetic"),
    ],
)
def test_load_recipe_with_a_wrong_setting_raises(setting, message):
    with pytest.raises(ValueError, match=message):
        load("demo", setting)


def test_load_recipe_of_a_file_with_an_unknown_key_suggests_the_nearest(tmp_path, write_recipe):
    path = tmp_path / "wrong.toml"
    path.write_text(write_recipe().read_text().replace("save_steps", "save_stps"))
    with pytest.raises(ValueError, match="did you mean save_steps"):
        load(path)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"image_size": 100}, "must be a multiple of 16"),
        ({"mrope_section": (1, 2, 3)}, "must be half the size of a head, 16"),
    ],
)
def test_tiny_policy_with_sizes_that_do_not_fit_raises(sizes, message):
    with pytest.raises(ValueError, match=message):
        TinyPolicy(**sizes)
