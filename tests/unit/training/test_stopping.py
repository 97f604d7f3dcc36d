"""Runs that are stopped: by signals, with states and checkpoints, and resumed to the same bits."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from coprs_deploy.checkpoint import read_checkpoint
from coprs_deploy.training.runs.run_directory import RunDirectory
from coprs_deploy.training.state import state_from_checkpoint

pytestmark = pytest.mark.slow

SUPERVISED = """
description = "a test"
seed = 0
precision = "fp32"
save_dtype = "float32"
logging_steps = 1
save_steps = 1000

[model]
kind = "checkpoint"
path = ""
gradient_checkpointing = false

[data]
kind = "synthetic"
num_training_scenes = 16
num_held_out_scenes = 4
num_no_match_scenes = 1

[stages.supervised]
kind = "supervised"
max_steps = 8
global_batch_size = 2
segmentation_loss_weight = 0.3
num_eval_examples = 2

[stages.supervised.optimizer]
learning_rate = 1e-4
name = "adamw"
warmup_steps = 0
"""

GRPO = """
base = "grpo_demo"
description = "a test"
precision = "fp32"
save_dtype = "float32"
save_steps = 1000

[data]
num_training_scenes = 16
num_held_out_scenes = 4

[stages.grpo]
max_steps = 4
global_batch_size = 2
num_generations = 2
max_completion_length = 40
eval_steps = 2
num_eval_examples = 2
num_completions_to_print = 2

