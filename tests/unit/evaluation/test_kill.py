"""An evaluation that is killed and resumed writes the same files as one that is not."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from coprs_deploy.evaluation.store import LOCK_FILE
from tests import ROOT
from tests.unit.data.readers.layouts import Refer

SENTENCES = 4


def command(root, out, kill_at=0, num_workers=1):
    arguments = ["evaluate", "--dataset", "refcoco:val", "--root", str(root), "--out", str(out)]
    arguments += ["--workers", str(num_workers)]
    return [sys.executable, "-m", "tests.unit.evaluation.fake_verb", str(kill_at), *arguments]


def run(root, out, kill_at=0, num_workers=1, expected=0):
    process = subprocess.run(
        command(root, out, kill_at, num_workers),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == expected, process.stderr
    return process


def write_data(root, num_rows):
    """Write references with several sentences each, two on an image, the second one elsewhere."""
    builder = Refer(root)
    num_refs = num_rows // SENTENCES
    forms = ("polygon", "compressed RLE", "overlapping polygons", "empty list")
    for number in range(num_refs):
        image_id = 1 + number % (num_refs // 2)
        ann_id = builder.annotate(image_id, forms[number % len(forms)])
        builder.refer(image_id, ann_id, "val", *(f"it {number} {i}" for i in range(SENTENCES)))
    return builder.write()


def files(out):
    """Return the content of all files without the speed, by name."""
    found = {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert found.pop("speed.json") and found.pop(LOCK_FILE) == b""
    page, foot, _ = found["report.html"].partition(b"<footer><p>Speed of the last run")
    assert foot
    found["report.html"] = page
    return found


@pytest.mark.slow
def test_evaluation_killed_three_times_writes_the_same_files(tmp_path):
    root = write_data(tmp_path / "data", 160)
    for kill_at in (30, 1, 50):
        run(root, tmp_path / "killed", kill_at, expected=-signal.SIGKILL)
        with (tmp_path / "killed/refcoco-val/rows.partial.jsonl").open("ab") as file:
            file.write(b'{"index":15')  # as a kill in the middle of a write leaves it
    last = run(root, tmp_path / "killed")
    assert "78 of 160 examples have been evaluated before" in last.stderr
    run(root, tmp_path / "whole")
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    assert len(files(tmp_path / "whole")["refcoco-val/rows.jsonl"].splitlines()) == 160


@pytest.mark.extended
def test_workers_write_the_same_files_as_one_process_and_keep_rows_if_one_dies(tmp_path):
    root = write_data(tmp_path / "data", 96)
    killed = run(root, tmp_path / "many", kill_at=20, num_workers=2, expected=2)
    assert "a worker ended with exit code -9: it was killed" in killed.stderr
    assert f"examples are finished and kept in {tmp_path / 'many'}; run the same" in killed.stderr
    last = run(root, tmp_path / "many", num_workers=2)
    assert "of 96 examples have been evaluated before" in last.stderr
    run(root, tmp_path / "one")
    assert files(tmp_path / "many") == files(tmp_path / "one")
    speed = json.loads((tmp_path / "one/speed.json").read_text())
    assert (speed["num_instructions"], speed["num_images"], speed["num_workers"]) == (96, 12, 1)
    assert "num_workers" in json.loads((tmp_path / "many/speed.json").read_text())


@pytest.mark.extended
def test_bundle_that_a_worker_cannot_open_ends_the_run_with_its_error(tmp_path):
    root = write_data(tmp_path / "data", 16)
    process = run(root, tmp_path / "out", kill_at=-1, num_workers=2, expected=2)
    assert "a worker failed with BundleError: there is no bundle" in process.stderr
    assert "Traceback" not in process.stderr


@pytest.mark.extended
@pytest.mark.parametrize("num_workers", [1, 2])
def test_interrupt_keeps_the_rows_and_says_how_to_go_on(tmp_path, num_workers):
    root = write_data(tmp_path / "data", 4000)
    partial = tmp_path / "out/refcoco-val/rows.partial.jsonl"
    arguments = command(root, tmp_path / "out", 0, num_workers)
    with subprocess.Popen(
        arguments, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        while not partial.is_file() or not partial.read_bytes().count(b"\n"):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does for Ctrl-C
        message = process.stderr.read()
    assert process.returncode == 130
    done = len(partial.read_bytes().splitlines())
    assert f"{done:,} of 4,000 examples are finished and kept" in message
    assert "Traceback" not in message


@pytest.mark.extended
def test_evaluation_of_50_000_rows_killed_at_any_moment_writes_the_same_files(tmp_path):
    count, out = 50_000, tmp_path / "killed"
    root = write_data(tmp_path / "data", count)
    partial = out / "refcoco-val/rows.partial.jsonl"
    for share in (0.2, 0.5, 0.8):
        with subprocess.Popen(command(root, out), cwd=ROOT, stderr=subprocess.DEVNULL) as process:
            while not partial.is_file() or partial.read_bytes().count(b"\n") < share * count:
                assert process.poll() is None, "it ended before it was killed"
                time.sleep(0.1)
            process.kill()
        assert process.returncode == -signal.SIGKILL
    print(run(root, out).stdout)
    run(root, tmp_path / "whole")
    assert files(out) == files(tmp_path / "whole")
    assert len(files(out)["refcoco-val/rows.jsonl"].splitlines()) == count
