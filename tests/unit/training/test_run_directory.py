"""Run directory: locking, resuming and the log."""

import pytest

from coprs_deploy.errors import ArtifactError
from coprs_deploy.training.recipe import load_recipe
from coprs_deploy.training.run_directory import RunDirectory, all_passed


def test_open_with_other_settings_raises(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    assert not directory.open(load_recipe("supervised_7b"))
    assert directory.open(load_recipe("supervised_7b"))
    changed = load_recipe("supervised_7b", ["stages.supervised.max_steps=9"])
    with pytest.raises(ValueError, match=r"stages\.supervised\.max_steps"):
        directory.open(changed)


def test_open_with_other_free_keys_resumes(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    directory.open(load_recipe("supervised_7b"))
    free = ["num_threads=3", "num_workers=1", "save_steps=7", "logging_steps=2", "description=x"]
    assert directory.open(load_recipe("supervised_7b", free))


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
    directory.rewind_log("two", 2)
    kept = [(line["stage"], line["step"]) for line in directory.read_log()]
    assert kept == [("one", 1), ("one", 2), ("two", 1), ("two", 2)]


def test_commit_state_replaces_older_states(tmp_path):
    directory = RunDirectory(tmp_path)
    for step in (2, 4):
        partial = directory.stage("one") / f".state-{step}"
        partial.mkdir(parents=True)
        directory.commit_state("one", partial, {"step": step})
    path, progress = directory.latest_state("one")
    assert progress == {"step": 4}
    assert list(directory.stage("one").iterdir()) == [path]


@pytest.mark.parametrize("passed", [True, False])
def test_all_passed_needs_every_threshold(passed):
    thresholds = {"giou": {"required": 0.5, "value": 0.6, "passed": True}}
    last = {"giou": {"required": 0.5, "value": 0.4, "passed": passed}}
    results = {"one": {"thresholds": thresholds}, "two": {"thresholds": last}}
    assert all_passed(results) == passed
