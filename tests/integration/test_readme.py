"""The README's commands and Python run as they stand; names and links: tests/unit/test_docs.py."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys

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
def test_blocks_of_the_readme_run(tmp_path):
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    verbs = []
    for command in block("From weights to a mask", "bash").strip().splitlines():
        program, *arguments = shlex.split(command, comments=True)
        assert program == "coprs-deploy"
        subprocess.run(
            [sys.executable, "-m", "coprs_deploy", *arguments],
            cwd=tmp_path,
            check=True,
            capture_output=True,
        )
        verbs.append(arguments[0])
    assert set(verbs) == {"segment", "convert", "export", "verify", "inspect"}
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", block("In Python", "python")],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )
    assert "<think>" in done.stdout
    assert "(1, " in done.stdout
    assert (tmp_path / "result" / "overlay.png").is_file()
