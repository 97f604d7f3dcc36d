"""Verbs that write, at the places and with the permissions that users have."""

from __future__ import annotations

import errno
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from coprs_deploy import demo
from coprs_deploy.data.examples import write_examples
from coprs_deploy.data.synthetic import PLAIN, SceneExamples
from tests import ROOT

RUN_COMMANDS = """
import io, json, os, sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from coprs_deploy.cli.main import main

results = {}
for verb, (folder, command) in json.loads(sys.argv[1]).items():
    stderr = io.StringIO()
    here = Path.cwd()
    os.chdir(folder)
    with redirect_stdout(io.StringIO()), redirect_stderr(stderr):
        code = main(command)
    os.chdir(here)
    files = [str(path.relative_to(verb)) for path in Path(verb).rglob("*")]
    results[verb] = (code, stderr.getvalue(), sorted(files))
print(json.dumps(results))
"""

UNPRIVILEGED = "setpriv --bounding-set=-all --inh-caps=-all"
"""Command that takes from root what another user would not have."""


def can_mount() -> bool:
    command = ["unshare", "--mount", "sh", "-c", "mount -t tmpfs tmpfs /mnt"]
    try:
        return subprocess.run(command, check=False, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def is_root() -> bool:
    return os.geteuid() == 0


pytestmark = pytest.mark.slow
needs_mounts = pytest.mark.skipif(not can_mount(), reason="needs root and mount namespaces")
extended = pytest.mark.extended
needs_root = pytest.mark.skipif(not is_root(), reason="needs root, to be another user")

COMMANDS = {
    "synth": ["synth", "--num-examples", "2", "--out", "{out}/scenes.jsonl"],
    "segment": ["segment", str(ROOT / "examples/scene.png"), "the red circle", "--out", "{out}"],
    "features": ["features", str(demo.CHECKPOINT), "{folder}/scenes.jsonl", "--out", "{out}"],
    "convert": ["convert", "--random", "--out", "{out}"],
}
"""Verbs that take seconds: they write one file, several files, and a whole directory."""

WRITTEN = {
    "synth": "scenes.jsonl",
    "segment": "result.json",
    "features": "shard-00000.safetensors",
    "convert": "config.json",
}


def run_verbs(
    folder: Path, out: str, setup: str = ":", prefix: str = "", inside: bool = False
) -> dict[str, tuple[int, str, list[str]]]:
    """Run each verb with an output in a directory of its own, named like the verb.

    Args:
        folder: parent of the directories.
        out: output directory, relative to that of the verb.
        setup: shell commands that prepare the directory, run in it in a mount namespace.
        prefix: command that runs the verbs.
        inside: run the verbs with the output as working directory.

    Returns:
        Exit code, stderr, and the paths below the directory, by verb.
    """
    write_examples(folder / "scenes.jsonl", SceneExamples(PLAIN, 2))
    commands, script = {}, [f"cd {shlex.quote(str(folder))}"]
    for verb, words in COMMANDS.items():
        (folder / verb).mkdir()
        script.append(f"cd {verb}; {setup}; cd ..")
        place = "." if inside else f"{verb}/{out}"
        command = [word.format(out=place, folder=folder) for word in words]
        commands[verb] = (f"{verb}/{out}" if inside else ".", command)
    program = [sys.executable, "-c", RUN_COMMANDS, json.dumps(commands)]
    script.append(f"exec {prefix} {shlex.join(program)}")
    namespace = ["unshare", "--mount"] if can_mount() else []
    done = subprocess.run(
        [*namespace, "sh", "-c", "\n".join(script)],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    return {verb: tuple(result) for verb, result in results.items()}


def hidden(files: list[str]) -> list[str]:
    """Return the paths that begin with a dot; ``features`` keeps one, its lock."""
    return [file for file in files if Path(file).name.startswith(".") and file[-6:] != "/.lock"]


@pytest.mark.parametrize(
    ("setup", "out", "inside"),
    [
        pytest.param("mkdir vol; mount -t tmpfs tmpfs vol", "vol", False, marks=needs_mounts),
        pytest.param(
            *("mkdir a vol; mount --bind a vol", "vol", False), marks=[needs_mounts, extended]
        ),
        pytest.param(
            *("mkdir vol; mount -t tmpfs tmpfs vol", "vol/new", False),
            marks=[needs_mounts, extended],
        ),
        pytest.param("mkdir here", "here", True, marks=extended),
        pytest.param("mkdir disk; ln -s disk link", "link", False, marks=extended),
        ("mkdir disk; ln -s disk/new link", "link", False),
        pytest.param(":", "two  words 'and' \"quotes\"", False, marks=extended),
        pytest.param(":", "new\nline", False, marks=extended),
        (":", os.fsdecode(b"not utf-8 \xff"), False),
        pytest.param(":", "deep/er", False, marks=extended),
    ],
    ids=[
        *("mount", "bind mount", "in a mount", "working directory", "link", "dangling link"),
        *("spaces", "newline", "bytes", "new parent"),
    ],
)
def test_verbs_write_to_any_place(tmp_path, setup, out, inside):
    for verb, (code, stderr, files) in run_verbs(tmp_path, out, setup, inside=inside).items():
        if verb == "convert" and "\udcff" in out:  # the tokenizers' library needs UTF-8
            assert code == 2 and "is not UTF-8" in stderr, stderr
            assert files == [], files
            continue
        assert code == 0 or (verb, code) == ("segment", 1), (verb, stderr)
        assert f"{out}/{WRITTEN[verb]}" in files or "link" in out, (verb, files)
        assert any(file.endswith(WRITTEN[verb]) for file in files), (verb, files)
        assert hidden(files) == [], verb


@pytest.mark.parametrize(
    ("setup", "out", "prefix", "number", "named"),
    [
        pytest.param(
            "mkdir vol; mount -t tmpfs -o ro tmpfs vol",
            *("vol", "", errno.EROFS, "vol"),
            marks=[needs_mounts, extended],
        ),
        pytest.param(
            "mkdir vol; mount -t tmpfs -o ro tmpfs vol",
            *("vol/new", "", errno.EROFS, "vol"),
            marks=needs_mounts,
        ),
        pytest.param(
            "mkdir vol; chown 12345 vol",
            *("vol", UNPRIVILEGED, errno.EACCES, "vol"),
            marks=[needs_root, extended],
        ),
        pytest.param(
            "mkdir vol; chown 12345 vol",
            *("vol/new", UNPRIVILEGED, errno.EACCES, "vol"),
            marks=needs_root,
        ),
        pytest.param("touch vol", "vol/new", "", errno.ENOTDIR, "vol", marks=extended),
    ],
    ids=["read-only mount", "in a read-only mount", "foreign", "in a foreign", "below a file"],
)
def test_verbs_refuse_a_place_that_cannot_be_written(tmp_path, setup, out, prefix, number, named):
    for verb, (code, stderr, files) in run_verbs(tmp_path, out, setup, prefix).items():
        assert code == 2, (verb, stderr)
        line = stderr.splitlines()[-1]
        assert line.endswith(f"/{named}: {os.strerror(number)}"), (verb, line)
        assert files == [named], verb


@needs_mounts
@pytest.mark.parametrize("out", [pytest.param("vol", marks=extended), "vol/new"])
def test_verbs_on_a_full_disk_name_the_path_and_leave_nothing_unfinished(tmp_path, out):
    results = run_verbs(tmp_path, out, "mkdir vol; mount -t tmpfs -o size=16k tmpfs vol")
    for verb, (code, stderr, files) in results.items():
        assert code == 2, (verb, stderr)
        line = stderr.splitlines()[-1]
        assert os.strerror(errno.ENOSPC) in line or "GB" in line, (verb, line)
        assert f"{verb}/vol" in line, (verb, line)
        assert WRITTEN[verb] not in str(files), (verb, files)
        assert hidden(files) == [], verb


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize("more", [[], ["--json"]])
@pytest.mark.parametrize("buffering", ["", pytest.param("1", marks=extended)])
def test_verb_with_a_full_disk_behind_its_output_is_exit_code_2(stream, more, buffering):
    command = [sys.executable, "-m", "coprs_deploy", "inspect", demo.BUNDLE]
    if stream == "stderr":
        command[-1] = "nowhere"
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*command, *more],
            check=False,
            env={**os.environ, "PYTHONUNBUFFERED": buffering},
            **{**streams, stream: full},
        )
    assert done.returncode == 2
    assert b"Traceback" not in (done.stderr or b"")
    assert b"Exception ignored" not in (done.stderr or b"")
