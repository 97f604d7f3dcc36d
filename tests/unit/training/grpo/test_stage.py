"""GRPO runs through the command line: resume after a kill, merged adapters, files of a run."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from coprs_deploy.checkpoint import read_checkpoint
from coprs_deploy.demo import CHECKPOINT
from coprs_deploy.export import export_checkpoint
from coprs_deploy.training.runs.run_directory import RunDirectory

RECIPE = """
base = "grpo_demo"
description = "a test"
seed = 3
save_steps = 1

[data]
num_training_scenes = 12
num_held_out_scenes = 2

[stages.grpo]
max_steps = {steps}
global_batch_size = 2
num_generations = 2
max_completion_length = 40
eval_steps = 2
num_completions_to_print = 2

[stages.grpo.optimizer]
learning_rate = 1e-3
{more}
"""

THREE_STAGES = """
description = "a test"
precision = "fp32"
logging_steps = 1

[model]
kind = "checkpoint"
path = ""

[data]
kind = "synthetic"
num_training_scenes = 8
num_held_out_scenes = 1
num_no_match_scenes = 0
"""

STAGES = {
    "supervised": """
kind = "supervised"
max_steps = 2
global_batch_size = 1
segmentation_loss_weight = 0.3
num_eval_examples = 1
optimizer = { learning_rate = 1e-4, name = "adamw", warmup_steps = 0 }
""",
    "grpo": """
kind = "grpo"
max_steps = 1
global_batch_size = 1
num_generations = 2
max_completion_length = 24
num_eval_examples = 1
optimizer = { learning_rate = 1e-4, name = "adamw", warmup_steps = 0 }
""",
}


@pytest.fixture(scope="module")
def write_grpo_recipe(tmp_path_factory):
    def write(steps=4, more=""):
        path = tmp_path_factory.mktemp("recipe") / "grpo.toml"
        path.write_text(RECIPE.format(steps=steps, more=more))
        return path

    return write


def start(recipe, out):
    command = [sys.executable, "-m", "coprs_deploy", "train", str(recipe)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (out.parent / f"{out.name}.log").open("a") as log:
        return subprocess.Popen(
            [*command, "--out", str(out)], env=environment, stdout=log, stderr=log
        )


def metrics_of(out):
    """Return the lines of the log without times."""
    return [
        {k: v for k, v in line.items() if k not in ("seconds", "step_time", "peak_memory_gb")}
        for line in RunDirectory(out).read_log()
    ]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, write_grpo_recipe):
    """A run without interruption."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    process = start(write_grpo_recipe(), out)
    assert process.wait() == 0, (out.parent / "whole.log").read_text()[-3000:]
    return out


@pytest.mark.slow
@pytest.mark.extended
def test_killed_run_resumes_to_the_same_bits(tmp_path, whole_run, write_grpo_recipe):
    out = tmp_path / "killed"
    recipe = write_grpo_recipe()
    process = start(recipe, out)
    deadline = time.monotonic() + 300
    while not list((out / "stages" / "grpo").glob("state-00000[23]/progress.json")):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, "no state was written"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "stages" / "grpo" / "result.json").exists()
    assert start(recipe, out).wait() == 0
    assert metrics_of(out) == metrics_of(whole_run)
    after_resume = [line["kl"] for line in metrics_of(out) if line.get("kl") is not None][-1]
    assert after_resume > 1e-6, "the policy was reset to its reference"
    ours, theirs = (
        torch.load(run / "stages" / "grpo" / "weights.pt", weights_only=True)
        for run in (out, whole_run)
    )
    for part, tensors in ours.items():
        for key, tensor in tensors.items():
            assert torch.equal(tensor, theirs[part][key]), f"{part} {key}"


