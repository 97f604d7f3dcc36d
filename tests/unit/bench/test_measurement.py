"""Cases in worker processes: interleaved rounds, peak memory, errors."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from coprs_deploy.bench.case import BenchOptions, Case, Group
from coprs_deploy.bench.run import measure_group
from coprs_deploy.bench.worker import Worker, WorkerError

TARGET = "coprs_deploy.bench.worker:FunctionWorkload"
RUN = "coprs_deploy.bench.request_suites:run_code"
QUICK = BenchOptions(min_time_s=0.2, rounds=2, max_rounds=2, warmup_s=0.1, case_timeout_s=300)
SMALL = BenchOptions(min_time_s=0.1, rounds=2, warmup_s=0.1, case_timeout_s=300, max_memory_bytes=1)


def case(name, code="pass", **changes):
    return Case(name, TARGET, {"function": RUN, "code": code}, {"device": "cpu"}, **changes)


def measure(*cases, options=QUICK, **changes):
    return measure_group(Group("group", cases, cases[0].name, **changes), options, print)


def test_measure_side_by_side_compares_rounds_with_the_baseline():
    result = measure(case("base"), case("slow", "import time; time.sleep(0.2)"))
    base, slow = result.cases
    assert result.method == "interleaved rounds, side by side"
    assert result.baseline == "base"
    assert len(base.latency.round_medians) == len(slow.latency.round_medians) == 2
    assert 0 < slow.ratio.low <= slow.ratio.value <= slow.ratio.high
    assert base.ratio is None
    assert base.memory.host > 1_000_000


def test_measure_without_memory_opens_each_case_again():
    result = measure(case("a"), case("b"), options=SMALL)
    assert result.method == "interleaved rounds, each case opened again"
    assert [len(found.latency.round_medians) for found in result.cases] == [2, 2]


@pytest.mark.parametrize("options", [QUICK, SMALL])
def test_measure_without_runs_measures_accuracy_only(options, tmp_path):
    script = tmp_path / "workloads.py"
    script.write_text(
        "from coprs_deploy.bench.case import Workload\n"
        "from coprs_deploy.bench.report import Accuracy\n"
        "class Finished(Workload):\n"
        "    def run(self):\n"
        "        raise AssertionError('it has no runs')\n"
        "    def finish(self):\n"
        "        return {'accuracy': Accuracy(inputs=3)}\n"
    )
    cases = [Case(name, f"{script}:Finished") for name in "ab"]
    result = measure(*cases, options=options, runs=0)
    assert [found.error for found in result.cases] == ["", ""]
    assert [found.accuracy.inputs for found in result.cases] == [3, 3]
    assert [found.latency for found in result.cases] == [None, None]


def test_measure_failed_cases_are_reported_with_their_error():
    result = measure(
        case("good"),
        case("broken", "raise SystemExit('no such thing')"),
        case("not prepared", error="export failed"),
        Case("unknown", "coprs_deploy.bench.request_suites:nothing"),
    )
    assert result.cases[0].latency is not None
    assert result.cases[1].error == "RuntimeError: no such thing"
    assert result.cases[2].error == "export failed"
    assert result.cases[3].error.startswith("AttributeError")


def test_measure_group_of_errors_only_is_still_a_group():
    result = measure(case("a", error="not installed"), case("b", error="not installed"))
    assert [found.error for found in result.cases] == ["not installed"] * 2


def test_measure_run_beyond_the_timeout_is_stopped():
    impatient = BenchOptions(min_time_s=0.1, rounds=1, case_timeout_s=1.5)
    result = measure(case("asleep", "import time; time.sleep(60)"), options=impatient)
    assert "longer than the timeout" in result.cases[0].error


def test_worker_that_exits_reports_its_exit_code():
    with Worker() as worker, pytest.raises(WorkerError, match="exit code 7"):
        worker.call("os:_exit", 300, status=7)


def test_worker_stopped_ends_with_its_parent():
    code = (
        "from coprs_deploy.bench.worker import Worker; import os; w = Worker();"
        "pid = w.call('os:getpid', 300); w.pause(); print(pid, flush=True); os._exit(0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    end = time.monotonic() + 20
    while Path(f"/proc/{done.stdout.strip()}").exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert not Path(f"/proc/{done.stdout.strip()}").exists()


def test_worker_responses_are_apart_from_printed_text():
    with Worker() as worker:
        worker.call("builtins:print", 300, end="noise", sep="")
        assert worker.call("json:loads", 300, s="[5]") == [5]


def test_measure_counted_runs_have_no_warm_up():
    result = measure(case("cold"), runs=4)
    assert result.cases[0].latency.n == 4  # two rounds of two
    assert "first_run_ms" not in result.cases[0].metrics


def test_worker_loads_a_case_of_a_script_by_path(tmp_path):
    script = tmp_path / "a_script.py"
    script.write_text("def twice(value):\n    return 2 * value\n")
    with Worker() as worker:
        assert worker.call(f"{script}:twice", 300, value=4) == 8
