"""The README's commands and code run as they stand."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(heading: str, language: str) -> str:
    """Return the first code block of a language below a heading."""
    section = README.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    found = re.search(rf"```{language}\n(.*?)```", section, re.DOTALL)
    assert found, f"no {language} block below {heading!r}"
    return found[1]


@pytest.mark.slow
def test_the_commands_and_the_python_of_the_readme_run(tmp_path):
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    commands = block("From weights to a mask", "bash").strip().splitlines()
    assert len(commands) == 6
    for command in commands:
        program, *arguments = shlex.split(command, comments=True)
        assert program == "coprs-deploy"
        subprocess.run(
            [sys.executable, "-m", "coprs_deploy.cli.main", *arguments],
            cwd=tmp_path,
            check=True,
            capture_output=True,
        )
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", block("In Python", "python")],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )
    assert "<think>" in done.stdout
    assert "(1, " in done.stdout
    assert (tmp_path / "answer" / "overlay.png").is_file()


def test_every_make_target_of_the_readme_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"`?make ([a-z]+)`?", README)):
        assert f"\n{target}:" in makefile, target


def test_every_verb_is_in_the_table():
    from coprs_deploy.cli.main import VERBS

    for verb in VERBS:
        assert f"| `{verb}" in README, verb


def test_every_linked_file_exists():
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert links
    for link in links:
        assert (ROOT / link).exists(), link


def test_the_working_areas_are_one_step_from_the_root():
    for name in ("export", "engines", "training", "benchmarks"):
        assert (ROOT / name).readlink() == Path("coprs_deploy", name)
