"""Shipping a run: what is refused, and what the card says of a gate that was missed."""

import json

import pytest

from coprs_deploy.training.shipping import card, keep_report, ship
from tests import ROOT

REPORT = ROOT / "docs/reports/shipped-model/report.json"


def test_a_run_that_has_not_ended_is_refused_and_nothing_is_written(tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(ValueError, match="the run has not ended"):
        ship(tmp_path / "run", tmp_path / "shipped", tmp_path / "reports")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_report_is_kept_without_its_model(tmp_path):
    run = tmp_path / "run"
    (run / "plots").mkdir(parents=True)
    (run / "plots" / "one_curve.png").write_bytes(b"a picture")
    report = json.loads(REPORT.read_text(encoding="utf-8"))
    environment = report.pop("environment")
    (run / "report.json").write_text(json.dumps(report | {"answers": [1, 2]}))
    (run / "environment.json").write_text(json.dumps(environment))
    assert keep_report(run, tmp_path / "kept") == environment
    kept = json.loads((tmp_path / "kept" / "report.json").read_text())
    assert kept == report | {"environment": environment}
    assert "![one curve](plots/one_curve.png)" in (tmp_path / "kept" / "report.md").read_text()
    assert (tmp_path / "kept" / "plots" / "one_curve.png").read_bytes() == b"a picture"


def test_the_card_names_every_gate_that_was_missed():
    report = json.loads(REPORT.read_text(encoding="utf-8"))
    assert "Gates of the recipe: all passed" in card(report, report["environment"], 1)
    report["phases"]["together"]["gates"]["mask_iou"] |= {"found": 0.9, "passed": False}
    text = card(report, report["environment"], 7_400_000)
    assert "missed together mask_iou 0.900 (wanted 0.93)" in text
    assert "7.4 MB" in text
