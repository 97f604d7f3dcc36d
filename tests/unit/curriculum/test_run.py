"""Whole runs of a tiny recipe: resumed after a kill, in two processes, and what they leave."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from coprs_deploy.checkpoint import read_checkpoint
from coprs_deploy.curriculum.state import build_tiny_state
from coprs_deploy.data.synthetic import PLAIN
from coprs_deploy.errors import ArtifactError
from coprs_deploy.training.recipe import load_recipe
from coprs_deploy.training.run import train
from coprs_deploy.training.run_directory import RunDirectory
from coprs_deploy.training.state import state_from_checkpoint

SAME_BATCH_TOLERANCE = 2e-4
"""Relative difference of losses when one batch is summed in another order, over a few steps."""


def start(recipe, out, scenes_folder, *settings):
    command = [sys.executable, "-m", "coprs_deploy.cli.main", "train", str(recipe)]
    command += ["--out", str(out), "--scenes", str(scenes_folder)]
    for setting in settings:
        command += ["--set", setting]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (out.parent / f"{out.name}.log").open("a") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def losses(out):
    lines = RunDirectory(out).read_log()
    return {
        (line["phase"], line["step"]): {k: v for k, v in line.items() if k.startswith("loss")}
        for line in lines
        if "loss" in line
    }


def weights(out, phase):
    return torch.load(out / "phases" / phase / "weights.pt", weights_only=True)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, write_recipe, scenes_folder):
    """A run that nobody disturbed."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert start(write_recipe(steps=8), out, scenes_folder).wait() in (0, 1)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["segmentation", "together"])
def test_a_killed_run_goes_on_to_the_last_digit(
    phase, tmp_path, whole_run, write_recipe, scenes_folder
):
    out = tmp_path / "killed"
    recipe = write_recipe(steps=8)
    process = start(recipe, out, scenes_folder)
    deadline = time.monotonic() + 300
    while not list((out / "phases" / phase).glob("state-*/progress.json")):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, "no state was written"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "phases" / "together" / "result.json").exists()
    assert start(recipe, out, scenes_folder).wait() in (0, 1)
    assert losses(out) == losses(whole_run)
    for name in ("warm_up", "segmentation", "together"):
        ours, theirs = weights(out, name), weights(whole_run, name)
        for part, tensors in ours.items():
            for key, tensor in tensors.items():
                assert torch.equal(tensor, theirs[part][key]), f"{name} {part} {key}"


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(tmp_path, write_recipe, scenes_folder):
    outs = {}
    for processes in (1, 2):
        out = tmp_path / f"processes-{processes}"
        recipe = write_recipe(processes=processes, muon=False)
        assert start(recipe, out, scenes_folder).wait() in (0, 1)
        outs[processes] = losses(out)
    assert outs[1].keys() == outs[2].keys()
    for key, one in outs[1].items():
        for name, value in one.items():
            assert outs[2][key][name] == pytest.approx(value, rel=SAME_BATCH_TOLERANCE), (key, name)


@pytest.mark.slow
def test_workers_change_no_digit(tmp_path, whole_run, write_recipe, scenes_folder):
    out = tmp_path / "workers"
    assert start(write_recipe(steps=8), out, tmp_path / "scenes", "workers=2").wait() in (0, 1)
    assert losses(out) == losses(whole_run)
    for drawn in (tmp_path / "scenes").rglob("*.npy"):
        kept = scenes_folder / drawn.relative_to(tmp_path / "scenes")
        assert drawn.read_bytes() == kept.read_bytes()


@pytest.mark.slow
def test_a_run_leaves_a_checkpoint_and_its_report(whole_run):
    checkpoint = read_checkpoint(whole_run / "checkpoint")
    assert checkpoint.config.policy_image.max_pixels == 128**2
    report = json.loads((whole_run / "report.json").read_text())
    assert {"giou", "object_accuracy", "no_match_recall"} <= set(report["teacher_forced"])
    assert len(report["answers"]) == 4
    assert report["phases"]["together"]["facts"]["join_r2"] <= 1
    page = (whole_run / "report.md").read_text()
    assert "| warm_up | 2 |" in page
    plots = {path.name for path in (whole_run / "plots").iterdir()}
    assert plots >= {"warm_up.png", "segmentation.png", "together.png"}
    assert list((whole_run / "tensorboard").rglob("events.*"))
    assert not list(whole_run.glob("phases/*/*state-*"))