@pytest.mark.slow
@pytest.mark.extended
def test_run_killed_in_its_last_evaluation_has_the_samples_of_its_last_step(
    tmp_path, write_grpo_recipe
):
    out = tmp_path / "killed"
    recipe = write_grpo_recipe(steps=2)
    process = start(recipe, out)
    while not list((out / "stages" / "grpo").glob("state-000002/progress.json")):
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert not (out / "stages" / "grpo" / "result.json").exists()
    assert start(recipe, out).wait() == 0
    samples = out / "samples" / "grpo"
    assert (samples / "step-000002.png").is_file()
    lines = (samples / "completions.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 2]


@pytest.mark.slow
def test_run_writes_log_samples_held_out_and_plots(whole_run):
    log = RunDirectory(whole_run).read_log()
    steps = [line for line in log if "reward" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    for name in (
        *("loss", "loss/policy", "loss/prior_bce", "loss/mask_dice", "rewards/mask/mean"),
        *("rewards/format/mean", "reward_std", "frac_reward_zero_std", "kl", "entropy"),
        *("clip_ratio/region_mean", "grad_norm", "sampled_giou", "sampled_prior_giou"),
        *("completions/mean_length", "completions/clipped_ratio"),
    ):
        assert all(isinstance(line[name], float) for line in steps), name
    assert sum(name.startswith("learning_rate/") for name in steps[0]) == 4
    assert steps[0]["kl"] < 1e-6 < steps[-1]["kl"]
    evaluations = [line for line in log if "eval/giou" in line]
    assert [line["step"] for line in evaluations] == [0, 2, 4]
    samples = whole_run / "samples" / "grpo"
    assert {p.name for p in samples.glob("*.png")} == {"step-000002.png", "step-000004.png"}
    completions = [json.loads(x) for x in (samples / "completions.jsonl").read_text().splitlines()]
    assert len(completions) == 4
    assert any("<REF_POS>" in line["response"] for line in completions)
    held_out = json.loads((whole_run / "held_out" / "grpo" / "step-000004.json").read_text())
    assert len(held_out["examples"]) == 2
    report = json.loads((whole_run / "report.json").read_text())
    init_metrics = report["stages"]["grpo"]["init_metrics"]
    assert init_metrics["before/giou"] == evaluations[0]["eval/giou"]
    assert (whole_run / "plots" / "grpo.png").stat().st_size > 10_000
    assert list((whole_run / "tensorboard").rglob("events.*"))
    assert not list(whole_run.glob("stages/*/*state-*"))
    assert not list(whole_run.glob("stages/*/checkpoint-*"))


@pytest.mark.slow
def test_run_says_what_it_trains_on_and_how_much_was_cut_off(whole_run):
    text = (whole_run.parent / "whole.log").read_text()
    assert re.search(r"checkpoint: 12 training examples, 2 held out; cpu, (fp32|bf16), ", text)
    assert "processes: 1, threads: 1" in text
    assert "grpo: 2 prompts x 2 completions" in text
    assert "grpo: 4 steps, from its first step" in text
    assert "a state and a checkpoint every 1 steps, the last 2 kept; curves: tensorboard" in text
    parts = (
        r"grpo +2/4  reward [\d.]+ \(mask [\d.]+, format [\d.]+\)",
        *(r"loss [-\d.]+", r"kl \S+", r"length \d+, cut off \d+%", r"grad_norm \S+", r"lr \S+"),
        *(r"\d+ MB", r"\S+ s/step", r"[\d minsec]+ left"),
    )
    assert re.search("  ".join(parts), text), text


@pytest.mark.slow
@pytest.mark.extended
def test_curves_of_a_stage_start_after_all_earlier_stages(tmp_path):
    stages = {"first": "supervised", "second": "grpo", "third": "supervised"}
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        THREE_STAGES + "".join(f"[stages.{name}]\n{STAGES[kind]}" for name, kind in stages.items())
    )
    out = tmp_path / "out"
    assert start(recipe, out).wait() == 0, (tmp_path / "out.log").read_text()[-3000:]
    curves = EventAccumulator(str(out / "tensorboard")).Reload()
    steps = {name: [event.step for event in curves.Scalars(f"{name}/loss")] for name in stages}
    assert steps == {"first": [1, 2], "second": [3], "third": [4, 5]}


@pytest.mark.slow
def test_checkpoint_of_a_run_can_be_exported(whole_run, tmp_path):
    checkpoint = read_checkpoint(whole_run / "checkpoint")
    assert "segmentation" not in " ".join(load_file(checkpoint.policy_path / "model.safetensors"))
    config = (checkpoint.policy_path / "config.json").read_text()
    assert str(CHECKPOINT.parent) not in config, "the path of this machine is in the checkpoint"
    start_weights = load_file(CHECKPOINT / "segmentation.safetensors")
    weights = load_file(checkpoint.path / "segmentation.safetensors")
    changed = {n for n, t in weights.items() if not torch.equal(t, start_weights[n])}
    assert {n.split(".")[0] for n in changed} == {"prior", "prompt_encoder", "mask_decoder"}
    assert export_checkpoint(checkpoint.path, tmp_path / "bundle").bundle.path.is_dir()


@pytest.mark.slow
def test_adapters_are_merged_into_the_checkpoint(tmp_path, write_grpo_recipe):
    out = tmp_path / "lora"
    recipe = write_grpo_recipe(steps=2, more="\n[stages.grpo.lora]\nr = 4\nlora_alpha = 8.0\n")
    assert start(recipe, out).wait() == 0, (tmp_path / "lora.log").read_text()[-3000:]
    before = load_file(CHECKPOINT / "policy" / "model.safetensors")
    after = load_file(out / "checkpoint" / "policy" / "model.safetensors")
    assert after.keys() == before.keys()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed
    assert all("_proj.weight" in name and "visual" not in name for name in changed)
    weights = load_file(out / "checkpoint" / "segmentation.safetensors")
    start_weights = load_file(CHECKPOINT / "segmentation.safetensors")
    assert any(not torch.equal(t, start_weights[n]) for n, t in weights.items())
