"""The verb ``evaluate``, and what each verb that reads example files says of invalid rows."""

import json

import pytest

from coprs_deploy import demo
from coprs_deploy.cli.main import main
from coprs_deploy.data.examples import write_examples
from coprs_deploy.data.synthetic import PLAIN, SceneExamples
from tests.unit.data.readers.layouts import Refer


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
        arguments = ["evaluate", "--dataset", str(partly_valid)]
    else:
        arguments = ["features", str(demo.CHECKPOINT), str(partly_valid), "--out"]
        arguments.append(str(tmp_path / "features"))
    assert main([*arguments, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    report = shown["datasets"]["rows.jsonl"] if verb == "evaluate" else shown["files"][0]
    (row,) = report["skipped_rows"]
    assert (row["row"], row["column"], report["num_rows"]) == (3, "image", 3)
    assert "exactly one of image and image_path; it has neither" in row["reason"]
    if verb == "evaluate":
        assert report["dataset"] == "2 examples of rows.jsonl, 1 skipped"
        assert 0 <= report["metrics"]["giou"]["value"] <= 1


@pytest.mark.parametrize("verb", ["evaluate", "features"])
def test_file_without_a_valid_row_fails(verb, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": "a"}\n' * 3)
    arguments = {
        "evaluate": ["evaluate", "--dataset", str(path)],
        "features": ["features", str(demo.CHECKPOINT), str(path), "--out", str(tmp_path / "out")],
    }
    assert main([*arguments[verb], "--json"]) == 1
    shown = json.loads(capsys.readouterr().out)
    assert "3 of 3 rows are invalid" in shown["error"] and shown["type"] == "NoValidRowError"
    assert not (tmp_path / "out").exists()


def test_output_that_cannot_be_written_is_refused_before_the_work(tmp_path, capsys, monkeypatch):
    monkeypatch.delattr("coprs_deploy.cli.evaluation_workers.open_runtime")
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

    monkeypatch.setattr("coprs_deploy.cli.evaluation_workers.open_runtime", open_runtime)
    path = tmp_path / "rows.jsonl"
    found = [e for e in SceneExamples(PLAIN, 9) if e.question_type == "attribute"]
    write_examples(path, found)
    out = tmp_path / "out"
    arguments = ["evaluate", "--dataset", str(path), "--out", str(out), "--require", setting]
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_evaluate_of_a_data_set_equals_that_of_the_same_examples_in_a_file(tmp_path, capsys):
    examples = list(SceneExamples(PLAIN, 3))
    write_examples(tmp_path / "scenes.jsonl", examples)
    builder = Refer(tmp_path / "data", image_folder="images")
    for number, example in enumerate(examples, start=1):
        builder.add_example(number, example, "testA")
    builder.write()
    metrics = []
    for source in ("refcoco:testA", tmp_path / "scenes.jsonl"):
        arguments = ["evaluate", "--dataset", source, "--root", tmp_path / "data", "--json"]
        arguments += ["--protocol", "targets", "--policy", "openvino"]
        assert main([*map(str, arguments)]) == 0
        (shown,) = json.loads(capsys.readouterr().out)["datasets"].values()
        assert shown["dataset"].startswith("3 examples of ")
        metrics.append(shown["metrics"])
    assert metrics[0] == metrics[1]
    assert metrics[0]["giou"]["value"] > 0


def test_features_and_training_take_a_data_set(tmp_path, capsys, monkeypatch):
    from coprs_deploy.training.examples import open_data
    from coprs_deploy.training.recipe import load_recipe

    builder = Refer(tmp_path / "data", image_folder="images")
    for number, example in enumerate(SceneExamples(PLAIN, 2), start=1):
        builder.add_example(number, example, "train")
        builder.refs[-1]["sentences"].append({"sent_id": 100 + number, "sent": "it"})
    builder.write()
    out = tmp_path / "features"
    arguments = ["features", demo.CHECKPOINT, "refcoco:train", "--root", tmp_path / "data"]
    assert main([*map(str, arguments), "--out", str(out), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["num_images"], shown["num_examples"]) == (2, 4)
    monkeypatch.setenv("COPRS_DEPLOY_DATA", str(tmp_path / "data"))
    text = '[data]\nkind = "examples"\ntraining = "refcoco:train"\nheld_out = "refcoco:train"\n'
    (tmp_path / "recipe.toml").write_text(f'base = "grpo_demo"\n{text}features = "{out}"\n')
    opened = open_data(load_recipe(str(tmp_path / "recipe.toml"), []))
    assert len(opened.training) == opened.contents["data.training"]["examples"] == 4


def test_root_without_a_data_set_is_refused(tmp_path, capsys):
    assert main(["evaluate", "--root", str(tmp_path)]) == 2
    assert "name one with --dataset" in capsys.readouterr().err
