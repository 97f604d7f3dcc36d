"""The verb ``evaluate``, and what each verb that reads example files says of invalid rows."""

import json

import pytest

from coprs_deploy import demo
from coprs_deploy.cli.main import main
from coprs_deploy.data.examples import write_examples
from coprs_deploy.data.synthetic import PLAIN, SceneExamples


@pytest.fixture
def partly_valid(tmp_path):
    """Return a file of four lines: two valid rows, one blank line, one row without an image."""
    path = tmp_path / "rows.jsonl"
    write_examples(path, SceneExamples(PLAIN, 2))
    first, second = path.read_text().splitlines()
    path.write_text(f'{first}\n\n{{"id": 1, "instruction": "a", "masks": []}}\n{second}\n')
    return path


@pytest.mark.filterwarnings("ignore:.*rows are invalid and skipped:UserWarning")
@pytest.mark.parametrize("verb", ["evaluate", "features"])
def test_json_output_lists_the_skipped_rows(verb, partly_valid, tmp_path, capsys):
    if verb == "evaluate":
        arguments = ["evaluate", "--examples", str(partly_valid)]
    else:
        arguments = ["features", str(demo.CHECKPOINT), str(partly_valid), "--out"]
        arguments.append(str(tmp_path / "features"))
    assert main([*arguments, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    report = shown if verb == "evaluate" else shown["files"][0]
    (row,) = report["skipped_rows"]
    assert (row["row"], row["column"], report["num_rows"]) == (3, "image", 3)
    assert "exactly one of image and image_path; it has neither" in row["reason"]
    if verb == "evaluate":
        assert shown["dataset"] == "2 examples of rows.jsonl, 1 skipped"
        assert 0 <= shown["metrics"]["giou"] <= 1


@pytest.mark.parametrize("verb", ["evaluate", "features"])
def test_file_without_a_valid_row_fails(verb, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": "a"}\n' * 3)
    arguments = {
        "evaluate": ["evaluate", "--examples", str(path)],
        "features": ["features", str(demo.CHECKPOINT), str(path), "--out", str(tmp_path / "out")],
    }
    assert main([*arguments[verb], "--json"]) == 1
    shown = json.loads(capsys.readouterr().out)
    assert "3 of 3 rows are invalid" in shown["error"] and shown["type"] == "NoValidRowError"
    assert not (tmp_path / "out").exists()


def test_output_that_cannot_be_written_is_refused_before_the_work(tmp_path, capsys, monkeypatch):
    monkeypatch.delattr("coprs_deploy.cli.evaluate.open_runtime")
    out = tmp_path / "file"
    out.write_text("kept")
    assert main(["evaluate", "--num-examples", "1", "--out", str(out)]) == 2
    assert f"{out}: Not a directory" in capsys.readouterr().err
    assert out.read_text() == "kept"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("miou=0.2", "did you mean giou?"),
        ("no_match_precision=0.5", "undefined for these examples: there is no no-match example"),
        ("ordinal.giou=0.5", "question types: attribute"),
    ],
)
def test_threshold_is_refused_before_the_work(setting, message, tmp_path, capsys, monkeypatch):
    def open_runtime(*_):
        raise AssertionError("the bundle was opened")

    monkeypatch.setattr("coprs_deploy.cli.evaluate.open_runtime", open_runtime)
    path = tmp_path / "rows.jsonl"
    found = [e for e in SceneExamples(PLAIN, 9) if e.question_type == "attribute"]
    write_examples(path, found)
    out = tmp_path / "out"
    arguments = ["evaluate", "--examples", str(path), "--out", str(out), "--require", setting]
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()
