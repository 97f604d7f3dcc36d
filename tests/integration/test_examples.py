"""The example programs run as they stand, in a fresh process."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests import ROOT

PROGRAMS = sorted(path.name for path in (ROOT / "examples").glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
def test_example_program_finds_its_object(program, tmp_path):
    scene = ROOT / "examples" / "scene.png"
    instruction = [] if program == "concurrent_requests.py" else ["the largest red circle"]
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / program, scene, *instruction],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
