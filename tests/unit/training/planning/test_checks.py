"""Checks before the first step: settings, checkpoint, data, disk and memory, in one table."""

import json
import shutil
from types import SimpleNamespace

import pytest

from coprs_deploy.checkpoint import read_checkpoint
from coprs_deploy.cli.main import main
from coprs_deploy.conversion import random_checkpoint
from coprs_deploy.data.examples import write_examples
from coprs_deploy.data.synthetic import PLAIN, SceneExamples
from coprs_deploy.training.features import compute_features
from coprs_deploy.training.planning import checks
from coprs_deploy.training.planning.checks import check_run
from coprs_deploy.training.planning.problems import (
    Problem,
    ProblemsError,
    describe_problems,
    require_none,
)
from coprs_deploy.training.recipe import load_recipe, nearest_name

SUPERVISED = """
description = "a test"
precision = "fp32"
save_steps = 10

[model]
kind = "checkpoint"
path = "{folder}/checkpoint"

[data]
kind = "examples"
training = "{folder}/training.jsonl"
held_out = "{folder}/held_out.jsonl"

[stages.supervised]
kind = "supervised"
max_steps = 20
segmentation_loss_weight = 0.3

[stages.supervised.optimizer]
warmup_steps = 0
lr_multipliers = {{ prior = 2.0 }}
"""

GRPO = """
base = "supervised.toml"

[stages.grpo]
kind = "grpo"
max_steps = 20
global_batch_size = 4
num_generations = 4
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint, example files, and recipes that have no problem."""
    folder = tmp_path_factory.mktemp("checks")
    random_checkpoint(folder / "checkpoint", "tiny", "tiny")
    examples = list(SceneExamples(PLAIN, 4))
    for name in ("training", "held_out"):
        write_examples(folder / f"{name}.jsonl", examples)
    for name, text in (("supervised", SUPERVISED), ("grpo", GRPO)):
        (folder / f"{name}.toml").write_text(text.format(folder=folder))
    return folder


@pytest.fixture
def found(folder, tmp_path):
    """Check a recipe with settings; return errors and warnings as texts by key."""

    def check(*settings, recipe="supervised", processes=1):
        loaded = load_recipe(str(folder / f"{recipe}.toml"), settings)
        problems = check_run(loaded, tmp_path / "run", processes).problems
        assert not (tmp_path / "run").exists()
        return tuple(
            {p.where: p.text for p in problems if p.is_error == is_error}
            for is_error in (True, False)
        )

    return check


def test_check_run_without_a_problem_opens_checkpoint_and_data(folder, tmp_path):
    checked = check_run(load_recipe(str(folder / "grpo.toml")), tmp_path)
    assert not checked.problems
    assert checked.checkpoint.path == folder / "checkpoint"
    assert len(checked.data.training) == 4
    assert (tmp_path / "images.json").is_file()


def test_check_run_finds_settings_that_contradict_each_other(found):
    errors, warnings = found(
        *("stages.grpo.global_batch_size=3", "stages.grpo.num_iterations=3"),
        *("stages.grpo.mode=segmentation", "stages.grpo.segmentation_loss_weight=0"),
        *("stages.grpo.optimizer.warmup_steps=20", "stages.grpo.eval_steps=30"),
        *("stages.supervised.segmentation_loss_weight=0", "stages.supervised.global_batch_size=4"),
        *("stages.supervised.language_loss_weight=0",),
        "stages.supervised.optimizer.lr_multipliers={ priors = 2.0 }",
        recipe="grpo",
        processes=8,
    )
    assert "not divisible by 8 processes" in errors["stages.grpo"]
    assert "multiples of stages.grpo.num_iterations (3)" in errors["save_steps"]
    assert "nothing is trained" in errors["stages.grpo.segmentation_loss_weight"]
    assert "nothing is trained" in errors["stages.supervised"]
    assert "at least 8" in errors["stages.supervised.global_batch_size"]
    assert "did you mean prior?" in errors["stages.supervised.optimizer.lr_multipliers"]
    assert "never reaches its peak" in warnings["stages.grpo.optimizer.warmup_steps"]
    assert "at the end" in warnings["stages.grpo.eval_steps"]


def test_check_run_splits_the_completions_of_fewer_prompts_than_processes(found):
    more = ("stages.supervised.global_batch_size=4", "stages.grpo.global_batch_size=1")
    assert not found(*more, recipe="grpo", processes=4)[0]
    errors, _ = found(*more, recipe="grpo", processes=3)
    assert "accepted: multiples of 3" in errors["stages.grpo"]


def test_check_run_with_thresholds_of_masks_that_are_not_decoded_is_an_error(found):
    errors, _ = found(
        "stages.supervised.segmentation_loss_weight=0",
        "stages.supervised.thresholds={ teacher_forced_giou = 0.5 }",
    )
    assert list(errors) == ["stages.supervised.thresholds"]


def test_check_run_with_thresholds_that_are_never_met_is_an_error(found):
    errors, _ = found(
        "stages.supervised.thresholds={ teacher_forced_giou = 93 }",
        "stages.supervised.best_metric=relation.teacher_forced_giou",
    )
    assert "at most 1" in errors["stages.supervised.thresholds.teacher_forced_giou"]
    assert "question type" in errors["stages.supervised"]


