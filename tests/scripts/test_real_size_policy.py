"""The report of policies of real size: each case is measured once, failures are rows."""

import json
import re
from pathlib import Path

import pytest

from coprs_deploy.bench.worker import WorkerError
from coprs_deploy.machine import machine_record
from tests.scripts import load_script

ROOT = Path(__file__).parents[2]

real_size_policy = load_script("benchmarks/real_size_policy.py")
Case = real_size_policy.Case


KIND = machine_record().kind
REPORT = f"real-size-policy-{KIND}.md"


def call_here(function, timeout_s, /, **settings):
    """Call a function of the script in this process."""
    return getattr(real_size_policy, function)(**settings)


@pytest.mark.slow
def test_run_measures_each_case_once(tmp_path, monkeypatch):
    """On a tiny policy, whose images are small."""
    pytest.importorskip("openvino", reason="OpenVINO is not installed")
    monkeypatch.setattr(real_size_policy, "call", call_here)
    out, work = tmp_path / "out", tmp_path / "work"
    cases = (
        Case("tiny", "openvino", "fp32"),
        Case("tiny", "openvino", "fp32", max_pixels=3136),
        Case("tiny", "transformers", "float32"),
    )
    first = real_size_policy.run(out, work, cases[:2])
    full, small = first["cases"].values()
    assert full["prompt_tokens"] in range(584, 586)
    assert small["prompt_tokens"] < full["prompt_tokens"]
    assert len(full["warm_prefill_s"]) == 2
    assert full["peak_bytes"] > full["private_bytes"] > 0
    converted = first["conversions"]["tiny fp32"]
    assert converted["bytes"] > 0.9 * converted["weights_bytes"]

    steps = []
    report = real_size_policy.run(out, work, cases, steps.append)
    assert steps == ["measure tiny transformers float32"]
    assert report["cases"]["tiny openvino fp32"] == full
    text = (out / REPORT).read_text()
    assert re.search(r"\| tiny openvino fp32 \| 58\d tokens \|", text)
    assert "| tiny fp32 |" in text


def test_a_failed_case_is_a_row_and_the_exit_code(tmp_path, monkeypatch, capsys):
    def call(function, timeout_s, /, **settings):
        if function == "measure":
            raise WorkerError(f"no memory after {timeout_s} s")
        return {}

    monkeypatch.setattr(real_size_policy, "call", call)
    arguments = ["--out", str(tmp_path), "--work-dir", str(tmp_path), "--case", "3b.*float32"]
    assert real_size_policy.main([*arguments, "--case-timeout", "7"]) == 1
    assert "3b transformers float32: no memory after 7.0 s" in capsys.readouterr().err
    text = (tmp_path / REPORT).read_text()
    commit = machine_record().commit or "-"
    assert re.search(rf"\| 3b transformers float32 \| no memory .*\| {commit} \|", text)


def test_report_of_another_kind_of_machine_is_not_continued(tmp_path, monkeypatch):
    monkeypatch.setattr(real_size_policy, "call", lambda *_, **__: {"error": "left out"})
    other = tmp_path / "real-size-policy-cpu-64-cores-amx.json"
    other.write_text(json.dumps({"cases": {"3b transformers float32": {"error": "elsewhere"}}}))
    report = real_size_policy.run(tmp_path, tmp_path, [Case("3b", "transformers", "float32")])
    assert report["cases"]["3b transformers float32"]["error"] == "left out"
    assert "elsewhere" in other.read_text()


REPORTS = sorted((ROOT / "benchmarks/reports").glob("real-size-policy-*.json"))


@pytest.mark.parametrize("path", REPORTS, ids=lambda path: path.stem)
def test_committed_report_is_rendered_by_this_script(path):
    report = json.loads(path.read_text(encoding="utf-8"))
    assert path.with_suffix(".md").read_text(encoding="utf-8") == real_size_policy.render(report)
    assert path.stem == f"{real_size_policy.NAME}-{report['machine']['kind']}"
