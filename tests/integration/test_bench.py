"""``coprs-deploy bench`` as a user runs it, on few cases."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from coprs_deploy.bench import graph_suites
from coprs_deploy.bench.case import BenchOptions
from coprs_deploy.bench.report import read_report
from coprs_deploy.bench.run import SUITES, run_benchmark
from coprs_deploy.cli.main import main

ROOT = Path(__file__).parents[2]


def bench(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    words = ["bench", "--case-timeout", "300", *map(str, arguments)]
    command = [sys.executable, "-m", "coprs_deploy.cli.main", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=600, env=environment
    )


@pytest.mark.slow
@pytest.mark.extended
def test_bench_engines_of_the_demo_model_are_timed_evaluated_and_reported(tmp_path):
    pattern = "(encoder|three).*(onnxruntime .* cpu fp32|PyTorch .* eager cpu fp32)$"
    done = bench("--suite", "engines", "--filter", pattern, "--min-time", "0.2", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("demo-*.json")
    assert {p.suffix for p in tmp_path.iterdir()} == {".html", ".json", ".md"}
    report = read_report(path)
    assert report.machine.cores >= 1
    encoder, graphs = report.groups
    names = [case.name for case in encoder.cases]
    assert any("coprs-deploy graph, onnxruntime" in name for name in names)
    assert any("segment-anything" in name for name in names)
    for group in (encoder, graphs):
        for case in group.cases:
            if case.error and "segment-anything" in case.name:
                continue  # the peer need not be installed
            assert case.error == ""
            assert case.latency.ci_low <= case.latency.p50 <= case.latency.ci_high
            assert case.memory.host > 10_000_000
            assert case.accuracy.mask_iou_mean > 0.999
            assert case.accuracy.giou > 0.85
    graph = encoder.cases[0]
    assert graph.accuracy.embedding_cosine > 0.99999
    assert graph.ratio.baseline.startswith("coprs-deploy module, PyTorch")
    assert str(tmp_path) not in path.read_text()
    assert "coprs-deploy graph" in done.stdout


@pytest.mark.slow
def test_bench_bundle_without_checkpoint_is_its_own_reference(tiny_bundle):
    done = bench(
        tiny_bundle, "--suite", "engines", "--filter", "prior", "--json", "--min-time", "0.1"
    )
    assert done.returncode == 0, done.stderr
    (group,) = json.loads(done.stdout)["groups"]
    assert group["cases"][0]["name"].startswith("coprs-deploy graph, onnxruntime")
    for case in group["cases"]:
        assert case["latency"]["n"] > 0
        assert "no checkpoint was given" in case["accuracy"]["note"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("suites", "pattern"),
    [
        ("policy,scaling", "cpu float32|: 2 targets"),
        pytest.param(
            "start,policy,scaling",
            "first mask|cpu float32|: 2 (targets|images|questions)|: 512 x",
            marks=pytest.mark.extended,
        ),
    ],
)
@pytest.mark.extended
def test_bench_start_policy_and_scaling_are_evaluated(suites, pattern, tmp_path):
    done = bench(
        "--suite",
        suites,
        "--filter",
        pattern,
        "--min-time",
        "0.05",
        "--rounds",
        "1",
        "--out",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    report = read_report(next(tmp_path.glob("demo-*.json")))
    assert {group.suite for group in report.groups} == set(suites.split(","))
    for group in report.groups:
        for case in group.cases:
            assert case.error == ""
            assert case.accuracy.mask_iou_mean > 0.999, case.name
            assert case.accuracy.giou > 0.85, case.name
    (policy,) = (case for g in report.groups if g.suite == "policy" for case in g.cases)
    assert policy.accuracy.concentration_cosine > 0.99999


@pytest.mark.slow
@pytest.mark.extended
def test_bench_precision_has_accuracy_without_latency(monkeypatch):
    monkeypatch.setattr(graph_suites, "SCENES", 1)
    options = BenchOptions(suites=("precision",), filter="fp16", case_timeout_s=300)
    (group,) = run_benchmark(options, print, print).groups
    (case,) = group.cases
    assert case.error == ""
    assert case.latency is None
    assert 1e-5 < case.accuracy.mask_relative_error < 0.1


@pytest.mark.extended
def test_bench_precision_orders_the_precisions(monkeypatch):
    monkeypatch.setattr(graph_suites, "SCENES", 4)
    options = BenchOptions(suites=("precision",), case_timeout_s=300)
    report = run_benchmark(options, print, print)
    (group,) = report.groups
    accuracy = {case.labels["precision"]: case.accuracy for case in group.cases}
    assert accuracy["fp32"].mask_iou_mean == 1
    assert accuracy["fp32"].mask_relative_error < 1e-5 < accuracy["fp16"].mask_relative_error
    assert accuracy["fp16"].mask_relative_error < accuracy["bf16"].mask_relative_error < 0.1
    assert all(case.latency is None and case.error == "" for case in group.cases)


def test_bench_suites_are_documented():
    page = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
    for name in SUITES:
        assert f"| `{name}` |" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "engine"], "suite is 'engine'; accepted: engines"),
        (["--sizes", "vit_x"], "sizes names 'vit_x'"),
        (["--checkpoint", "c"], "--checkpoint needs BUNDLE"),
        (["--prepare-only"], "name a folder with --work-dir"),
        (["--filter", "("], "accepted: a regular expression"),
        (["--rounds", "0"], "--rounds is 0"),
        (["--suite", "start", "--filter", "nothing like it"], "matches no case"),
        (["nowhere"], "there is no bundle"),
    ],
)
def test_bench_wrong_use_exits_with_2(arguments, message, capsys):
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err
