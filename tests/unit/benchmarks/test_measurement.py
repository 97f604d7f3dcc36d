"""Cases in processes of their own: turns, peaks, and failures that become reasons."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from coprs_deploy.benchmarks.case import Case, Group
from coprs_deploy.benchmarks.measurement import Measurement, Settings
from coprs_deploy.benchmarks.process import Worker, WorkerError
from coprs_deploy.benchmarks.report import Accuracy

TARGET = "coprs_deploy.benchmarks.suites.start:open_command"
QUICK = Settings(seconds=0.2, rounds=2, most_rounds=2, warm_up_seconds=0.1, limit_seconds=300)


def case(name, code="pass", **changes):
    return Case(name, TARGET, {"code": code}, {"device": "cpu"}, **changes)


def measure(*cases, settings=QUICK, **changes):
    group = Group("start", "group", cases, cases[0].name, **changes)
    return Measurement(settings, {}).measure(group)


@pytest.mark.parametrize(
    ("labels", "products"),
    [
        ({}, "fp32"),
        ({"precision": "bf16"}, "bf16"),
        ({"precision": "fp32", "products": "bf16"}, "bf16"),
        ({"precision": "int8", "products": "bf16"}, "int8"),
    ],
)
def test_a_case_says_what_most_of_its_products_are_computed_in(labels, products):
    assert Case("a", labels=labels).products == products


def test_rows_take_turns_and_are_compared():
    result = measure(case("base"), case("slow", "import time; time.sleep(0.2)"))
    base, slow = result.rows
    assert result.method == "rows take turns, side by side"
    assert len(base.latency.round_medians) == len(slow.latency.round_medians) == 2
    assert slow.ratio.baseline == "base"
    assert 0 < slow.ratio.low <= slow.ratio.value <= slow.ratio.high
    assert slow.latency.minimum > 200
    assert base.ratio is None
    assert base.memory.host > 1_000_000


def test_rows_that_do_not_fit_side_by_side_are_started_anew():
    small = Settings(0.1, rounds=2, warm_up_seconds=0.1, limit_seconds=300, memory_bytes=1)
    result = measure(case("a"), case("b"), settings=small)
    assert result.method == "rows take turns, each started anew"
    assert [len(row.latency.round_medians) for row in result.rows] == [2, 2]


def test_what_is_never_timed_is_still_judged_when_it_is_started_anew():
    small = Settings(rounds=2, limit_seconds=300, memory_bytes=1)
    judged = []

    def judge(outputs):
        judged.extend(outputs)
        return {name: Accuracy(inputs=1) for name in outputs}

    result = measure(case("a"), case("b"), settings=small, runs=0, judge=judge)
    assert judged == ["a", "b"]
    assert [row.accuracy.inputs for row in result.rows] == [1, 1]
    assert [row.latency for row in result.rows] == [None, None]


def test_a_case_that_fails_is_a_row_with_its_reason():
    result = measure(
        case("good"),
        case("broken", "raise SystemExit('no such thing')"),
        case("prepared badly", problem="it could not be exported"),
        Case("unknown", "coprs_deploy.benchmarks.suites.start:nothing"),
    )
    assert result.rows[0].latency is not None
    assert result.rows[1].reason == "RuntimeError: no such thing"
    assert result.rows[2].reason == "it could not be exported"
    assert result.rows[3].reason.startswith("AttributeError")


def test_a_group_of_nothing_but_reasons_is_still_a_group():
    result = measure(case("a", problem="not installed"), case("b", problem="not installed"))
    assert [row.reason for row in result.rows] == ["not installed"] * 2


def test_a_run_that_takes_too_long_is_stopped():
    impatient = Settings(seconds=0.1, rounds=1, limit_seconds=1.5)
    result = measure(case("asleep", "import time; time.sleep(60)"), settings=impatient)
    assert "longer than the limit" in result.rows[0].reason


def test_a_process_that_dies_says_how():
    with Worker() as worker, pytest.raises(WorkerError, match="exit code 7"):
        worker.call("os:_exit", 300, status=7)


def test_a_worker_ends_with_its_parent_even_when_it_is_stopped():
    code = (
        "from coprs_deploy.benchmarks.process import Worker; import os; w = Worker();"
        "pid = w.call('os:getpid', 300); w.pause(); print(pid, flush=True); os._exit(0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    end = time.monotonic() + 20
    while Path(f"/proc/{done.stdout.strip()}").exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert not Path(f"/proc/{done.stdout.strip()}").exists()


def test_what_libraries_print_does_not_disturb_the_answers():
    with Worker() as worker:
        worker.call("builtins:print", 300, end="noise", sep="")
        assert worker.call("json:loads", 300, s="[5]") == [5]


def test_groups_with_a_number_of_runs_have_no_warm_up():
    result = measure(case("cold"), runs=4)
    assert result.rows[0].latency.n == 6  # three rounds of two
    assert "first_run_ms" not in result.rows[0].figures


def test_a_judge_that_fails_is_a_note_and_no_crash():
    def judge(outputs):
        raise WorkerError("no reference")

    result = measure(case("a"), judge=judge)
    assert result.rows[0].accuracy.note == "could not be judged: no reference"
    told = measure(case("a"), judge=lambda outputs: {"a": Accuracy(inputs=3, mask_iou=0.5)})
    assert told.rows[0].accuracy.mask_iou == 0.5
