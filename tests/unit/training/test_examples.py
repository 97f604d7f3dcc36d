"""Data of a run: every example is checked before the first step, and is part of its identity."""

import dataclasses
import json
import re
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from coprs_deploy.checkpoint import read_checkpoint
from coprs_deploy.data import image_checks
from coprs_deploy.data.examples import Example, write_examples
from coprs_deploy.data.image_columns import load_image_source
from coprs_deploy.data.synthetic import PLAIN, SceneExamples
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


def errors_of(recipe):
    """Open the data of a recipe, and return the errors as texts by key."""
    problems = []
    opened = open_data(recipe, problems)
    assert opened is not None or any(problem.is_error for problem in problems)
    return {problem.where: problem.text for problem in problems if problem.is_error}


@pytest.mark.parametrize("place", ["training", "held_out"])
def test_open_data_with_too_many_targets_names_example_setting_and_value(
    tmp_path, scenes, with_two_targets, place
):
    sets = {"training": scenes[:2], "held_out": scenes[2:]}
    sets[place] = [*sets[place], with_two_targets]
    errors = errors_of(recipe_of(tmp_path, *sets.values()))
    assert list(errors) == [f"data.{place}"]
    assert re.search(
        r"pair.*up to 2; set stages\.grpo\.max_targets=2", errors[f"data.{place}"], re.DOTALL
    )
    allowed = recipe_of(tmp_path, *sets.values(), "stages.grpo.max_targets=2")
    opened = open_data(allowed, problems := [])
    assert not problems
    assert [len(opened.training), len(opened.held_out)] == [len(each) for each in sets.values()]


def test_open_data_of_a_preset_with_several_targets_needs_max_targets():
    errors = errors_of(load_recipe("grpo_demo", ["data.preset=full"]))
    assert "set stages.grpo.max_targets=4" in errors["data.preset"]


@pytest.mark.parametrize("place", ["training", "held_out"])
def test_open_data_without_a_response_is_refused_in_supervised_stages_only(tmp_path, scenes, place):
    sets = {"training": scenes[:2], "held_out": scenes[2:]}
    silent = dataclasses.replace(scenes[3], id="silent", response="")
    sets[place] = [*sets[place], silent]
    errors = errors_of(recipe_of(tmp_path, *sets.values(), base="supervised_7b"))
    assert list(errors) == [f"data.{place}"]
    assert "1 example has (silent) no response, and stage supervised" in errors[f"data.{place}"]
    allowed = "stages.supervised.allow_missing_responses=true"
    assert not errors_of(recipe_of(tmp_path, *sets.values(), allowed, base="supervised_7b"))
    assert not errors_of(recipe_of(tmp_path, *sets.values()))


@pytest.mark.parametrize("place", ["training", "held_out"])
def test_open_data_with_an_image_without_embedding_is_refused(
    tmp_path, tiny_checkpoint, scenes, place
):
    known = [example.image for example in scenes[:3]]
    compute_features(read_checkpoint(tiny_checkpoint), known, 3, tmp_path / "features")
    sets = {"training": scenes[:2], "held_out": scenes[1:3]}
    features = f"data.features={tmp_path / 'features'}"
    assert open_data(recipe_of(tmp_path, *sets.values(), features), []).features is not None
    sets[place] = scenes[2:]
    errors = errors_of(recipe_of(tmp_path, *sets.values(), features))
    assert re.search(
        r"\(plain-3\) no embedding in .*coprs-deploy features", errors[f"data.{place}"]
    )


def test_open_data_without_a_valid_row_is_refused(tmp_path, scenes):
    recipe = recipe_of(tmp_path, scenes[:1], scenes[1:])
    (tmp_path / "training.jsonl").write_text('{"id": "1"}\n')
    assert "at least one row must be valid" in errors_of(recipe)["data.training"]


def test_open_data_finds_the_problems_of_both_files_at_once(tmp_path, scenes, with_two_targets):
    recipe = recipe_of(tmp_path, [*scenes[:2], with_two_targets], scenes[2:])
    rows = (tmp_path / "training.jsonl").read_text()
    (tmp_path / "training.jsonl").write_text(f'{rows}{{"id": "x", "respones": ""}}\nnot JSON\n')
    (tmp_path / "held_out.jsonl").unlink()
    problems = []
    assert open_data(recipe, problems) is None
    found = {(problem.where, problem.is_error) for problem in problems}
    assert found == {
        ("data.training", True),
        ("data.held_out", True),
        ("data.training, row 4, instruction", False),
        ("data.training, row 5", False),
        ("data.training", False),
    }
    assert any("respones (did you mean response?)" in problem.text for problem in problems)


def test_open_data_with_an_image_that_no_policy_accepts_names_it(tmp_path, scenes):
    thin = Example("thin", np.zeros((1, 500, 3), np.uint8), "it", np.ones((1, 1, 500), np.bool_))
    errors = errors_of(recipe_of(tmp_path, [*scenes[:2], thin], scenes[2:]))
    assert "1 example has (thin) an image with an aspect ratio above" in errors["data.training"]


def test_open_data_decodes_an_image_once_and_again_only_when_it_changed(tmp_path, scenes):
    recipe = recipe_of(tmp_path, scenes[:1], scenes[1:2])
    Image.fromarray(scenes[0].image).save(tmp_path / "0.png")
    row = json.loads((tmp_path / "training.jsonl").read_text())
    row.pop("image")
    lines = [json.dumps({**row, "id": str(i), "image_path": "0.png"}) + "\n" for i in range(5)]
    (tmp_path / "training.jsonl").write_text("".join(lines))
    cache = tmp_path / "images.json"

    def num_decoded():
        with mock.patch.object(image_checks, "load_image_source", wraps=load_image_source) as load:
            opened = open_data(recipe, problems := [], cache)
        assert not problems
        assert len(opened.contents["data.training"].rows) == 5
        return load.call_count, opened.contents["data.training"].hexdigest()

    (first, before), (second, after) = num_decoded(), num_decoded()
    assert (first, second) == (2, 0)
    assert before == after == digest(5 * scenes[:1])
    Image.fromarray(scenes[0].image[::-1]).save(tmp_path / "0.png")
    third, changed = num_decoded()
    assert third == 1
    assert changed != before
    cache.write_text("{")
    assert num_decoded() == (2, changed)


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
        {"ignore_mask": mask[0]},
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
        contents = open_data(load_recipe(str(tmp_path / "recipe.toml")), []).contents
        assert contents["data.training"].rows == contents["data.held_out"].rows
        assert len(contents["data.training"].rows) == 4
        hashes.add(contents["data.training"].hexdigest())
    assert hashes == {whole}
