"""Processes of a run: signals to the launcher and its end reach all of them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from coprs_deploy.training.runs import processes
from coprs_deploy.training.runs.processes import StopRequest, run_processes

WORKER = """
import os, signal, sys, time
from pathlib import Path
from coprs_deploy.training.runs.processes import end_with_launcher
end_with_launcher()
folder, rank = Path(sys.argv[1]), os.environ["RANK"]
def stop(number, frame):
    (folder / f"stopped-{rank}").write_text(str(number))
    sys.exit(128 + number)
if "deaf" not in sys.argv:
    signal.signal(signal.SIGTERM, stop)
else:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
(folder / f"pid-{rank}").write_text(str(os.getpid()))
if sys.argv[2] == rank:
    while not (folder / "pid-0").is_file():
        time.sleep(0.02)
    sys.exit(7)
while True:
    time.sleep(0.02)
"""

LAUNCHER = """
import sys
from coprs_deploy.training.runs.processes import run_processes
sys.exit(run_processes([sys.executable, *sys.argv[1:]], 2, 1))
"""


def wait_for(condition, what):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.fixture
def launched(tmp_path):
    """A launcher of two workers that run until they are told to stop, and their ids."""
    (tmp_path / "worker.py").write_text(WORKER)
    command = [sys.executable, "-c", LAUNCHER, str(tmp_path / "worker.py"), str(tmp_path), "-"]
    launcher = subprocess.Popen(command)
    files = [tmp_path / f"pid-{rank}" for rank in range(2)]
    wait_for(lambda: all(file.is_file() and file.read_text() for file in files), "no start")
    pids = [int(file.read_text()) for file in files]
    yield launcher, pids
    for pid in pids:
        if is_alive(pid):
            os.kill(pid, signal.SIGKILL)
    launcher.kill()
    launcher.wait()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_signal_to_the_launcher_stops_every_process(launched, tmp_path, name):
    launcher, pids = launched
    number = getattr(signal, name)
    launcher.send_signal(number)
    code = launcher.wait(timeout=30)
    assert code in (128 + number, -number, 1 if name == "SIGINT" else None)
    assert not any(map(is_alive, pids))
    assert all((tmp_path / f"stopped-{rank}").is_file() for rank in range(2))


def test_kill_of_the_launcher_ends_every_process(launched, tmp_path):
    launcher, pids = launched
    launcher.kill()
    launcher.wait()
    wait_for(lambda: not any(map(is_alive, pids)), "processes survived their launcher")
    assert all((tmp_path / f"stopped-{rank}").read_text() == "15" for rank in range(2))


@pytest.mark.parametrize("kind", ["polite", "deaf"])
def test_failure_of_one_process_ends_the_others(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(processes, "GRACE_SECONDS", 0.5)
    (tmp_path / "worker.py").write_text(WORKER)
    command = [sys.executable, str(tmp_path / "worker.py"), str(tmp_path), "1", kind]
    assert run_processes(command, 2, 1) == 7
    assert not is_alive(int((tmp_path / "pid-0").read_text()))


def test_stop_request_while_steps_run_waits_once():
    stop = StopRequest()
    with stop.handled(), stop.while_steps_run():
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.number == signal.SIGTERM
        with pytest.raises(SystemExit) as ended:
            os.kill(os.getpid(), signal.SIGTERM)
    assert ended.value.code == 143


@pytest.mark.parametrize(
    ("number", "expected"), [(signal.SIGHUP, SystemExit), (signal.SIGINT, KeyboardInterrupt)]
)
def test_stop_request_outside_of_steps_ends_at_once(number, expected):
    with StopRequest().handled(), pytest.raises(expected):
        os.kill(os.getpid(), number)
        time.sleep(1)


@pytest.mark.parametrize(
    ("number", "expected"), [(signal.SIGHUP, SystemExit), (signal.SIGINT, KeyboardInterrupt)]
)
def test_stop_request_that_a_library_turns_into_its_own_error_ends_at_once(number, expected):
    with pytest.raises(expected), StopRequest().handled():
        try:
            os.kill(os.getpid(), number)
        except BaseException:  # as a library in C or Rust does
            raise ValueError("could not determine the shape of object type") from None


def test_stop_request_keeps_the_error_of_a_step_that_a_signal_let_end():
    stop = StopRequest()
    with pytest.raises(ValueError, match="the step failed"), stop.handled(), stop.while_steps_run():
        os.kill(os.getpid(), signal.SIGTERM)
        raise ValueError("the step failed")
