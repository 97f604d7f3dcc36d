"""Accuracy by reasoning budget of checkpoints, measured with their own evaluator."""

import json

import pytest

from coprs_deploy import demo
from tests.scripts import load_script

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
