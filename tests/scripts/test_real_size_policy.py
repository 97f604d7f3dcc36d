"""The report of policies of real size: each case is measured once, failures are rows."""

import json
import re
from pathlib import Path

import pytest

from coprs_deploy.bench.worker import WorkerError
from tests.scripts import load_script

ROOT = Path(__file__).parents[2]

real_size_policy = load_script("benchmarks/real_size_policy.py")
Case = real_size_policy.Case


def call_here(function, **settings):
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
    text = (out / "real-size-policy.md").read_text()
    assert re.search(r"\| tiny openvino fp32 \| 58\d tokens \|", text)
    assert "| tiny fp32 |" in text


def test_a_failed_case_is_a_row_and_the_exit_code(tmp_path, monkeypatch, capsys):
    def call(function, **settings):
        if function == "measure":
            raise WorkerError("no memory")
        return {}

    monkeypatch.setattr(real_size_policy, "call", call)
    arguments = ["--out", str(tmp_path), "--work-dir", str(tmp_path), "--case", "3b.*float32"]
    assert real_size_policy.main(arguments) == 1
    assert "3b transformers float32: no memory" in capsys.readouterr().err
    assert (
        "| 3b transformers float32 | no memory |" in (tmp_path / "real-size-policy.md").read_text()
    )


def test_committed_report_is_rendered_by_this_script():
    report = json.loads((ROOT / "benchmarks/reports/real-size-policy.json").read_text())
    text = (ROOT / "benchmarks/reports/real-size-policy.md").read_text(encoding="utf-8")
    assert text == real_size_policy.render(report)
