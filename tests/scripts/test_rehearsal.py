"""The rehearsal of the paper's path: its commands, its comparison, and a small one."""

import dataclasses
import json

import pytest

from coprs_deploy.cli.main import build_parser
from coprs_deploy.training.recipe import load_recipe
from tests.scripts import load_script

rehearsal = load_script("training/rehearsal.py")

SMALL = rehearsal.Sizes(
    num_training=40,
    num_excluded=4,
    num_start=32,
    num_held_out=8,
    supervised_steps=6,
    supervised_batch=4,
    supervised_interval=2,
    grpo_steps=4,
    num_prompts=1,
    late_from_step=2,
    grpo_interval=2,
)


def test_every_command_is_accepted():
    for step in (*rehearsal.path_steps(SMALL), rehearsal.SERVER):
        build_parser().parse_args(step.arguments)


def test_every_part_is_killed_once():
    steps = (*rehearsal.path_steps(SMALL), rehearsal.SERVER)
    parts = [step.part for step in steps if step.moment]
    assert parts == list(dict.fromkeys(step.part for step in steps))
    assert all(step.outputs for step in steps if step.moment)


def test_recipes_differ_from_the_papers_in_size_and_rate_only(tmp_path):
    rehearsal.write_sources(tmp_path, SMALL)
    grpo, paper = (load_recipe(str(x)) for x in (tmp_path / "grpo.toml", "grpo_7b"))
    kept = ("mode", "beta", "num_generations", "segmentation_loss_weight", "reward_weights")
    for key in (*kept, "loss_weights", "late_loss_weights", "response_format", "epsilon"):
        assert getattr(grpo.stages["grpo"], key) == getattr(paper.stages["grpo"], key), key
    assert grpo.num_processes == load_recipe(str(tmp_path / "supervised.toml")).num_processes == 2


def test_hashes_of_a_log_leave_out_times_only(tmp_path):
    def log(**line):
        (tmp_path / "log.jsonl").write_text(json.dumps({"step": 1, "seconds": 2.5} | line) + "\n")
        return rehearsal.hashes(tmp_path, tmp_path)

    (tmp_path / ".lock").touch()
    (tmp_path / "weights").write_bytes(b"1")
    first = log()
    assert first.keys() == {"log.jsonl", "weights"}
    assert log(seconds=9) == first
    assert log(loss=0.5)["log.jsonl"] != first["log.jsonl"]


def test_hashes_of_tensors_do_not_depend_on_the_order_of_their_metadata(tmp_path):
    def file(header, data=b"1234"):
        text = json.dumps(header).encode()
        (tmp_path / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
        return rehearsal.hashes(tmp_path, tmp_path)

    first = file({"a": 1, "b": 2})
    assert file({"b": 2, "a": 1}) == first
    assert file({"b": 2, "a": 1}, b"1235") != first
    assert file({"b": 1, "a": 2}) != first


def test_compare_names_the_files_that_differ_after_a_kill():
    step = rehearsal.path_steps(SMALL)[0]
    whole, equal = (rehearsal.Outcome(step, content={"a": "1", "b": "2"}) for _ in range(2))
    other = rehearsal.Outcome(step, content={"a": "1", "b": "3", "c": "4"})
    nothing = rehearsal.Outcome(step)
    rehearsal.compare([whole] * 3, [equal, other, nothing])
    assert not equal.violations
    assert other.violations[0].endswith("writes something else after a kill: b, c")
    assert "nothing to compare" in nothing.violations[-1]


@pytest.mark.slow
def test_walk_with_kills_runs_a_killed_command_again(tmp_path):
    step = rehearsal.path_steps(SMALL)[0]
    outcomes = []
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        outcomes.append(rehearsal.Walk(tmp_path / name, name == "killed").run(step))
    whole, killed = outcomes
    rehearsal.compare([whole], [killed])
    assert whole.killed_after is None
    assert killed.killed_after > 0
    assert len(killed.content) > SMALL.num_training
    assert not killed.violations
    assert not rehearsal.leftovers(tmp_path / "whole", tmp_path / "killed")
    never = dataclasses.replace(step, moment="never", outputs=(), command="train --list")
    late = rehearsal.Walk(tmp_path / "killed", kills=True).run(never)
    assert late.violations == ["`train --list` ended before it could be killed"]


@pytest.mark.slow
@pytest.mark.extended
def test_rehearsal_survives_a_kill_in_each_part(tmp_path, capsys):
    code = rehearsal.rehearse(tmp_path / "work", tmp_path / "report", SMALL)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (code, result["violations"]) == (0, [])
    text = (tmp_path / "report" / "report.md").read_text()
    for name in rehearsal.CAPTIONS:
        assert (tmp_path / "report" / name).stat().st_size > 1000
        assert f"({name})" in text
