"""The demo model script: what it refuses, the copied report and the model card."""

import json

import pytest

from coprs_deploy import demo
from tests import ROOT
from tests.scripts import load_script

REPORTS = ROOT / "training/reports/demo-model"

script = load_script("training/build_demo_model.py")


@pytest.fixture
def report():
    return json.loads((REPORTS / "report.json").read_text(encoding="utf-8"))


def test_build_demo_model_of_an_unfinished_run_is_refused_and_writes_nothing(tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(ValueError, match="the run is not finished"):
        script.build_demo_model(tmp_path / "run", tmp_path / "demo", tmp_path / "reports")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_copy_report_keeps_metrics_page_and_plots_without_examples(report, tmp_path):
    run = tmp_path / "run"
    (run / "plots").mkdir(parents=True)
    (run / "plots" / "one_curve.png").write_bytes(b"an image")
    environment = report.pop("environment")
    (run / "report.json").write_text(json.dumps(report | {"examples": [1, 2]}))
    (run / "environment.json").write_text(json.dumps(environment))
    arguments = [str(run), "--reports", str(tmp_path / "kept"), "--only-report"]
    assert script.main(arguments) == 0
    kept = json.loads((tmp_path / "kept" / "report.json").read_text())
    assert kept == report | {"environment": environment}
    assert "![one curve](plots/one_curve.png)" in (tmp_path / "kept" / "report.md").read_text()
    assert (tmp_path / "kept" / "plots" / "one_curve.png").read_bytes() == b"an image"


def test_model_card_names_every_missed_threshold(report):
    card = script.model_card(report, report["environment"], 1)
    assert "Thresholds of the recipe: all passed" in card
    report["stages"]["joint"]["thresholds"]["giou"] |= {"value": 0.9, "passed": False}
    card = script.model_card(report, report["environment"], 7_400_000)
    assert "missed joint giou 0.900 (required 0.93)" in card
    assert "7.4 MB" in card


def test_main_without_a_run_exits_with_the_accepted_argument(capsys):
    with pytest.raises(SystemExit) as stopped:
        script.main([])
    assert stopped.value.code == 2
    assert "RUN is missing" in capsys.readouterr().err


def test_demo_model_is_smaller_than_the_limit():
    files = [path for path in demo.ROOT.rglob("*") if path.is_file()]
    assert 1_000_000 < sum(path.stat().st_size for path in files) < script.MAX_BYTES
