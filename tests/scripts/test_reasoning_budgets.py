"""Accuracy by reasoning budget of checkpoints, measured with their own evaluator."""

import json

import pytest
from PIL import Image

from coprs_deploy import demo
from tests import ROOT
from tests.scripts import load_script

LATENCY = "benchmarks/reports/latency-cpu-2-cores-avx512-2026-11-30.json"

script = load_script("benchmarks/reasoning_budgets.py")


@pytest.mark.slow
def test_budgets_of_a_checkpoint_are_compared_with_the_first(tmp_path, capsys):
    out = tmp_path / "budgets.md"
    named = [f"{name}={demo.CHECKPOINT}" for name in ("before", "after")]
    assert script.main([*named, "--count", "4", "--out", str(out)]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.loads(out.with_suffix(".json").read_text()) == report
    before, after = (report["checkpoints"][name] for name in ("before", "after"))
    assert before == after
    assert list(before["budgets"]) == ["0", "5", "10", "15", "20", "30", "40", "all"]
    whole, none = before["budgets"]["all"], before["budgets"]["0"]
    assert whole["giou"] > 0.5
    assert (none["reasoning_tokens"], len(whole["ious"])) == (0, 4)
    kept = [each["reasoning_tokens"] for each in before["budgets"].values()]
    assert kept == sorted(kept)
    last = out.read_text().splitlines()[-1]
    assert last.startswith("| all | ")
    assert last.endswith(" | +0.0000 ± 0.0000 |")


def measured(giou, **times):
    cell = {"giou": giou, "precision_at_50": giou, "reasoning_tokens": 3.0, "ious": [giou, giou]}
    return {"budgets": {"0": cell | times, "all": cell | times}}


def test_times_of_a_latency_report_come_by_budget(tmp_path):
    report = json.loads((ROOT / LATENCY).read_text("utf-8"))
    times = script._times(ROOT / LATENCY)
    assert list(times) == ["0", "5", "10", "15", "20", "30", "40", "all"]
    cases = {case["name"]: case["latency"] for case in report["groups"][0]["cases"]}
    assert times["10"] == {q: cases["10 tokens"][q] for q in ("p50", "p99")}
    table = script._table({"before": measured(0.4), "after": measured(0.9, p50=61.0, p99=90.0)})
    assert "after: p50, p99 of a request" in table.splitlines()[0]
    assert table.splitlines()[-1].endswith("| +0.5000 ± 0.0000 | 61 ms, 90 ms |")


def test_draw_makes_one_row_of_each_report(tmp_path):
    both = {"before": measured(0.4, p50=50.0), "after": measured(0.9)}
    names = []
    for preset in ("plain", "full"):
        names.append(tmp_path / f"{preset}.json")
        names[-1].write_text(json.dumps({"preset": preset, "checkpoints": both}))
    sizes = []
    for drawn in (names, names[:1]):
        chart = tmp_path / "chart.png"
        assert script.main(["--draw", *map(str, drawn), "--out", str(chart)]) == 0
        with Image.open(chart) as image:
            sizes.append(image.size)
    (width, height), (width_of_one, height_of_one) = sizes
    assert width == width_of_one and height == 2 * height_of_one


@pytest.mark.parametrize("arguments", [[], ["--draw", "a.json"], ["checkpoint"]])
def test_missing_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        script.main(arguments)
    assert "error:" in capsys.readouterr().err
