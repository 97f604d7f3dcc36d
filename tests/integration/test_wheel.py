"""The wheel holds exactly the files of the package."""

from __future__ import annotations

import subprocess
import sys
import zipfile

import pytest

from tests import ROOT


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_package_and_no_other(tmp_path):
    source = tmp_path / "source"
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    tree = [name for name in listed if (ROOT / name).is_file()]
    for name in tree:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, source],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert packed == {name for name in tree if name.startswith("coprs_deploy/")}
    assert "coprs_deploy/py.typed" in packed
