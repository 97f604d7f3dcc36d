"""The script that measures and kills batch runs, in its short form."""

import json

import pytest

from tests.scripts import load_script


@pytest.mark.extended
def test_kills_lose_and_double_no_row(capsys):
    script = load_script("benchmarks/batch_runs.py")
    assert script.main(["kills", "--kills", "3", "--workers", "2"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["kills"], found["violations"], found["rows"]) == (3, [], 17)


def test_check_reports_lost_and_changed_rows(tmp_path):
    script = load_script("benchmarks/batch_runs.py")
    rows = [script.OutputRow(row=n, id=str(n), image="a", instruction="b") for n in range(3)]
    (tmp_path / ".left").touch()
    script.results = lambda out: [rows[0], rows[2]]
    lost, changed, left = script.check(tmp_path, rows)
    assert "rows [0, 2]" in lost
    assert "rows [2] differ" in changed
    assert ".left" in left


@pytest.mark.extended
def test_speed_and_memory_are_measured(capsys):
    script = load_script("benchmarks/batch_runs.py")
    assert script.main(["speed", "--images", "8", "--rounds", "1"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert all(rate > 0 for rate in found["rows_per_second"].values())
    assert script.main(["memory", "--rows", "64"]) == 0
