"""Run directory: locking, resuming and the log."""

import json
import re
import shlex

import pytest
from accelerate import Accelerator

from coprs_deploy.errors import ArtifactError
from coprs_deploy.training.recipe import Recipe, load_recipe
from coprs_deploy.training.runs.progress import StageProgress, clear_finished
from coprs_deploy.training.runs.run import resolve_precision
from coprs_deploy.training.runs.run_directory import RunDirectory, all_passed, rewind_lines
from coprs_deploy.training.settings import CheckpointModel, SupervisedSettings, SyntheticData


def with_progress(directory):
    """Give a run directory a state."""
    (directory.stage("supervised") / "state-000001").mkdir(parents=True)
    return directory


def test_open_with_other_settings_raises(tmp_path):
    directory = with_progress(RunDirectory(tmp_path / "run"))
    directory.open(load_recipe("supervised_7b"))
    assert directory.open(load_recipe("supervised_7b")) == []
    changed = load_recipe("supervised_7b", ["stages.supervised.global_batch_size=9"])
    with pytest.raises(ValueError, match=r"stages\.supervised\.global_batch_size"):
        directory.open(changed)


def test_open_with_other_settings_before_the_first_state_starts_again(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    directory.open(load_recipe("supervised_7b"))
    changed = load_recipe("supervised_7b", ["seed=9"])
    directory.open(changed)
    with_progress(directory)
    assert directory.open(changed) == []
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
                "stages.grpo.per_device_train_batch_size=1",
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
    assert directory.open(resolve_precision(load_recipe("supervised_7b", [setting]))) == []


def test_open_with_other_settings_names_the_settings_that_resume(tmp_path):
    directory = with_progress(RunDirectory(tmp_path / "run"))
    directory.open(load_recipe("grpo_demo"))
    changes = ["stages.grpo.optimizer.betas=[0.5,0.9]", "data.preset=full", "seed=7"]
    with pytest.raises(ValueError, match=r"add --set data\.preset=plain") as caught:
        directory.open(load_recipe("grpo_demo", changes))
    words = shlex.split(str(caught.value).partition("add ")[2].partition(";")[0])
    assert directory.open(load_recipe("grpo_demo", [*changes, *words[1::2]])) == []


def test_open_with_another_number_of_targets_raises(tmp_path):
    """Of more <REF_POS> the last ones count, so that it changes rewards."""
    directory = with_progress(RunDirectory(tmp_path / "run"))
    directory.open(load_recipe("grpo_demo"))
    changed = load_recipe("grpo_demo", ["stages.grpo.max_targets=2"])
    with pytest.raises(ValueError, match=r"add --allow-change stages\.grpo\.max_targets"):
        directory.open(changed)
    assert directory.open(changed, ["stages.grpo.max_targets"])


@pytest.mark.parametrize("setting", ["seed=5", "stages.grpo.beta=0.1", "data.kind=synthetic"])
def test_open_with_another_training_raises(tmp_path, setting):
    directory = with_progress(RunDirectory(tmp_path / "run"))
    directory.open(load_recipe("grpo_demo"))
    with pytest.raises(ValueError, match="other settings"):
        directory.open(load_recipe("grpo_demo", [setting, "model.freeze_vision_tower=true"]))


def rows_of(*texts):
    return [tuple(text.split("=")) for text in texts]


def check_inputs(directory, rows, allowed=(), model="a"):
    inputs = {"model.path": model, "data.training": {"examples": len(rows), "hash": str(rows)}}
    return directory.check_inputs(inputs, {"data.training": rows}, ["supervised"], allowed)


def test_check_inputs_counts_and_names_the_rows_that_differ(tmp_path):
    directory = with_progress(RunDirectory(tmp_path))
    rows = rows_of("a=1", "b=2", "c=3", "c=4")
    assert check_inputs(directory, rows) == []
    assert check_inputs(directory, rows) == []
    for now, text in (
        (rows[:2], r"2 rows removed \(c, c\)"),
        ([*rows, ("d", "5")], r"1 row added \(d\)"),
        (
            rows_of("a=1", "b=9", "c=3", "d=4"),
            r"1 row removed.*1 row added.*1 row changed \(b\)",
        ),
        (rows[::-1], r"changed"),
        (rows_of("b=2", "a=1", "c=3", "c=4"), "the same 4 rows in another order"),
    ):
        with pytest.raises(ValueError, match=r"contents of data\.training: .*" + text) as caught:
            check_inputs(directory, now)
        assert "--allow-change data.training" in str(caught.value)
    with pytest.raises(ValueError, match=r"model\.path: was a, now b"):
        check_inputs(directory, rows, model="b")
    assert check_inputs(directory, rows) == []


def test_check_inputs_with_an_allowed_change_logs_it_once(tmp_path):
    directory = with_progress(RunDirectory(tmp_path))
    rows = rows_of("a=1", "b=2")
    check_inputs(directory, rows)
    (note,) = check_inputs(directory, rows[:1], ["data.training"])
    assert "data.training 1 row removed (b)" in note
    assert check_inputs(directory, rows[:1]) == []
    (line,) = directory.read_log()
    assert (line["stage"], line["step"]) == ("supervised", 1)
    assert line["changed"] == {"data.training": "1 row removed (b)"}


def test_check_inputs_before_the_first_state_takes_the_new_ones(tmp_path):
    directory = RunDirectory(tmp_path)
    rows = rows_of("a=1")
    check_inputs(directory, rows)
    check_inputs(directory, rows, model="b")
    with_progress(directory)
    with pytest.raises(ValueError, match=r"model\.path"):
        check_inputs(directory, rows)


def resume(directory, recipe, *settings, allowed=()):
    return directory.open(load_recipe(recipe, settings), allowed)


def test_open_with_an_allowed_change_logs_it_and_resumes(tmp_path):
    directory = with_progress(RunDirectory(tmp_path))
    resume(directory, "supervised_7b")
    changes = ("stages.supervised.optimizer.learning_rate=1e-5", "seed=3")
    with pytest.raises(ValueError, match=r"add --allow-change seed --allow-change stages"):
        resume(directory, "supervised_7b", *changes)
    with pytest.raises(ValueError, match=r"other settings: seed"):
        resume(directory, "supervised_7b", *changes, allowed=["stages.supervised.optimizer"])
    notes = resume(directory, "supervised_7b", *changes, allowed=["stages.supervised", "seed"])
    assert "changed: seed was 0, is 3" in notes
    assert resume(directory, "supervised_7b", *changes) == []
    (line,) = directory.read_log()
    assert line["changed"]["seed"] == [0, 3]
    assert line["changed"]["stages.supervised.optimizer.learning_rate"] == [1.6e-6, 1e-5]


def test_open_with_an_unknown_allowed_key_names_the_nearest(tmp_path):
    directory = with_progress(RunDirectory(tmp_path))
    resume(directory, "supervised_7b")
    with pytest.raises(ValueError, match=r"did you mean stages\.supervised\.optimizer\.learning"):
        resume(directory, "supervised_7b", allowed=["stages.supervised.optimizer.lr"])


@pytest.mark.parametrize(
    "setting",
    [
        "model.freeze_vision_tower=true",
        "stages.supervised.train_image_encoder=true",
        "stages.supervised.segmentation_loss_weight=0",
        "stages.supervised.optimizer.name=muon",
        "stages.supervised.optimizer.lr_multipliers.prior=2.0",
    ],
)
def test_open_with_other_weights_in_a_state_cannot_be_allowed(tmp_path, setting):
    directory = with_progress(RunDirectory(tmp_path))
    resume(directory, "supervised_7b")
    with pytest.raises(ValueError, match="a state holds other weights with another"):
        resume(directory, "supervised_7b", setting, allowed=["model", "stages"])
    smaller = "stages.supervised.segmentation_loss_weight=0.1"
    resume(directory, "supervised_7b", smaller, allowed=["stages"])


def test_open_with_other_processes_is_free_where_nothing_is_sampled(tmp_path):
    supervised = with_progress(RunDirectory(tmp_path / "supervised"))
    resume(supervised, "supervised_7b")
    assert resume(supervised, "supervised_7b", "num_processes=2")
    grpo = with_progress(RunDirectory(tmp_path / "grpo"))
    resume(grpo, "grpo_7b")
    with pytest.raises(ValueError, match="--allow-change num_processes"):
        resume(grpo, "grpo_7b", "num_processes=2")


def test_open_with_more_steps_tells_what_the_learning_rate_does(tmp_path):
    directory = RunDirectory(tmp_path)
    (directory.stage("supervised") / "state-002500").mkdir(parents=True)
    resume(directory, "supervised_7b")
    more = "stages.supervised.max_steps=10000"
    changed, note = resume(directory, "supervised_7b", more)
    assert "max_steps was 5000, is 10000" in changed
    assert "from step 2500 on it is 0.875 of its peak instead of 0.575" in note
    assert "not that of one run of 10000" in note
    constant = with_progress(RunDirectory(tmp_path / "constant"))
    schedule = "stages.supervised.optimizer.lr_decay_ratio=0.1"
    resume(constant, "supervised_7b", schedule)
    _, note = resume(constant, "supervised_7b", schedule, more)
    assert "the 1 steps so far had the learning rates of the new schedule" in note


def test_open_with_other_code_resumes_and_logs_it(tmp_path):
    directory = with_progress(RunDirectory(tmp_path))
    resume(directory, "supervised_7b")
    file = directory.path / "environment.json"
    before = json.loads(file.read_text())
    file.write_text(json.dumps(before | {"commit": "other"}))
    (note,) = resume(directory, "supervised_7b")
    assert note.startswith("changed: environment.commit was other, is ")
    assert json.loads(file.read_text()) == before


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


def test_rewind_lines_of_texts_that_hold_other_line_separators(tmp_path):
    file = tmp_path / "completions.jsonl"
    lines = [{"step": step, "response": "a\u2028b\x85c é"} for step in (1, 2)]
    whole = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
    file.write_bytes(whole + b'{"step": 2, "response": "\xc3')  # a kill cuts bytes
    rewind_lines(file, lambda line: line["step"] <= 1)
    assert [json.loads(line) for line in file.read_bytes().splitlines()] == lines[:1]


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
