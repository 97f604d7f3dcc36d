"""The example programs run as they stand, in a fresh process."""

from __future__ import annotations

import re
import subprocess
import sys

import av
import numpy as np
import pytest
from PIL import Image

from tests import ROOT
from tests.integration.test_serve import serving

SCENE = ROOT / "examples" / "scene.png"
INSTRUCTION = "the largest red circle"
FIXED_INSTRUCTIONS = "concurrent_requests.py"
PROGRAMS = sorted(path.name for path in (ROOT / "examples").glob("*.py"))


def run(program, folder, *arguments):
    command = [sys.executable, ROOT / "examples" / program, *arguments]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("program", sorted({*PROGRAMS} - {"http_client.py", "ray_pipeline.py"}))
def test_example_program_finds_its_object(program, tmp_path):
    instruction = [] if program == FIXED_INSTRUCTIONS else [INSTRUCTION]
    assert run(program, tmp_path, SCENE, *instruction).strip()


@pytest.mark.slow
def test_example_of_a_client_uses_a_server(tmp_path):
    with serving() as (_, address):
        shown = run("http_client.py", tmp_path, SCENE, INSTRUCTION, address)
    assert "prior: " in shown
    assert "score 0.9" in shown


@pytest.mark.extended
def test_example_of_ray_writes_files(tmp_path):
    pytest.importorskip("ray.data")
    shown = run("ray_pipeline.py", tmp_path, SCENE, INSTRUCTION)
    assert re.search(rf"^{INSTRUCTION}: \[\d+\]$", shown, re.MULTILINE)
    assert list((tmp_path / "segmented").glob("*.parquet"))


@pytest.mark.slow
def test_example_of_a_video_segments_keyframes_only(tmp_path):
    scene = Image.open(SCENE).convert("RGB").resize((256, 256))
    frames = [np.asarray(image) for image in (scene, scene, scene, scene.rotate(180), scene)]
    with av.open(str(tmp_path / "scene.mkv"), "w") as file:
        stream = file.add_stream("ffv1", rate=5)
        stream.width, stream.height, stream.pix_fmt = 256, 256, "bgr0"
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame.copy(), "rgb24")))
        file.mux(stream.encode())
    lines = run("video_frames.py", tmp_path, "scene.mkv", INSTRUCTION).splitlines()
    kinds = ["keyframe" if "keyframe" in line else "reused" for line in lines]
    assert kinds == ["keyframe", "reused", "reused", "keyframe", "keyframe"]
    assert lines[0].split(",")[0][3:] == lines[1].split(",")[0][3:]  # the masks of the keyframe
    with av.open(str(tmp_path / "annotated.mp4")) as written:
        assert sum(1 for _ in written.decode(video=0)) == len(frames)


def test_every_example_states_how_it_is_run():
    for program in PROGRAMS:
        text = (ROOT / "examples" / program).read_text(encoding="utf-8")
        assert f"python examples/{program}" in text
