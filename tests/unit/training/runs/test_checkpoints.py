"""Checkpoints of a running run: links, what is kept, and readers meanwhile."""

import copy
import json
import pickle
import shutil

import pytest

from coprs_deploy.checkpoint import (
    load_segmentation_model,
    read_checkpoint,
    without_readers,
)
from coprs_deploy.training.runs.checkpoints import BEST, LAST, RunCheckpoints


def write(path):
    path.mkdir()
    (path / "name").write_text(path.name)


@pytest.fixture
def checkpoints(tmp_path):
    return RunCheckpoints(tmp_path, ["one", "two"], 2)


def folders(checkpoints):
    return sorted(p.name for p in checkpoints.path.iterdir() if not p.is_symlink())


def test_add_keeps_the_newest_and_the_best(checkpoints):
    checkpoints.add("one", 2, BEST, write)
    for stage, step in (("one", 4), ("one", 6), ("two", 2)):
        checkpoints.add(stage, step, LAST, write)
    assert folders(checkpoints) == ["one-000002", "one-000006", "two-000002"]
    assert checkpoints.target(LAST).name == "two-000002"
    assert checkpoints.target(BEST).name == "one-000002"
    assert (checkpoints.path / "last" / "name").is_file()


def test_add_of_one_step_for_both_links_writes_once(checkpoints):
    written = []

    def count(path):
        written.append(path)
        write(path)

    checkpoints.add("one", 2, BEST, count)
    checkpoints.add("one", 2, LAST, count)
    assert len(written) == 1
    assert checkpoints.target(LAST) == checkpoints.target(BEST)


def test_add_after_a_resume_replaces_what_came_later(tmp_path, checkpoints):
    for step in (2, 4, 6):
        checkpoints.add("one", step, LAST, write)
    resumed = RunCheckpoints(tmp_path, ["one", "two"], 2)

    def write_other(path):
        path.mkdir()
        (path / "name").write_text("other")

    resumed.add("one", 4, LAST, write_other)
    assert folders(resumed) == ["one-000004"]
    assert (resumed.path / "last" / "name").read_text() == "other"


def test_add_that_fails_keeps_the_links_and_leaves_no_part(checkpoints):
    checkpoints.add("one", 2, LAST, write)

    def fail(path):
        write(path)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        checkpoints.add("one", 4, LAST, fail)
    assert checkpoints.target(LAST).name == "one-000002"
    assert not [name for name in folders(checkpoints) if not name.startswith(".") and "4" in name]
    checkpoints.add("one", 4, LAST, write)
    assert folders(checkpoints) == ["one-000002", "one-000004"]


def test_end_with_lets_last_point_to_the_finished_checkpoint(tmp_path, checkpoints):
    checkpoints.add("one", 2, LAST, write)
    write(tmp_path / "checkpoint")
    checkpoints.end_with(tmp_path / "checkpoint")
    assert (checkpoints.path / "last" / "name").read_text() == "checkpoint"


@pytest.fixture
def write_model(tiny_checkpoint):
    """Write a checkpoint whose provenance is its name."""

    def write(path):
        shutil.copytree(tiny_checkpoint, path)
        config = json.loads((path / "config.json").read_text())
        config["provenance"] = {"step": path.name}
        (path / "config.json").write_text(json.dumps(config))

    return write


def test_checkpoint_is_kept_as_long_as_a_program_works_with_it(checkpoints, write_model):
    """Longer than ``save_total_limit`` would, and not any longer."""
    checkpoints.add("one", 1, LAST, write_model)
    opened = read_checkpoint(checkpoints.path / "last")
    again = copy.copy(opened)
    before = opened.fingerprint()
    del opened
    for step in range(2, 7):
        checkpoints.add("one", step, LAST, write_model)
    assert again.fingerprint() == before
    load_segmentation_model(again)
    assert len(list(checkpoints.path.glob("one-*"))) == 3
    assert pickle.loads(pickle.dumps(again)).lock is None
    del again
    checkpoints.add("one", 7, LAST, write_model)
    names = sorted(path.name for path in checkpoints.path.glob("one-*"))
    assert names == ["one-000006", "one-000007"]


def test_read_checkpoint_of_a_link_follows_it_while_its_target_is_removed(
    checkpoints, write_model, monkeypatch
):
    checkpoints.add("one", 1, LAST, write_model)
    checkpoints.add("one", 2, BEST, write_model)
    link = checkpoints.path / "last"
    with without_readers(link.resolve()) as is_free:
        assert is_free

        def point(seconds):
            link.unlink()
            link.symlink_to("one-000002")

        monkeypatch.setattr("time.sleep", point)
        assert read_checkpoint(link).path.name == "one-000002"


def test_reader_of_a_link_keeps_its_checkpoint_while_a_newer_one_is_written(
    checkpoints, write_model
):
    checkpoints.add("one", 1, LAST, write_model)
    opened = read_checkpoint(checkpoints.path / "last")
    before = opened.fingerprint()
    checkpoints.add("one", 2, LAST, write_model)
    assert opened.fingerprint() == before
    load_segmentation_model(opened)
    assert read_checkpoint(checkpoints.path / "last").fingerprint() != before
