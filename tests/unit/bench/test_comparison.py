"""Comparison of two reports: regressions and noise."""

import json

import msgspec
import pytest
from sample_reports import case, report

from coprs_deploy.bench.comparison import (
    compare_reports,
    machine_differences,
)
from coprs_deploy.bench.report import Accuracy, CaseResult
from coprs_deploy.cli.main import main

STEADY = [[10.0, 10.1, 9.9, 10.0], [10.0, 10.05, 9.95, 10.0]]


def scaled(rounds, factor):
    return [[factor * run for run in part] for part in rounds]


def verdicts(old, new):
    return [f.verdict for f in compare_reports(report(old), report(new))]


@pytest.mark.parametrize(
    ("factor", "verdict"),
    [(1.0, "same"), (1.04, "same"), (1.2, "slower"), (0.8, "faster")],
)
def test_compare_steady_case_applies_the_tolerance(factor, verdict):
    assert verdicts(case("a", STEADY), case("a", scaled(STEADY, factor))) == [verdict]


def test_compare_change_within_the_noise_is_no_regression():
    noisy = [[10.0, 10.2, 10.1], [13.0, 13.1, 12.9]]
    assert verdicts(case("a", noisy), case("a", scaled(STEADY, 1.25))) == ["same"]
    wide = [[8.0, 12.0, 16.0, 10.0, 15.0, 9.0, 12.0]]
    assert verdicts(case("a", wide), case("a", scaled(wide, 1.2))) == ["same"]


def test_compare_more_memory_less_accuracy_and_failures_are_regressions():
    found = verdicts(case("a", STEADY), case("a", STEADY, iou=0.9, memory=150_000_000))
    assert found == ["same", "more_memory", "less_accurate"]
    turned, straight = (
        CaseResult("a", accuracy=Accuracy(inputs=4, mask_iou_mean=1.0, concentration_cosine=cosine))
        for cosine in (0.99, 0.9999)
    )
    assert verdicts(straight, turned) == ["less_accurate"]
    assert verdicts(turned, straight) == ["same"]
    assert verdicts(case("a", STEADY), CaseResult("a", error="broken")) == ["fails"]
    assert verdicts(CaseResult("a", error="broken"), case("a", STEADY)) == ["fixed"]
    frontier = [
        CaseResult("20 tokens", accuracy=Accuracy(inputs=100, giou=0.9, precision_at_50=p))
        for p in (0.97, 0.95)
    ]
    assert verdicts(*frontier) == ["less_accurate"]
    assert verdicts(*frontier[::-1]) == ["same"]
    both = compare_reports(
        report(case("a", STEADY), case("c", STEADY)),
        report(case("b", STEADY), case("c", STEADY)),
    )
    assert [f.verdict for f in both] == ["removed", "same", "new"]


def test_compare_without_common_case_raises():
    with pytest.raises(ValueError, match=r"no case in common .*of the same suites"):
        verdicts(case("a", STEADY), case("b", STEADY))


def test_compare_uses_the_memory_of_a_started_process():
    old, new = (
        msgspec.structs.replace(case("a", STEADY), metrics={"peak_bytes": peak})
        for peak in (100e6, 150e6)
    )
    assert verdicts(old, new) == ["same", "more_memory"]


def test_compare_ignores_library_versions():
    old, new = (
        case("graph, onnxruntime 1.32.0 cpu", STEADY),
        case("graph, onnxruntime 1.33.1 cpu", STEADY),
    )
    assert verdicts(old, new) == ["same"]


def test_machine_differences_name_what_changed():
    old, new = report(), report()
    assert machine_differences(old, new) == []
    data = new.to_json()
    data["machine"]["cores"] = 64
    found = machine_differences(old, type(new).from_json(data))
    assert found == ["cores: 2 then, 64 now"]


def test_compare_command_sets_the_exit_code(tmp_path, capsys):
    for name, factor in (("old", 1.0), ("new", 1.5)):
        data = report(case("a", scaled(STEADY, factor))).to_json()
        (tmp_path / f"{name}.json").write_text(json.dumps(data))
    old, new = str(tmp_path / "old.json"), str(tmp_path / "new.json")
    assert main(["bench", "--compare", old, new]) == 1
    assert "slower" in capsys.readouterr().out
    assert main(["bench", "--compare", new, old]) == 0
    assert main(["bench", "--compare", old, new, "--tolerance", "0.6"]) == 0
    assert main(["bench", "--compare", old, new, "--json"]) == 1
    capsys.readouterr()
    assert main(["bench", "--compare", old, str(tmp_path / "none.json")]) == 2
