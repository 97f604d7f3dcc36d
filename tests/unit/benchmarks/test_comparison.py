"""Two reports: what is a regression, and what is noise."""

import json

import msgspec
import pytest

from coprs_deploy.benchmarks.comparison import (
    Tolerances,
    Verdict,
    compare_reports,
    machine_differences,
)
from coprs_deploy.benchmarks.report import Accuracy, Row
from coprs_deploy.cli.main import main
from tests.unit.benchmarks.sample_reports import report, row

STEADY = [[10.0, 10.1, 9.9, 10.0], [10.0, 10.05, 9.95, 10.0]]


def scaled(rounds, factor):
    return [[factor * run for run in part] for part in rounds]


def verdicts(old, new):
    return [f.verdict for f in compare_reports(report(old), report(new), Tolerances())]


@pytest.mark.parametrize(
    ("factor", "verdict"),
    [(1.0, Verdict.SAME), (1.04, Verdict.SAME), (1.2, Verdict.SLOWER), (0.8, Verdict.FASTER)],
)
def test_a_steady_row_is_judged_by_the_tolerance(factor, verdict):
    assert verdicts(row("a", STEADY), row("a", scaled(STEADY, factor))) == [verdict]


def test_a_change_within_the_noise_of_a_round_is_no_regression():
    noisy = [[10.0, 10.2, 10.1], [13.0, 13.1, 12.9]]
    assert verdicts(row("a", noisy), row("a", scaled(STEADY, 1.25))) == [Verdict.SAME]
    wide = [[8.0, 12.0, 16.0, 10.0, 15.0, 9.0, 12.0]]
    assert verdicts(row("a", wide), row("a", scaled(wide, 1.2))) == [Verdict.SAME]


def test_more_memory_less_accuracy_and_failures_are_regressions():
    found = verdicts(row("a", STEADY), row("a", STEADY, iou=0.9, memory=150_000_000))
    assert found == [Verdict.SAME, Verdict.LARGER, Verdict.LESS_EXACT]
    turned, straight = (
        Row("a", accuracy=Accuracy(inputs=4, mask_iou=1.0, concentration_cosine=cosine))
        for cosine in (0.99, 0.9999)
    )
    assert verdicts(straight, turned) == [Verdict.LESS_EXACT]
    assert verdicts(turned, straight) == [Verdict.SAME]
    assert verdicts(row("a", STEADY), Row("a", reason="broken")) == [Verdict.FAILS]
    assert verdicts(Row("a", reason="broken"), row("a", STEADY)) == [Verdict.REPAIRED]
    both = compare_reports(
        report(row("a", STEADY), row("c", STEADY)),
        report(row("b", STEADY), row("c", STEADY)),
        Tolerances(),
    )
    assert [f.verdict for f in both] == [Verdict.GONE, Verdict.SAME, Verdict.NEW]


def test_reports_without_a_common_row_are_refused():
    with pytest.raises(ValueError, match=r"share no row .*of the same suites"):
        verdicts(row("a", STEADY), row("b", STEADY))


def test_memory_of_a_started_process_is_its_own():
    old, new = (
        msgspec.structs.replace(row("a", STEADY), figures={"peak_bytes": peak})
        for peak in (100e6, 150e6)
    )
    assert verdicts(old, new) == [Verdict.SAME, Verdict.LARGER]


def test_a_row_is_the_same_whatever_the_version_of_its_library():
    old, new = (
        row("graph, onnxruntime 1.32.0 cpu", STEADY),
        row("graph, onnxruntime 1.33.1 cpu", STEADY),
    )
    assert verdicts(old, new) == [Verdict.SAME]


def test_another_machine_is_named():
    old, new = report(), report()
    assert machine_differences(old, new) == []
    data = new.to_json()
    data["machine"]["cores"] = 64
    data["ceilings"][0]["matmul_flops"]["fp32"] = 2e11
    found = machine_differences(old, type(new).from_json(data))
    assert found[0].startswith("cores: 2 then, 64 now")
    assert "100% faster" in found[1]


def test_the_command_line_sets_the_exit_code(tmp_path, capsys):
    for name, factor in (("old", 1.0), ("new", 1.5)):
        data = report(row("a", scaled(STEADY, factor))).to_json()
        (tmp_path / f"{name}.json").write_text(json.dumps(data))
    old, new = str(tmp_path / "old.json"), str(tmp_path / "new.json")
    assert main(["bench", "--compare", old, new]) == 1
    assert "SLOWER" in capsys.readouterr().out
    assert main(["bench", "--compare", new, old]) == 0
    assert main(["bench", "--compare", old, new, "--tolerance", "0.6"]) == 0
    assert main(["bench", "--compare", old, new, "--json"]) == 1
    capsys.readouterr()
    assert main(["bench", "--compare", old, str(tmp_path / "none.json")]) == 2
