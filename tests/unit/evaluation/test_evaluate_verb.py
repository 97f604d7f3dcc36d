"""The verb ``evaluate``, and what each verb that reads example files says of invalid rows."""

import itertools
import json
from contextlib import nullcontext

import pytest

from coprs_deploy import demo
from coprs_deploy.cli.main import main
from coprs_deploy.data.examples import write_examples
from coprs_deploy.data.synthetic import PLAIN, SceneExamples
from coprs_deploy.evaluation.rows import read_rows
from tests.unit.data.readers.layouts import Refer
from tests.unit.evaluation.fake_source import result_of


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
        arguments = ["evaluate", "--dataset", str(partly_valid), "--policy", "openvino"]
    else:
        arguments = ["features", str(demo.CHECKPOINT), str(partly_valid), "--out"]
        arguments.append(str(tmp_path / "features"))
    assert main([*arguments, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    found = shown["datasets"]["rows.jsonl"] if verb == "evaluate" else None
    report = shown["files"][0] if found is None else found["source"]
    (row,) = report["skipped_rows"]
    assert (row["row"], row["column"], report["num_rows"]) == (3, "image", 3)
    assert "exactly one of image and image_path; it has neither" in row["reason"]
    if verb == "evaluate":
        assert report["dataset"] == "2 examples of rows.jsonl, 1 skipped"
        assert 0 <= found["metrics"]["giou"]["value"] <= 1
        assert (found["num_rows"], found["protocol"]) == (2, "targets")


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
        assert shown["source"]["dataset"].startswith("3 examples of ")
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
    opened = open_data(load_recipe(str(tmp_path / "recipe.toml"), []), [])
    assert len(opened.training) == len(opened.contents["data.training"].rows) == 4


def test_root_without_a_data_set_is_refused(tmp_path, capsys):
    assert main(["evaluate", "--root", str(tmp_path)]) == 2
    assert "name one with --dataset" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--protocol", "liza"], "accepted: lisa, seg_zero, coprs, grefcoco, targets"),
        (["--workers", "0"], "workers is 0; it must be at least 1"),
        (["--overwrite"], "--overwrite removes the rows in --out; name that directory"),
        (["--require", "n_acc=1"], "the protocol targets does not have it"),
        (["--dataset", "other/rows.jsonl", "other/rows.jsonl"], "rows.jsonl is given twice"),
    ],
)
def test_wrong_options_are_refused_before_the_work(
    arguments, message, tmp_path, capsys, monkeypatch
):
    monkeypatch.delattr("coprs_deploy.cli.evaluation_workers.open_runtime")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    for folder in (".", "other"):
        write_examples(tmp_path / folder / "rows.jsonl", SceneExamples(PLAIN, 2))
    assert main(["evaluate", *arguments]) == 2
    assert message in capsys.readouterr().err


class FakeRuntime:
    """Segments the pixels of the brightest channel; counts its calls."""

    description, concurrency = "fake", 1

    def __init__(self):
        self.requests = []

    def check_image(self, image):
        pass

    def segment(self, image, instruction, max_targets):
        self.requests.append((hash(image.tobytes()), instruction))
        height, width = image.shape[:2]
        masks = [range(width, 3 * width)]
        return result_of(masks, masks, (height, width))


@pytest.fixture
def runtime(monkeypatch):
    fake = FakeRuntime()
    monkeypatch.setattr(
        "coprs_deploy.cli.evaluation_workers.open_runtime", lambda *_: nullcontext(fake)
    )
    return fake


@pytest.fixture
def data(tmp_path):
    """Return the root of RefCOCO (with an empty annotation) and gRefCOCO (with no target)."""
    for dataset, several in (("refcoco", False), ("grefcoco", True)):
        builder = Refer(tmp_path / "data", dataset)
        for number, form in enumerate(("polygon", "empty list", "compressed RLE")):
            for image_id in (1, 2):
                ann_id = builder.annotate(image_id, form)
                sentences = (f"The {number} of {image_id}", "It")
                builder.refer(image_id, [ann_id] if several else ann_id, "val", *sentences)
        builder.refer(1, [-1] if several else ann_id - 7, "testA", "Nothing")
        builder.write()
    return tmp_path / "data"


def test_several_data_sets_have_rows_and_metrics_each(runtime, data, tmp_path, capsys):
    sources = ["refcoco:val", "refcoco:testA", "grefcoco:val", "grefcoco:testA"]
    arguments = ["evaluate", "--dataset", *sources, "--root", str(data), "--json"]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
    shown = json.loads(capsys.readouterr().out)["datasets"]
    assert {name: each["protocol"] for name, each in shown.items()} == {
        **dict.fromkeys(sources[:2], "lisa"),
        **dict.fromkeys(sources[2:], "grefcoco"),
    }
    assert [each["num_rows"] for each in shown.values()] == [12, 1, 12, 1]
    assert shown["grefcoco:testA"]["metrics"]["n_acc"]["value"] == 0
    assert shown["refcoco:val"]["groups"]["num_same_class"].keys() == {"2"}
    rows = read_rows(tmp_path / "out/refcoco-val/rows.jsonl")
    assert [row.index for row in rows] == list(range(12))
    assert {row.instruction for row in rows[:2]} == {"the 0 of 1", "it"}
    assert [row.num_targets for row in rows] == [1] * 12, "an empty annotation is a target"
    found = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert found["datasets"]["refcoco:val"]["metrics"] == shown["refcoco:val"]["metrics"]


def test_files_of_one_name_in_two_folders_are_two_data_sets(runtime, tmp_path, capsys):
    paths = [tmp_path / folder / "rows.jsonl" for folder in ("one", "two")]
    for number, path in enumerate(paths, start=1):
        path.parent.mkdir()
        write_examples(path, SceneExamples(PLAIN, number))
    sources = list(map(str, paths))
    assert main(["evaluate", "--dataset", *sources, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["datasets"]
    assert {name: each["num_rows"] for name, each in shown.items()} == dict(
        zip(sources, (1, 2), strict=True)
    )


def test_sentences_on_an_image_are_neighbors_and_nothing_is_evaluated_twice(
    runtime, data, tmp_path, capsys
):
    arguments = ["evaluate", "--dataset", "refcoco:val", "--root", str(data)]
    arguments += ["--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    images = [image for image, _ in runtime.requests[:12]]
    assert sum(a != b for a, b in itertools.pairwise(images)) == 1
    shown = len(list((tmp_path / "out/refcoco-val/gallery").glob("*-prior.webp")))
    assert len(runtime.requests) == 12 + shown, "each example of a gallery once more"
    before = (tmp_path / "out/report.md").read_bytes()
    assert main(arguments) == 0
    assert len(runtime.requests) == 12 + shown
    assert (tmp_path / "out/report.md").read_bytes() == before
    assert main([*arguments, "--protocol", "coprs"]) == 2
    message = capsys.readouterr().err
    assert "datasets.refcoco:val.protocol.name is 'lisa' there and 'coprs' now" in message
    runtime.requests.clear()
    assert main([*arguments, "--protocol", "coprs", "--overwrite"]) == 0
    shown = len(list((tmp_path / "out/refcoco-val/gallery").glob("*-prior.webp")))
    assert len(runtime.requests) == 6 + shown, "the first sentence of each reference"


def test_threshold_holds_for_each_data_set(runtime, data, capsys):
    arguments = ["evaluate", "--dataset", "refcoco:val", "refcoco:testA", "--root", str(data)]
    assert main([*arguments, "--require", "giou=0.99"]) == 1
    message = capsys.readouterr().err
    assert "refcoco:val: giou is" in message and "refcoco:testA: giou is" in message
