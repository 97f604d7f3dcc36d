"""Runs that are killed at random moments and resumed: every row once, equal to a whole run."""

import json
import multiprocessing
import random
import time

import msgspec
import pytest

from coprs_deploy.batch.rows import read_part
from tests.unit.batch.killed_run import main

NUM_ROWS = 42


def rows_of(out):
    found = [row for path in sorted(out.glob("part-*.parquet")) for row in read_part(path)]
    return [msgspec.structs.replace(row, timings={}) for row in found]


def kill_until_complete(context, table, out, duration, moments, num_kills):
    """Kill runs at random moments; return how many were killed before one ended by itself."""
    for killed in range(num_kills):
        process = context.Process(target=main, args=(str(table), str(out)))
        process.start()
        process.join(moments.uniform(0, duration))
        if process.exitcode is not None:
            assert process.exitcode == 0
            return killed
        process.kill()
        process.join()
    return num_kills


def run_to_the_end(context, table, out):
    start = time.monotonic()
    process = context.Process(target=main, args=(str(table), str(out)))
    process.start()
    process.join()
    assert process.exitcode == 0
    return time.monotonic() - start


@pytest.mark.extended
@pytest.mark.parametrize("num_kills", [5, 50])
def test_killed_and_resumed_runs_equal_a_whole_run(images, tmp_path, num_kills):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.unit.batch.killed_run", "pyarrow.parquet"])
    table = tmp_path / "rows.jsonl"
    names = ["a.png", "missing.png", "c.png"]
    lines = [
        {"image": f"images/{names[n % 3]}", "instruction": f"ask {n}"} for n in range(NUM_ROWS)
    ]
    table.write_text("\n".join(map(json.dumps, lines)))
    run_to_the_end(context, table, tmp_path / "warm-up")
    duration = run_to_the_end(context, table, tmp_path / "whole")
    expected = rows_of(tmp_path / "whole")
    assert [row.row for row in expected] == list(range(NUM_ROWS))
    moments, left = random.Random(num_kills), num_kills
    for number in range(num_kills):
        out = tmp_path / f"run-{number}"
        left -= kill_until_complete(context, table, out, duration, moments, min(left, 5))
        run_to_the_end(context, table, out)
        assert rows_of(out) == expected
        assert {path.name for path in out.glob(".*")} == {".lock"}
        masks = {name for row in expected for name in row.mask_files}
        assert {path.name for path in (out / "masks").iterdir()} == masks
        if not left:
            break
    print(f"{num_kills - left} kills of runs of {duration:.2f} s in {number + 1} folders")
