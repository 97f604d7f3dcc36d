"""`coprs-deploy segment --policy vllm` with the demo model, as a user runs it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import ROOT


def processes_of_group(group):
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, _, parent_group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
            except OSError:
                continue
            if int(parent_group) == group and state != "Z":
                found.append(entry.name)
    return found


def all_of_group_end(group, timeout_s=60):
    """Wait for processes that are still ending."""
    end = time.monotonic() + timeout_s
    while processes_of_group(group) and time.monotonic() < end:
        time.sleep(0.2)
    return not processes_of_group(group)


@pytest.fixture
def run(tmp_path):
    groups = []

    def runner(*arguments):
        child = subprocess.Popen(
            [sys.executable, "-m", "coprs_deploy.cli.main", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            cwd=tmp_path,
        )
        groups.append(child.pid)
        stdout, stderr = child.communicate(timeout=300)
        return child, stdout, stderr

    yield runner
    for group in groups:
        if processes_of_group(group):
            os.killpg(group, signal.SIGKILL)


def test_segment_writes_the_result_and_leaves_no_process(run, tmp_path):
    child, stdout, stderr = run(
        "segment",
        str(ROOT / "examples/scene.png"),
        "the largest red circle",
        "--policy",
        "vllm",
        "--vllm",
        "max_num_seqs=2",
        "--out",
        str(tmp_path / "result"),
        "--json",
    )
    assert child.returncode == 0, stderr
    assert all_of_group_end(child.pid)
    result = json.loads(stdout)
    assert result["found"]
    assert result["reasoning"].startswith("The red circle candidates are")
    assert "vllm 0.32.0 qwen2_5_vl on cpu" in result["runtime"]
    assert "policy ready after" in stderr
    assert (tmp_path / "result/overlay.png").is_file()


def test_segment_unknown_vllm_setting_exits_with_2(run):
    child, _, stderr = run("segment", "scene.png", "x", "--policy", "vllm", "--vllm", "max_seqs=2")
    assert child.returncode == 2
    assert "'max_seqs=2' is unknown; accepted: name=value with max_num_seqs" in stderr


def test_doctor_lists_the_vllm_policy(run):
    child, stdout, _ = run("doctor", "--json")
    assert child.returncode == 0
    policies = {entry["name"]: entry for entry in json.loads(stdout)["policies"]}
    assert policies["vllm"]["is_available"]
    assert "0.32.0" in policies["vllm"]["detail"]
