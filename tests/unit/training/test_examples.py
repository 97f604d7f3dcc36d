"""Data of a run: every example is checked before the first step, and is part of its identity."""

import dataclasses

import numpy as np
import pytest

from coprs_deploy.checkpoint import read_checkpoint
from coprs_deploy.data.examples import Example, write_examples
from coprs_deploy.data.synthetic import PLAIN, SceneExamples
from coprs_deploy.errors import NoValidRowError
from coprs_deploy.training.examples import Contents, open_data
from coprs_deploy.training.features import compute_features
from coprs_deploy.training.recipe import load_recipe


@pytest.fixture(scope="module")
def scenes():
    return list(SceneExamples(PLAIN, 4))


@pytest.fixture
def with_two_targets(scenes):
    image = scenes[0].image
    masks = np.zeros((2, *image.shape[:2]), np.bool_)
    masks[0, :40], masks[1, 60:] = True, True
    return Example("pair", image, "both", masks, "<think>a</think> <REF_POS> and <REF_POS>")


def recipe_of(tmp_path, training, held_out, *settings, base="grpo_demo"):
    for name, examples in (("training", training), ("held_out", held_out)):
        write_examples(tmp_path / f"{name}.jsonl", examples)
    text = f'base = "{base}"\n[data]\nkind = "examples"\n'
    text += f'training = "{tmp_path}/training.jsonl"\nheld_out = "{tmp_path}/held_out.jsonl"\n'
    (tmp_path / "recipe.toml").write_text(text)
    return load_recipe(str(tmp_path / "recipe.toml"), settings)


@pytest.mark.parametrize("place", ["training", "held_out"])
def test_open_data_with_too_many_targets_names_example_setting_and_value(
    tmp_path, scenes, with_two_targets, place
):
    sets = {"training": scenes[:2], "held_out": scenes[2:]}
    sets[place] = [*sets[place], with_two_targets]
    with pytest.raises(
        ValueError, match=r"pair.*up to 2; set stages\.grpo\.max_targets=2"
    ) as error:
        open_data(recipe_of(tmp_path, *sets.values()))
    assert f"{place}.jsonl" in str(error.value)
    opened = open_data(recipe_of(tmp_path, *sets.values(), "stages.grpo.max_targets=2"))
    assert [len(opened.training), len(opened.held_out)] == [len(each) for each in sets.values()]


def test_open_data_of_a_preset_with_several_targets_needs_max_targets():
    with pytest.raises(ValueError, match=r"data\.preset full.*max_targets=4"):
        open_data(load_recipe("grpo_demo", ["data.preset=full"]))


@pytest.mark.parametrize("place", ["training", "held_out"])
def test_open_data_without_a_response_is_refused_in_supervised_stages_only(tmp_path, scenes, place):
    sets = {"training": scenes[:2], "held_out": scenes[2:]}
    silent = dataclasses.replace(scenes[3], id="silent", response="")
    sets[place] = [*sets[place], silent]
    with pytest.raises(ValueError, match=r"\(silent\) no response, and stage supervised") as error:
        open_data(recipe_of(tmp_path, *sets.values(), base="supervised_7b"))
    assert f"{place}.jsonl" in str(error.value)
    allowed = "stages.supervised.allow_missing_responses=true"
    assert open_data(recipe_of(tmp_path, *sets.values(), allowed, base="supervised_7b"))
    assert open_data(recipe_of(tmp_path, *sets.values()))


@pytest.mark.parametrize("place", ["training", "held_out"])
def test_open_data_with_an_image_without_embedding_is_refused(
    tmp_path, tiny_checkpoint, scenes, place
):
    known = [example.image for example in scenes[:3]]
    compute_features(read_checkpoint(tiny_checkpoint), known, 3, tmp_path / "features")
    sets = {"training": scenes[:2], "held_out": scenes[1:3]}
    features = f"data.features={tmp_path / 'features'}"
    assert open_data(recipe_of(tmp_path, *sets.values(), features)).features is not None
    sets[place] = scenes[2:]
    with pytest.raises(ValueError, match=r"\(plain-3\) no embedding in .*coprs-deploy features"):
        open_data(recipe_of(tmp_path, *sets.values(), features))


def test_open_data_without_a_valid_row_is_refused(tmp_path, scenes):
    recipe = recipe_of(tmp_path, scenes[:1], scenes[1:])
    (tmp_path / "training.jsonl").write_text('{"id": "1"}\n')
    with pytest.raises(NoValidRowError, match=r"training\.jsonl"):
        open_data(recipe)


def digest(examples):
    contents = Contents()
    for example in examples:
        contents.add(example)
    return contents.hexdigest()


def test_contents_depend_on_every_part_and_the_order_but_not_on_the_file(tmp_path, scenes):
    whole = digest(scenes)
    mask = np.roll(scenes[0].masks, 1, axis=1)
    image = scenes[0].image.copy()
    image[0, 0] += 1
    for change in (
        {"masks": mask},
        {"image": image},
        {"instruction": "another"},
        {"response": "<think>another</think> <REF_POS>"},
    ):
        assert digest([dataclasses.replace(scenes[0], **change), *scenes[1:]]) != whole, change
    assert digest(scenes[:3]) != whole
    assert digest(scenes[::-1]) != whole
    hashes = set()
    for name in ("one.jsonl", "two.parquet"):
        write_examples(tmp_path / name, scenes)
        (tmp_path / "recipe.toml").write_text(
            f'base = "grpo_demo"\n[data]\nkind = "examples"\ntraining = "{tmp_path / name}"\n'
            f'held_out = "{tmp_path / name}"'
        )
        contents = open_data(load_recipe(str(tmp_path / "recipe.toml"))).contents
        assert contents["data.training"] == contents["data.held_out"]
        assert contents["data.training"]["examples"] == 4
        hashes.add(contents["data.training"]["hash"])
    assert hashes == {whole}
