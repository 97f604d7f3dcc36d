"""Committed training reports: a docs check, independent of the code under test."""

import json

import pytest

from coprs_deploy import demo
from tests import ROOT

REPORTS = ROOT / "training/reports"


def read_report(name):
    return json.loads((REPORTS / name / "report.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["demo", "demo-seed-1", "demo-model", "demo-model-seed-1"])
def test_demo_report_of_each_seed_reaches_the_thresholds(name):
    report = read_report(name)
    assert report["generated"]["giou"] >= 0.93
    assert report["generated"]["precision_at_50"] >= 0.99
    for stage in report["stages"].values():
        for threshold in stage["thresholds"].values():
            assert threshold["passed"] == (threshold["value"] >= threshold["required"])


def test_model_card_has_the_metrics_of_the_demo_report():
    report = read_report("demo-model")
    assert f"| all | {report['generated']['giou']:.3f} |" in demo.MODEL_CARD.read_text("utf-8")