def test_check_run_names_every_path_that_cannot_be_used(found, tmp_path):
    (tmp_path / "run").touch()
    loaded = [
        "model.path=nowhere",
        "data.training=no.jsonl",
        "data.held_out=refcoco",
        "data.features=no",
    ]
    (tmp_path / "run").unlink()
    errors, _ = found(*loaded)
    assert list(errors) == ["model.path", "data.features", "data.training", "data.held_out"]


def test_check_run_with_a_file_at_the_place_of_the_run_is_an_error(folder, tmp_path):
    (tmp_path / "run").touch()
    problems = check_run(load_recipe(str(folder / "supervised.toml")), tmp_path / "run").problems
    assert [problem.where for problem in problems] == ["--out"]


def test_check_run_with_embeddings_of_another_encoder_is_an_error(found, folder, tmp_path):
    checkpoint = read_checkpoint(folder / "checkpoint")
    images = [example.image for example in SceneExamples(PLAIN, 4)]
    compute_features(checkpoint, images, 4, tmp_path / "features")
    features = f"data.features={tmp_path / 'features'}"
    assert found(features) == ({}, {})
    errors, _ = found(features, "stages.supervised.train_image_encoder=true")
    assert list(errors) == ["stages.supervised.train_image_encoder"]
    index = json.loads((tmp_path / "features" / "features.json").read_text())
    (tmp_path / "features" / "features.json").write_text(json.dumps(index | {"encoder": "other"}))
    errors, _ = found(features)
    assert "different image encoder" in errors["data.features"]


def test_check_run_with_too_little_disk_is_an_error_and_with_little_memory_a_warning(
    found, monkeypatch
):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    monkeypatch.setattr(checks, "available_memory_bytes", lambda: 1e6)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    errors, warnings = found()
    assert "free at" in errors["disk"]
    assert "(estimated)" in warnings["stages.supervised"]


def test_describe_problems_lists_errors_first():
    problems = [Problem("a", "first", is_error=False), Problem("stages.b", "second")]
    lines = describe_problems(problems).splitlines()
    assert lines == [
        "1 error and 1 warning found before the first step",
        "error    stages.b  second",
        "warning  a         first",
    ]
    assert require_none(problems[:1]) is None
    with pytest.raises(ProblemsError, match="second"):
        require_none(problems)


def test_train_command_with_check_exits_by_errors_and_writes_nothing(folder, tmp_path, capsys):
    command = ["train", str(folder / "supervised.toml"), "--check", "--out", str(tmp_path / "run")]
    assert main(command) == 0
    assert "no problem" in capsys.readouterr().out
    wrong = ["--set", "data.training=no.jsonl", "--json"]
    assert main([*command, *wrong]) == 2
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert problem["where"] == "data.training"
    assert problem["is_error"]
    assert not list(tmp_path.iterdir())


def test_train_command_refuses_what_check_finds_before_the_first_step(folder, tmp_path, capsys):
    run = tmp_path / "run"
    command = ["train", str(folder / "supervised.toml"), "--out", str(run)]
    assert main([*command, "--set", "data.training=no.jsonl", "--set", "model.path=no"]) == 2
    shown = capsys.readouterr().err
    assert "2 errors found before the first step" in shown
    assert not (run / "stages").exists()


@pytest.mark.parametrize(
    ("settings", "texts"),
    [
        (["stages.reasoning.question_type_weights={ nearby = 1.0 }"], ["accepted: some of"]),
        (["stages.joint.thresholds={ 'nearby.giou' = 0.5 }"], ["did you mean nearest?"]),
        (["model.init_from=nowhere"], ["no checkpoint directory nowhere"]),
        (["data.preset=full", "model.policy.image_size=64"], ["accepted for the preset 'full'"]),
    ],
)
def test_train_command_checks_recipes_of_the_tiny_model(settings, texts, tmp_path, capsys):
    command = ["train", "demo", "--check", "--out", str(tmp_path / "run")]
    assert main(command) == 0
    for setting in settings:
        command += ["--set", setting]
    capsys.readouterr()
    assert main(command) == 2
    shown = capsys.readouterr().out
    assert all(text in shown for text in texts), shown
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("stages.grpo.steps", "stages.grpo.max_steps"),
        ("stages.grpo.optimizer.lr", "stages.grpo.optimizer.learning_rate"),
        ("stages.grpo.batch_size", "stages.grpo.global_batch_size"),
        ("stages.grpo.num_generation", "stages.grpo.num_generations"),
        ("max_steps", "stages.grpo.max_steps"),
        ("sede", "seed"),
        ("data.train", "data.preset"),
    ],
)
def test_nearest_name_is_one_that_makes_sense(wrong, right):
    keys = [
        *("seed", "save_steps", "save_dtype", "model.path", "data.preset"),
        *("stages.grpo.max_steps", "stages.grpo.eval_steps", "stages.grpo.num_generations"),
        *("stages.grpo.global_batch_size", "stages.grpo.per_device_train_batch_size"),
        "stages.grpo.optimizer.learning_rate",
    ]
    hint = nearest_name(wrong, keys)
    assert hint == f"; did you mean {right}?" if right != "data.preset" else hint == ""
