"""The script that kills verbs: what it counts, and that it finds what a killed verb leaves."""

import json
import signal

import pytest

from tests.scripts import load_script

kill_verbs = load_script("benchmarks/kill_verbs.py")

WRITER = """
import os, subprocess, sys, time
from pathlib import Path
os.chdir(folder)
os.environ.update(environment)
Path(stderr).touch()
Path("out").mkdir(exist_ok=True)
Path("out/result").touch()
{action}
time.sleep(1)
"""


@pytest.fixture
def verb(monkeypatch):
    """Replace the verbs by one that runs a program; it takes about a second."""

    def replace(action):
        monkeypatch.setattr(kill_verbs, "VERBS", {"write": ()})
        monkeypatch.setattr(kill_verbs, "PRELOADED", ())
        monkeypatch.setattr(kill_verbs, "EXIT_TIMEOUT_S", 0.5)
        monkeypatch.setattr(kill_verbs, "RUN_VERB", WRITER.format(action=action))

    return replace


def run(repeat, capsys, signals=(signal.SIGKILL,)):
    code = kill_verbs.run(["write"], signals, repeat, seed=0)
    *table, line = capsys.readouterr().out.splitlines()
    return code, table, json.loads(line)


def test_run_without_violation_counts_each_signal(verb, capsys):
    verb("pass")
    code, table, result = run(2, capsys, (signal.SIGTERM, signal.SIGKILL))
    assert (code, result["runs"], result["violations"]) == (0, 4, [])
    assert [row.split()[:3] for row in table[1:]] == [
        ["write", "SIGTERM", "2"],
        ["write", "SIGKILL", "2"],
    ]
    assert "-15: 2" in table[1] and "-9: 2" in table[2]


@pytest.mark.parametrize(
    ("action", "violation"),
    [
        ("Path(f'out/part-{os.getpid()}').touch()", "after the next run: "),
        ("Path('user/notes.txt').write_text(str(os.getpid()))", "files of the user changed"),
        ("subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(9)'])", "is left"),
        (
            "Path('out/mark').exists() and sys.exit(3); Path('out/mark').touch()",
            "the next run ends with 3",
        ),
    ],
)
def test_run_violation_is_found(verb, capsys, action, violation):
    verb(action)
    code, _, result = run(1, capsys)
    assert code == 1
    assert any(violation in text for text in result["violations"]), result


def test_run_failing_verb_stops_before_the_first_signal(verb, capsys):
    verb("sys.exit(2)")
    with pytest.raises(RuntimeError, match="write ends with 2 without a signal"):
        run(1, capsys)


def test_every_command_is_accepted():
    from coprs_deploy.cli.main import build_parser

    for command in kill_verbs.VERBS.values():
        build_parser().parse_args(command)
