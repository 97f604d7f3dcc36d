"""Whole runs of a tiny recipe: resumed after a kill, in two processes, and their outputs."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from coprs_deploy.checkpoint import read_checkpoint
from coprs_deploy.curriculum.recipe import CurriculumRecipe
from coprs_deploy.curriculum.state import build_tiny_state
from coprs_deploy.data.synthetic import PLAIN
from coprs_deploy.training.recipe import load_recipe
from coprs_deploy.training.runs.run_directory import RunDirectory
from coprs_deploy.training.state import state_from_checkpoint

SAME_BATCH_TOLERANCE = 2e-4
"""Relative difference of losses after a few steps, with one batch summed in another order."""


def start(recipe, out, scenes_dir, *settings):
    command = [sys.executable, "-m", "coprs_deploy.cli.main", "train", str(recipe)]
    command += ["--out", str(out), "--scenes-dir", str(scenes_dir)]
    for setting in settings:
        command += ["--set", setting]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (out.parent / f"{out.name}.log").open("a") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def losses(out):
    lines = RunDirectory(out).read_log()
    return {
        (line["stage"], line["step"]): {k: v for k, v in line.items() if k.startswith("loss")}
        for line in lines
        if "loss" in line
    }


def weights(out, stage):
    return torch.load(out / "stages" / stage / "weights.pt", weights_only=True)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, write_recipe, scenes_dir):
    """Return the directory of an uninterrupted run."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert start(write_recipe(max_steps=8), out, scenes_dir).wait() in (0, 1)
    return out


@pytest.mark.slow
@pytest.mark.extended
@pytest.mark.parametrize("stage", ["segmentation", "joint"])
def test_train_killed_and_resumed_gives_identical_weights(
    stage, tmp_path, whole_run, write_recipe, scenes_dir
):
    out = tmp_path / "killed"
    recipe = write_recipe(max_steps=8)
    process = start(recipe, out, scenes_dir)
    deadline = time.monotonic() + 300
    while not list((out / "stages" / stage).glob("state-*/progress.json")):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, "no state was written"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "stages" / "joint" / "result.json").exists()
    assert start(recipe, out, scenes_dir).wait() in (0, 1)
    assert losses(out) == losses(whole_run)
    for name in ("perception", "segmentation", "joint"):
        ours, theirs = weights(out, name), weights(whole_run, name)
        for part, tensors in ours.items():
            for key, tensor in tensors.items():
                assert torch.equal(tensor, theirs[part][key]), f"{name} {part} {key}"


@pytest.mark.slow
@pytest.mark.extended
def test_train_with_two_processes_gives_the_losses_of_one(tmp_path, write_recipe, scenes_dir):
    outs = {}
    for num_processes in (1, 2):
        out = tmp_path / f"processes-{num_processes}"
        recipe = write_recipe(num_processes=num_processes, optimizer="adamw")
        assert start(recipe, out, scenes_dir).wait() in (0, 1)
        outs[num_processes] = losses(out)
    assert outs[1].keys() == outs[2].keys()
    for key, one in outs[1].items():
        for name, value in one.items():
            assert outs[2][key][name] == pytest.approx(value, rel=SAME_BATCH_TOLERANCE), (key, name)


@pytest.mark.slow
@pytest.mark.extended
def test_train_with_workers_gives_identical_losses(tmp_path, whole_run, write_recipe, scenes_dir):
    out = tmp_path / "workers"
    assert start(write_recipe(max_steps=8), out, tmp_path / "scenes", "num_workers=2").wait() in (
        0,
        1,
    )
    assert losses(out) == losses(whole_run)
    rendered = list((tmp_path / "scenes").rglob("*.npy"))
    assert len(rendered) == 4
    for file in rendered:
        assert (
            file.read_bytes() == (scenes_dir / file.relative_to(tmp_path / "scenes")).read_bytes()
        )


@pytest.mark.slow
def test_train_writes_checkpoint_report_and_plots(whole_run):
    checkpoint = read_checkpoint(whole_run / "checkpoint")
    assert checkpoint.config.policy_image.max_pixels == 128**2
    report = json.loads((whole_run / "report.json").read_text())
    assert {"giou", "object_accuracy", "no_match_recall"} <= set(report["teacher_forced"])
    assert len(report["examples"]) == 4
    assert report["stages"]["joint"]["init_metrics"]["query_head_r2"] <= 1
    page = (whole_run / "report.md").read_text()
    assert "| perception | 2 |" in page
    plots = {path.name for path in (whole_run / "plots").iterdir()}
    assert plots >= {"perception.png", "segmentation.png", "joint.png"}
    assert list((whole_run / "tensorboard").rglob("events.*"))
    assert not list(whole_run.glob("stages/*/*state-*"))


@pytest.mark.slow
def test_train_reduces_the_losses(whole_run):
    found = losses(whole_run)
    for stage in ("segmentation", "joint"):
        assert found[stage, 8]["loss"] < found[stage, 1]["loss"]


@pytest.mark.slow
def test_build_tiny_state_from_checkpoint_takes_its_weights_and_tokenizer(whole_run, write_recipe):
    checkpoint = read_checkpoint(whole_run / "checkpoint")
    recipe = load_recipe(
        str(write_recipe()), [f"model.init_from={checkpoint.path}"], CurriculumRecipe
    )
    found = build_tiny_state(recipe.model, PLAIN, no_corpus, seed=5)
    stored = state_from_checkpoint(checkpoint)
    for part in ("policy", "segmentation"):
        assert_equal_states(found.state_dict()[part], stored.state_dict()[part])
    assert found.policy.tokenizer.get_vocab() == stored.policy.tokenizer.get_vocab()
    assert list(found.auxiliary_heads.state_dict()), "the auxiliary heads are built"


def no_corpus():
    raise AssertionError("the checkpoint has its tokenizer")


def assert_equal_states(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("model.policy.num_hidden_layers=3", "text_config.num_hidden_layers"),
        ("model.policy.rope_theta=600.0", "text_config.rope_parameters"),
        ("model.policy.vision_intermediate_size=128", "vision_config.intermediate_size"),
        ("model.segmentation.sam.encoder_depth=2", "the segmentation path"),
        ("model.policy.max_response_tokens=7", "the prompt"),
    ],
)
def test_build_tiny_state_from_checkpoint_of_other_sizes_raises(
    setting, named, whole_run, write_recipe
):
    settings = [f"model.init_from={whole_run / 'checkpoint'}", setting]
    recipe = load_recipe(str(write_recipe()), settings, CurriculumRecipe)
    with pytest.raises(ValueError, match=f"differs from the recipe in {named}"):
        build_tiny_state(recipe.model, PLAIN, no_corpus, seed=5)
