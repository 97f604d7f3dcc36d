"""Report of distilled encoders: rows of runs, goals, plot."""

import json

import pytest

from tests.scripts import load_script

distilled_encoders = load_script("benchmarks/distilled_encoders.py")

TEACHER = {"encoder": "SAM ViT, width 96, 3 blocks", "parameters": 400_000}


def write_run(folder, name, seed, multiply_adds, giou, held_out="a", family="vit"):
    run = folder / name
    run.mkdir()
    metrics = dict.fromkeys(distilled_encoders.METRICS, 0.5) | {"giou": giou, "teacher_giou": 0.96}
    stage = {"steps": 10, "metrics": metrics}
    student = {"encoder": "SAM ViT, width 48", "parameters": 90_000, "multiply_adds": multiply_adds}
    report = {
        "recipe": {"seed": seed, "model": {"image_encoder": {"family": family}}},
        "encoders": {"teacher": TEACHER | {"multiply_adds": 120_000_000}, "student": student},
        "minutes": 8.0,
        "stages": {"embedding": stage, "decoding": stage},
    }
    (run / "report.json").write_text(json.dumps(report))
    (run / "environment.json").write_text(json.dumps({"processor": "none"}))
    inputs = {"images": {"examples": 100}, "held_out": {"examples": 10, "hash": held_out}}
    (run / "inputs.json").write_text(json.dumps(inputs))
    return str(run)


def test_report_states_for_each_small_student_whether_it_keeps_the_giou(tmp_path, capsys):
    runs = [
        write_run(tmp_path, "third", 0, 39_000_000, 0.955),
        write_run(tmp_path, "quarter", 1, 30_000_000, 0.94, family="tiny_vit"),
        write_run(tmp_path, "large", 0, 80_000_000, 0.958),
    ]
    assert distilled_encoders.main([*runs, "--out", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line.rpartition(": ")[2] for line in lines] == ["missed", "reached"]
    assert lines[1].startswith("third, seed 0: 0.325 of the multiply-adds, gIoU 0.0050 below")
    text = (tmp_path / "out/distilled-encoders.md").read_text()
    assert text.index("| quarter |") < text.index("| third |") < text.index("| large |")
    assert (tmp_path / "out/distilled-encoders.png").stat().st_size > 1000
    rows = json.loads((tmp_path / "out/distilled-encoders.json").read_text())["rows"]
    assert rows[0]["share"] == 0.25


def test_runs_on_other_held_out_examples_are_refused(tmp_path):
    runs = [
        write_run(tmp_path, "one", 0, 39_000_000, 0.955),
        write_run(tmp_path, "two", 1, 39_000_000, 0.955, held_out="b"),
    ]
    with pytest.raises(SystemExit):
        distilled_encoders.main([*runs, "--out", str(tmp_path / "out")])