[stages.grpo.optimizer]
learning_rate = 1e-3
"""


@pytest.fixture(
    scope="module", params=["supervised", pytest.param("grpo", marks=pytest.mark.extended)]
)
def stage(request):
    return request.param


@pytest.fixture(scope="module")
def recipe(stage, tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / f"{stage}.toml"
    path.write_text({"supervised": SUPERVISED, "grpo": GRPO}[stage])
    return path


def command_of(recipe, out, *more):
    return [
        *(sys.executable, "-m", "coprs_deploy", "train", str(recipe), "--out", str(out)),
        *more,
    ]


def start(recipe, out, *more):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (out.parent / f"{out.name}.log").open("a") as log:
        return subprocess.Popen(
            command_of(recipe, out, *more), env=environment, stdout=log, stderr=log
        )


def finish(recipe, out, *more):
    assert start(recipe, out, *more).wait() == 0, log_of(out)


def export(out, *more):
    """Write the checkpoint of a state, and load it."""
    command = [sys.executable, "-m", "coprs_deploy", "train", "--export-state", str(out), *more]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return state_from_checkpoint(read_checkpoint(done.stdout.strip())).state_dict()


def log_of(out):
    return (out.parent / f"{out.name}.log").read_text()


def wait_for_step(process, out, step):
    deadline = time.monotonic() + 300
    while True:
        lines = RunDirectory(out).read_log()
        if any("loss" in line and line["step"] >= step for line in lines):
            return
        assert process.poll() is None, log_of(out)[-3000:]
        assert time.monotonic() < deadline, "no step was logged"
        time.sleep(0.005)


def weights_of(out, stage):
    parts = torch.load(out / "stages" / stage / "weights.pt", weights_only=True)
    return {f"{part}.{name}": t for part, tensors in parts.items() for name, t in tensors.items()}


def losses_of(out):
    return [(x["step"], x["loss"]) for x in RunDirectory(out).read_log() if "loss" in x]


@pytest.fixture(scope="module")
def whole_run(recipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    finish(recipe, out)
    return out


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGINT", marks=pytest.mark.extended)])
def test_stopped_run_keeps_a_state_and_resumes_to_the_same_bits(
    tmp_path, recipe, stage, whole_run, name
):
    out = tmp_path / "stopped"
    number = getattr(signal, name)
    process = start(recipe, out)
    wait_for_step(process, out, 1)
    process.send_signal(number)
    assert process.wait(timeout=120) == 128 + number
    (state,) = (out / "stages" / stage).glob("state-*")
    assert f"{state} is kept; re-run the same command" in log_of(out)
    assert not (out / "checkpoint").exists()
    assert f"not finished: {stage} has had " in (out / "report.md").read_text()

    exported = export(out)
    step = json.loads((state / "progress.json").read_text())["step"]
    final = weights_of(whole_run, stage)
    assert any(not torch.equal(t, final[f"policy.{n}"]) for n, t in exported["policy"].items())

    finish(recipe, out)
    assert f"resumed from step {step}" in log_of(out)
    assert losses_of(out) == losses_of(whole_run)
    resumed = weights_of(out, stage)
    assert all(torch.equal(tensor, final[key]) for key, tensor in resumed.items())
    curves = EventAccumulator(str(out / "tensorboard")).Reload()
    steps = [event.step for event in curves.Scalars(f"{stage}/loss")]
    assert steps == [step for step, _ in losses_of(whole_run)]


def test_export_state_has_the_weights_of_the_state(tmp_path, recipe, stage):
    """A run that ends after two steps has the weights of the state after two of them."""
    out = tmp_path / "killed"
    process = start(recipe, out, "--set", "save_steps=2")
    while not list((out / "stages" / stage).glob("state-000002/progress.json")):
        assert process.poll() is None, log_of(out)
        time.sleep(0.005)
    process.kill()
    process.wait()
    exported = export(out, "--step", "2")
    for leftover in (out / "stages" / stage).glob("state-*"):
        assert leftover.name == "state-000002"
    finish(recipe, out, "--set", f"stages.{stage}.max_steps=2")
    ended = weights_of(out, stage)
    for part, tensors in exported.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, ended[f"{part}.{name}"]), name


CHANGES = {
    "supervised": ("max_steps=3", "eval_steps=1", "num_eval_examples=1"),
    "grpo": ("max_steps=3", "per_device_train_batch_size=2", "eval_steps=0"),
}
"""Settings of a stage that a resumed run changes."""


@pytest.mark.extended
def test_resumed_run_may_change_memory_evaluation_and_length(tmp_path, recipe, stage, whole_run):
    out = tmp_path / "changed"
    process = start(recipe, out)
    wait_for_step(process, out, 1)
    process.terminate()
    assert process.wait(timeout=120) == 143
    step = len(losses_of(out))
    assert step < 3, "the run was stopped too late"
    changes = [word for each in CHANGES[stage] for word in ("--set", f"stages.{stage}.{each}")]
    finish(recipe, out, *changes)
    assert [n for n, _ in losses_of(out)] == [1, 2, 3]
    assert "not finished" not in (out / "report.md").read_text()
    found, expected = losses_of(out), losses_of(whole_run)
    assert found[:step] == expected[:step]
    # The schedule of the learning rate ends earlier, which the first resumed step does not show.
    assert found[step][1] == pytest.approx(expected[step][1], rel=0.05)


def test_finished_run_with_more_steps_names_the_way_on(tmp_path, recipe, stage, whole_run):
    done = subprocess.run(
        command_of(recipe, whole_run, "--set", f"stages.{stage}.max_steps=99"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "to train on, start a run in another directory with model.path=" in done.stderr


@pytest.mark.extended
def test_best_checkpoint_is_that_of_the_best_evaluation(tmp_path, recipe, stage):
    out = tmp_path / "best"
    every_step = ("--set", f"stages.{stage}.eval_steps=1")
    finish(recipe, out, *every_step, "--set", f"stages.{stage}.max_steps=2")
    result = json.loads((out / "stages" / stage / "result.json").read_text())
    metric = "eval/giou" if stage == "grpo" else "eval/teacher_forced_giou"
    values = {
        line["step"]: line[metric]
        for line in RunDirectory(out).read_log()
        if line.get(metric) is not None and line["step"] > 0
    }
    best = max(values, key=lambda step: (values[step], -step))
    assert result["best"] == {"step": best, "value": values[best]}
    checkpoint = read_checkpoint(out / "checkpoints" / "best")
    assert checkpoint.config.provenance["step"] == best
    if best == 2:
        found = state_from_checkpoint(checkpoint).state_dict()
        for name, tensor in found["policy"].items():
            assert torch.equal(tensor, weights_of(out, stage)[f"policy.{name}"]), name


@pytest.mark.extended
def test_best_checkpoint_is_exported_and_evaluated_while_the_run_trains(tmp_path, recipe, stage):
    out, bundle = tmp_path / "long", tmp_path / "bundle"
    settings = (f"stages.{stage}.max_steps=500", f"stages.{stage}.eval_steps=1", "save_steps=1")
    process = start(recipe, out, *(word for each in settings for word in ("--set", each)))
    try:
        wait_for_step(process, out, 2)
        best = out / "checkpoints" / "best"
        for command in (
            ("export", str(best), "--out", str(bundle)),
            ("evaluate", str(bundle), "--num-examples", "2", "--num-no-match", "0"),
        ):
            subprocess.run([sys.executable, "-m", "coprs_deploy", *command], check=True)
        assert process.poll() is None, log_of(out)
        report = (out / "report.md").read_text()
        assert f"not finished: {stage} has had " in report
        assert "Best evaluation of " in report
        process.terminate()
        assert process.wait(timeout=300) == 143
    finally:
        process.kill()
        process.wait()
    assert len(losses_of(out)) > 2, "the run did not train on"
    checkpoints = [path.name for path in (out / "checkpoints").iterdir()]
    assert {"last", "best"} < set(checkpoints)
    assert not [name for name in checkpoints if name.startswith(".")]


@pytest.mark.extended
@pytest.mark.parametrize("end", ["TERM", "KILL"])
def test_end_of_the_parent_of_two_processes_ends_both(tmp_path, recipe, stage, end):
    out = tmp_path / "two"
    two = ("--set", "num_processes=2")
    process = start(recipe, out, *two)
    wait_for_step(process, out, 1)
    children = psutil.Process(process.pid).children()
    assert len(children) == 2
    process.send_signal(getattr(signal, f"SIG{end}"))
    code = process.wait(timeout=120)
    assert code == (143 if end == "TERM" else -9)
    deadline = time.monotonic() + 120
    while any(map(is_running, children)):
        assert time.monotonic() < deadline, "processes train on without their parent"
        time.sleep(0.05)
    assert list((out / "stages" / stage).glob("state-*/progress.json"))
    finish(recipe, out, *two)
    assert (out / "report.json").is_file()


def is_running(process):
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def test_samples_show_text_and_different_prompts(whole_run, stage):
    if stage != "grpo":
        pytest.skip("samples are written by GRPO stages")
    folder = whole_run / "samples" / "grpo"
    lines = [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 2, 4, 4]
    for one, other in (lines[:2], lines[2:]):
        assert one["id"] != other["id"]
    assert all(
        {"num_targets", "num_found", "mask_iou", "response"} <= line.keys() for line in lines
    )
