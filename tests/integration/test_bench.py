"""``coprs-deploy bench`` as a user runs it, on few rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from coprs_deploy.benchmarks import suites
from coprs_deploy.benchmarks.committed import replace_table, stale_files
from coprs_deploy.benchmarks.measurement import Settings
from coprs_deploy.benchmarks.report import read_report
from coprs_deploy.benchmarks.run import Request, run_benchmark
from coprs_deploy.benchmarks.suites import precision
from coprs_deploy.cli.main import main
from tests import ROOT


def bench(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    words = ["bench", "--limit", "300", *map(str, arguments)]
    command = [sys.executable, "-m", "coprs_deploy.cli.main", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=600, env=environment
    )


@pytest.mark.slow
def test_engines_of_the_shipped_model_are_timed_judged_and_reported(tmp_path):
    only = "(encoder|three).*(onnxruntime .* cpu fp32|PyTorch .* eager cpu fp32)$"
    done = bench("--suite", "engines", "--only", only, "--seconds", "0.2", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("shipped-*.json")
    report = read_report(path)
    assert report.machine.cores >= 1
    assert report.ceilings[0].matmul_flops["fp32"] > 1e8
    encoder, chain = report.groups
    names = [row.name for row in encoder.rows]
    assert any("coprs-deploy graph, onnxruntime" in name for name in names)
    assert any("segment-anything" in name for name in names)
    for group in (encoder, chain):
        for row in group.rows:
            if row.reason and "segment-anything" in row.name:
                continue  # the peer need not be installed
            assert row.reason == ""
            assert row.latency.p50 > 0
            assert row.memory.host > 10_000_000
            assert row.accuracy.mask_iou > 0.999
            assert row.accuracy.truth_iou > 0.85
            assert 0 < row.work.share < 3
    graph = encoder.rows[0]
    assert graph.accuracy.embedding_cosine > 0.99999
    assert graph.ratio.baseline.startswith("coprs-deploy module, PyTorch")
    assert str(tmp_path) not in path.read_text()
    assert "coprs-deploy graph" in done.stdout


@pytest.mark.slow
def test_a_users_bundle_is_measured_without_its_checkpoint(tiny_bundle):
    done = bench(tiny_bundle, "--suite", "engines", "--only", "prior", "--json", "--seconds", "0.1")
    assert done.returncode == 0, done.stderr
    (group,) = json.loads(done.stdout)["groups"]
    (row,) = group["rows"]
    assert row["latency"]["n"] > 0
    assert "no checkpoint was given" in row["accuracy"]["note"]


@pytest.mark.slow
def test_first_masks_policies_and_growth_are_judged_too(tmp_path):
    only = "first mask|cpu float32|: 2 (targets|images|pictures|questions)|: 512 x"
    suites = "start,policy,scaling"
    done = bench(
        "--suite", suites, "--only", only, "--seconds", "0.05", "--rounds", "1", "--out", tmp_path
    )
    assert done.returncode == 0, done.stderr
    report = read_report(next(tmp_path.glob("shipped-*.json")))
    assert {group.suite for group in report.groups} == set(suites.split(","))
    for group in report.groups:
        for row in group.rows:
            assert row.reason == ""
            assert row.accuracy.mask_iou > 0.999, row.name
            assert row.accuracy.truth_iou > 0.85, row.name
    (policy,) = (row for g in report.groups if g.suite == "policy" for row in g.rows)
    assert policy.accuracy.concentration_cosine > 0.99999


@pytest.mark.slow
def test_the_accuracy_of_half_precision_is_made_again(monkeypatch):
    monkeypatch.setattr(precision, "SCENES", 4)
    report = run_benchmark(Request(suites=("precision",), settings=Settings(limit_seconds=300)))
    (group,) = report.groups
    accuracy = {row.labels["precision"]: row.accuracy for row in group.rows}
    assert accuracy["fp32"].mask_iou == 1
    assert accuracy["fp32"].mask_error < 1e-5 < accuracy["fp16"].mask_error
    assert accuracy["fp16"].mask_error < accuracy["bf16"].mask_error < 0.1
    assert all(row.latency is None and row.reason == "" for row in group.rows)


def test_every_suite_can_be_imported_and_is_documented():
    page = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
    for name in suites.SUITES:
        module = suites.suite(name)
        assert name == module.NAME
        assert module.SUMMARY
        assert f"| `{name}` |" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "engine"], "suite is 'engine'; accepted: engines"),
        (["--sizes", "vit_b"], "--sizes goes with --full"),
        (["--full", "--sizes", "vit_x"], "sizes names 'vit_x'"),
        (["--checkpoint", "c"], "--checkpoint goes with BUNDLE"),
        (["--prepare"], "name a folder with --work"),
        (["--suite", "start", "--only", "nothing like it"], "fits no row"),
        (["nowhere"], "there is no bundle"),
    ],
)
def test_wrong_use_is_answered(arguments, message, capsys):
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_tables_of_readme_and_docs_are_those_of_the_committed_reports():
    assert dict(stale_files(ROOT)) == {}, "python -m coprs_deploy.benchmarks.committed"


def test_a_table_is_replaced_between_its_marks():
    text = "a\n<!-- speed:begin -->\nold\n<!-- speed:end -->\nb\n"
    new = replace_table(text, "speed", ["| x |"])
    assert new == "a\n<!-- speed:begin -->\n\n| x |\n\n<!-- speed:end -->\nb\n"
    assert replace_table(new, "speed", ["| x |"]) == new
    with pytest.raises(ValueError, match="to write into"):
        replace_table("nothing", "speed", [])
