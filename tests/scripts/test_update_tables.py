"""Tables of README and docs, written from the committed reports."""

import json
from pathlib import Path

import msgspec
import pytest

from coprs_deploy.bench.render import write_outputs
from coprs_deploy.bench.report import read_report
from tests.scripts import load_script

ROOT = Path(__file__).parents[2]

update_tables = load_script("benchmarks/update_tables.py")


def test_tables_of_readme_and_docs_are_those_of_the_committed_reports():
    assert update_tables.stale_files(ROOT) == {}, "python benchmarks/update_tables.py"


def test_readme_table_compares_with_a_peer_in_few_rows():
    lines = update_tables.readme_table(ROOT, ROOT)
    assert 6 <= len(lines) - 2 <= 8
    assert any("segment-anything" in line for line in lines)


def test_replace_table_keeps_the_text_around_the_markers():
    text = "a\n<!-- speed:begin -->\nold\n<!-- speed:end -->\nb\n"
    new = update_tables.replace_table(text, "speed", ["| x |"])
    assert new == "a\n<!-- speed:begin -->\n\n| x |\n\n<!-- speed:end -->\nb\n"
    assert update_tables.replace_table(new, "speed", ["| x |"]) == new
    with pytest.raises(ValueError, match="markers"):
        update_tables.replace_table("nothing", "speed", [])


def test_latest_takes_the_best_machine_and_its_newest_report(tmp_path):
    folder = tmp_path / update_tables.REPORTS
    (path,) = (ROOT / update_tables.REPORTS).glob("precision-*.json")
    base = msgspec.structs.replace(read_report(path), tag="demo")

    def made(kind, date, gpu=None):
        machine = msgspec.structs.replace(base.machine, kind=kind, gpu=gpu)
        return msgspec.structs.replace(base, machine=machine, date=date)

    kinds = ("cpu-16-cores-avx512", "cpu-2-cores-avx2")
    days = ("2026-01-01", "2026-02-02")
    wide, narrow = ([made(kind, day) for day in days] for kind in kinds)
    assert update_tables.latest(tmp_path, "demo") is None
    for number, report in enumerate((narrow[1], narrow[0], wide[1], wide[0])):
        write_outputs(folder, report)
        assert update_tables.latest(tmp_path, "demo") == (narrow[1] if number < 2 else wide[1])
    on_gpu = made("a-gpu", "2025-12-12", gpu="A GPU (sm_90)")
    write_outputs(folder, on_gpu)
    assert update_tables.latest(tmp_path, "demo") == on_gpu
    assert update_tables.latest(tmp_path, "full-size") is None


def test_encoder_times_has_a_row_for_each_encoder_and_a_column_for_each_graph(tmp_path):
    folder = tmp_path / update_tables.REPORTS
    folder.mkdir(parents=True)
    assert update_tables.encoder_times(tmp_path, tmp_path / "docs") == []
    row = {"runtime": "openvino", "precision": "fp32", "median_ms": 560.0, "peak_bytes": 6e8}
    rows = [row | {"encoder": "vit_h"}, row | {"encoder": "tinyvit_5m", "precision": "int8"}]
    machine = {"processor": "a processor", "cores": 2}
    (folder / "image-encoders.json").write_text(json.dumps({"machine": machine, "rows": rows}))
    lines = update_tables.encoder_times(tmp_path, tmp_path / "docs")
    assert "(../benchmarks/reports/image-encoders.md)" in lines[0]
    assert lines[2].startswith("| image encoder | OpenVINO fp32 | OpenVINO int8 |")
    assert [line.split(" | ")[1:] for line in lines[4:]] == [
        ["560 ms, 600 MB", "- |"],
        ["-", "560 ms, 600 MB |"],
    ]


def test_cpu_speed_names_the_machines_and_links_their_reports(tmp_path):
    folder = tmp_path / "docs"
    assert update_tables.cpu_speed(tmp_path, folder)[-1].endswith(" |")
    path = tmp_path / update_tables.REPORTS
    path.mkdir(parents=True)
    for kind, speed in (("cpu-2-cores-avx2", 1.26), ("cpu-4-cores-avx512", 4.56)):
        cases = {"3b openvino int8": {"tokens_per_second": speed}}
        machine = {"processor": "A CPU", "cores": int(kind[4]), "kind": kind}
        report = {"machine": machine, "cases": cases}
        file = path / f"{update_tables.REAL_SIZES}-{kind}.json"
        file.write_text(json.dumps(report), encoding="utf-8")
    lines = update_tables.cpu_speed(tmp_path, folder)
    assert lines[0].endswith("| 4 cores, avx512 (m) | 2 cores, avx2 (m) |")
    assert [line for line in lines if line.endswith("| 4.6 | 1.3 |")] == [lines[3]]
    link = "[report](../benchmarks/reports/real-size-policy-cpu-"
    assert lines[-1] == (
        f"Measured with random weights on: A CPU, 4 cores, avx512 ({link}4-cores-avx512.md)); "
        f"A CPU, 2 cores, avx2 ({link}2-cores-avx2.md))."
    )
