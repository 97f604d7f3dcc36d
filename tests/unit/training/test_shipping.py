"""Shipping a run: what is refused, and what the card says of a gate that was missed."""

import json
from pathlib import Path

import pytest

from coprs_deploy.training.shipping import card, ship

REPORT = Path(__file__).parents[3] / "docs/reports/shipped-model/report.json"


def test_a_run_that_has_not_ended_is_refused_and_nothing_is_written(tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(ValueError, match="the run has not ended"):
        ship(tmp_path / "run", tmp_path / "shipped", tmp_path / "reports")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_card_names_every_gate_that_was_missed():
    report = json.loads(REPORT.read_text(encoding="utf-8"))
    assert "Gates of the recipe: all passed" in card(report, report["environment"], 1)
    report["phases"]["together"]["gates"]["mask_iou"] |= {"found": 0.9, "passed": False}
    text = card(report, report["environment"], 7_400_000)
    assert "missed together mask_iou 0.900 (wanted 0.93)" in text
    assert "7.4 MB" in text