@pytest.mark.slow
def test_losses_fall(whole_run):
    found = losses(whole_run)
    for phase in ("segmentation", "together"):
        assert found[phase, 8]["loss"] < found[phase, 1]["loss"]


def test_another_recipe_is_refused_in_the_same_folder(tmp_path, write_recipe):
    folder = RunDirectory(tmp_path / "run")
    recipe = load_recipe(str(write_recipe()))
    assert not folder.open(recipe)
    assert folder.open(recipe)
    changed = load_recipe(str(write_recipe()), ["phases.segmentation.steps=9"])
    with pytest.raises(ValueError, match=r"phases\.segmentation\.steps"):
        folder.open(changed)


def test_the_log_is_rewound_to_the_state(tmp_path):
    folder = RunDirectory(tmp_path)
    for phase, step in (("one", 1), ("one", 2), ("two", 1), ("two", 2), ("two", 3)):
        folder.log({"phase": phase, "step": step})
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"phase": "two", "st')
    folder.rewind_log("two", 2)
    kept = [(line["phase"], line["step"]) for line in folder.read_log()]
    assert kept == [("one", 1), ("one", 2), ("two", 1), ("two", 2)]


def test_a_small_model_takes_no_example_files(tmp_path, write_recipe):
    recipe = load_recipe(str(write_recipe()))
    data = load_recipe("qwen2_5_vl_3b").data
    mixed = type(recipe)(description="", model=recipe.model, data=data, phases=recipe.phases)
    with pytest.raises(ValueError, match=r'needs model\.kind "checkpoint"'):
        train(mixed, tmp_path / "run")


@pytest.mark.slow
def test_a_small_model_goes_on_from_a_checkpoint(whole_run, write_recipe):
    checkpoint = read_checkpoint(whole_run / "checkpoint")
    recipe = load_recipe(str(write_recipe()), [f"model.start={checkpoint.path}"])
    found = build_tiny_state(recipe.model, PLAIN, no_corpus, seed=5)
    stored = state_from_checkpoint(checkpoint)
    for part in ("policy", "segmentation"):
        assert_equal_states(found.state_dict()[part], stored.state_dict()[part])
    assert found.policy.tokenizer.get_vocab() == stored.policy.tokenizer.get_vocab()
    assert list(found.heads.state_dict()), "the throw-away heads are there"


def no_corpus():
    raise AssertionError("the checkpoint brings its tokenizer")


def assert_equal_states(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("model.policy.depth=3", "text_config.num_hidden_layers"),
        ("model.policy.rope_theta=600.0", "text_config.rope_parameters"),
        ("model.policy.vision_intermediate_size=128", "vision_config.intermediate_size"),
        ("model.segmentation.sam.encoder_depth=2", "the segmentation path"),
        ("model.policy.max_response_tokens=7", "the prompt"),
    ],
)
def test_a_checkpoint_of_other_sizes_is_refused(setting, named, whole_run, write_recipe):
    start_from = f"model.start={whole_run / 'checkpoint'}"
    recipe = load_recipe(str(write_recipe()), [start_from, setting])
    with pytest.raises(ValueError, match=f"differs from the recipe in {named}"):
        build_tiny_state(recipe.model, PLAIN, no_corpus, seed=5)


def test_two_runs_do_not_share_a_folder(tmp_path):
    with (
        RunDirectory(tmp_path).lock(),
        pytest.raises(ArtifactError, match="another process trains"),
        RunDirectory(tmp_path).lock(),
    ):
        pass
    with RunDirectory(tmp_path).lock():
        pass
