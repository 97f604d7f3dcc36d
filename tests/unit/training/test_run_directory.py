"""Run directory: locking, resuming and the log."""

import json
import re
import shlex

import pytest
from accelerate import Accelerator

from coprs_deploy.errors import ArtifactError
from coprs_deploy.training.progress import StageProgress, clear_finished
from coprs_deploy.training.recipe import Recipe, load_recipe
from coprs_deploy.training.run import resolve_precision
from coprs_deploy.training.run_directory import RunDirectory, all_passed
from coprs_deploy.training.settings import CheckpointModel, SupervisedSettings, SyntheticData


def with_progress(directory):
    """Give a run directory a state."""
    (directory.stage("supervised") / "state-000001").mkdir(parents=True)
    return directory


def test_open_with_other_settings_raises(tmp_path):
    directory = with_progress(RunDirectory(tmp_path / "run"))
    assert not directory.open(load_recipe("supervised_7b"))
    assert directory.open(load_recipe("supervised_7b"))
    changed = load_recipe("supervised_7b", ["stages.supervised.global_batch_size=9"])
    with pytest.raises(ValueError, match=r"stages\.supervised\.global_batch_size"):
        directory.open(changed)


def test_open_with_other_settings_before_the_first_state_starts_again(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    directory.open(load_recipe("supervised_7b"))
    changed = load_recipe("supervised_7b", ["seed=9"])
    directory.open(changed)
    with_progress(directory)
    assert directory.open(changed)
    with pytest.raises(ValueError, match=r"other settings: seed \(was: 9; now: 0\)"):
        directory.open(load_recipe("supervised_7b"))


@pytest.mark.parametrize(
    ("recipe", "settings"),
    [
        (
            "supervised_7b",
            [
                *("num_threads=3", "num_workers=1", "save_steps=7", "logging_steps=2"),
                *("description=x", "save_dtype=float32", "save_total_limit=3"),
                *("model.path=./elsewhere", "data.training=./data/training.parquet"),
                *("data.features=features", "model.gradient_checkpointing=false"),
                *("stages.supervised.max_steps=9", "stages.supervised.eval_steps=3"),
                *(
                    "stages.supervised.num_eval_examples=5",
                    "stages.supervised.thresholds.teacher_forced_giou=0.1",
                ),
            ],
        ),
        (
            "grpo_7b",
            [
                *("stages.grpo.per_device_train_batch_size=1", "stages.grpo.max_targets=2"),
                *("stages.grpo.num_completions_to_print=2", "stages.grpo.max_steps=7"),
                "stages.grpo.vllm_gpu_memory_utilization=0.2",
            ],
        ),
    ],
)
def test_open_with_other_free_keys_resumes_and_records_them(tmp_path, recipe, settings):
    directory = with_progress(RunDirectory(tmp_path / "run"))
    directory.open(load_recipe(recipe))
    changed = load_recipe(recipe, settings)
    assert directory.open(changed)
    assert json.loads((directory.path / "recipe.json").read_text()) == json.loads(
        json.dumps(changed.to_json())
    )


def test_open_on_a_machine_with_another_precision_names_the_setting_that_resumes(
    tmp_path, monkeypatch
):
    automatic = load_recipe("supervised_7b", ["precision=auto"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx512_bf16": True})
    directory = with_progress(RunDirectory(tmp_path / "run"))
    directory.open(resolve_precision(automatic))
    monkeypatch.setattr("torch.cpu.get_capabilities", dict)
    with pytest.raises(ValueError, match=r"precision \(was: bf16; now: fp32\)") as caught:
        directory.open(resolve_precision(automatic))
    (setting,) = re.findall(r"to resume it, add --set (\S+);", str(caught.value))
    assert setting == "precision=bf16"
    assert directory.open(resolve_precision(load_recipe("supervised_7b", [setting])))


def test_open_with_other_settings_names_the_settings_that_resume(tmp_path):
    directory = with_progress(RunDirectory(tmp_path / "run"))
    directory.open(load_recipe("grpo_demo"))
    changes = ["stages.grpo.optimizer.betas=[0.5,0.9]", "data.preset=full", "seed=7"]
    with pytest.raises(ValueError, match=r"add --set data\.preset=plain") as caught:
        directory.open(load_recipe("grpo_demo", changes))
    words = shlex.split(str(caught.value).partition("add ")[2].partition(";")[0])
    assert directory.open(load_recipe("grpo_demo", [*changes, *words[1::2]]))


@pytest.mark.parametrize("setting", ["seed=5", "stages.grpo.beta=0.1", "data.kind=synthetic"])
def test_open_with_another_training_raises(tmp_path, setting):
    directory = with_progress(RunDirectory(tmp_path / "run"))
    directory.open(load_recipe("grpo_demo"))
    with pytest.raises(ValueError, match="other settings"):
        directory.open(load_recipe("grpo_demo", [setting, "model.freeze_vision_tower=true"]))


def test_check_inputs_refuses_other_contents(tmp_path):
    directory = with_progress(RunDirectory(tmp_path))
    inputs = {"model.path": "a", "data.training": {"examples": 30, "hash": "b"}}
    directory.check_inputs(inputs)
    directory.check_inputs(inputs)
    fewer = inputs | {"data.training": {"examples": 20, "hash": "c"}}
    with pytest.raises(ValueError, match=r"contents of data\.training .*30.*20"):
        directory.check_inputs(fewer)
    assert directory.check_inputs(inputs) is None


def test_check_inputs_before_the_first_state_takes_the_new_ones(tmp_path):
    directory = RunDirectory(tmp_path)
    directory.check_inputs({"model.path": "a"})
    directory.check_inputs({"model.path": "b"})
    with_progress(directory)
    with pytest.raises(ValueError, match=r"model\.path"):
        directory.check_inputs({"model.path": "a"})


def test_lock_held_by_another_run_raises(tmp_path):
    with (
        RunDirectory(tmp_path).lock(),
        pytest.raises(ArtifactError, match="another process trains"),
        RunDirectory(tmp_path).lock(),
    ):
        pass
    with RunDirectory(tmp_path).lock():
        assert tmp_path.is_dir()


def test_rewind_log_removes_later_lines_of_the_stage(tmp_path):
    directory = RunDirectory(tmp_path)
    for stage, step in (("one", 1), ("one", 2), ("two", 1), ("two", 2), ("two", 3)):
        directory.log({"stage": stage, "step": step})
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"stage": "two", "st')
    assert directory.rewind_log("two", 2) == 3
    kept = [(line["stage"], line["step"]) for line in directory.read_log()]
    assert kept == [("one", 1), ("one", 2), ("two", 1), ("two", 2)]
    assert directory.rewind_log("two", 1) == 3, "a tracker has step 3 since the first run"


def progress_of(directory, limit=1, **settings):
    settings = SupervisedSettings(**{"max_steps": 9, **settings})
    recipe = Recipe(
        description="a test",
        model=CheckpointModel(),
        data=SyntheticData(),
        stages={"one": settings},
        save_total_limit=limit,
    )
    return StageProgress(directory, Accelerator(cpu=True), "one", recipe)


def test_commit_replaces_older_states(tmp_path):
    directory = RunDirectory(tmp_path)
    for step in (2, 4):
        progress = progress_of(directory)
        progress.init_metrics = {"before": float(step)}
        progress.partial_state(step).mkdir(parents=True)
        progress.commit(step)
    progress = progress_of(directory)
    assert progress.step == progress.kept_step == 4
    assert progress.init_metrics == {"before": 4.0}
    assert list(directory.stage("one").iterdir()) == [progress.state]


def test_commit_keeps_the_newest_states(tmp_path):
    directory = RunDirectory(tmp_path)
    for step in (2, 4, 6):
        progress_of(directory).partial_state(step).mkdir(parents=True)
        progress_of(directory, limit=2).commit(step)
    found = sorted(path.name for path in directory.stage("one").iterdir())
    assert found == ["state-000004", "state-000006"]
    assert progress_of(directory).step == 6


def test_start_removes_what_a_killed_run_was_writing_or_removing(tmp_path):
    directory = RunDirectory(tmp_path)
    for folder in (directory.stage("one"), tmp_path / "checkpoints"):
        (folder / ".one-000002.removed").mkdir(parents=True)
        (folder / ".last").symlink_to("nowhere")
    progress = progress_of(directory)
    progress.start()
    assert not list(directory.stage("one").glob(".*"))
    assert not list((tmp_path / "checkpoints").iterdir())


def test_clear_finished_removes_what_a_killed_run_left_of_its_states(tmp_path):
    for name in ("state-000002", ".state-000001.removed", "checkpoint-3", "reference"):
        (tmp_path / name).mkdir()
    (tmp_path / "result.json").touch()
    clear_finished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_progress_with_fewer_steps_than_the_state_raises(tmp_path):
    directory = RunDirectory(tmp_path)
    progress_of(directory).partial_state(4).mkdir(parents=True)
    progress_of(directory).commit(4)
    with pytest.raises(ValueError, match=r"max_steps is 3, .*accepted: 4 .*or more"):
        progress_of(directory, max_steps=3)
    assert progress_of(directory, max_steps=4).step == 4


def test_log_evaluation_tells_the_best_of_several(tmp_path):
    directory = RunDirectory(tmp_path)
    progress = progress_of(directory, eval_steps=1)
    progress.start()
    values = {0: 0.9, 1: 0.3, 2: float("nan"), 3: 0.2, 4: 0.5}
    found = {
        step: progress.log_evaluation(step, {"teacher_forced_giou": v})
        for step, v in values.items()
    }
    assert found == {0: False, 1: True, 2: False, 3: False, 4: True}
    progress.commit_best()
    progress.partial_state(4).mkdir()
    progress.commit(4)
    assert progress_of(directory, eval_steps=1).best == {"step": 4, "value": 0.5}
    assert not progress_of(directory).log_evaluation(5, {"teacher_forced_giou": 1.0})


@pytest.mark.parametrize("passed", [True, False])
def test_all_passed_needs_every_threshold(passed):
    thresholds = {"giou": {"required": 0.5, "value": 0.6, "passed": True}}
    last = {"giou": {"required": 0.5, "value": 0.4, "passed": passed}}
    results = {"one": {"thresholds": thresholds}, "two": {"thresholds": last}}
    assert all_passed(results) == passed
