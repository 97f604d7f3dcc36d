"""The verb ``batch``: options, exit codes, summary, and what it refuses before the work."""

import json
import sys

import pytest

from coprs_deploy import demo
from coprs_deploy.batch.rows import read_part
from coprs_deploy.batch.workers import WorkerSettings, default_num_workers
from coprs_deploy.bundle import open_bundle
from coprs_deploy.cli.batch import _duration
from coprs_deploy.cli.main import main
from coprs_deploy.runtime import RuntimeOptions


@pytest.fixture
def fakes(open_batch, monkeypatch):
    """Let one worker be a batch of fakes; return the settings that it was opened with."""
    opened = []

    def opener(settings):
        opened.append(settings)
        batch, _ = open_batch(max_targets=settings.max_targets, mask_folder=settings.mask_folder)
        return batch

    monkeypatch.setattr(WorkerSettings, "open", opener)
    return opened


def run(capsys, *arguments):
    code = main(["batch", *map(str, arguments), "--workers", "1"])
    return code, capsys.readouterr()


def test_folder_is_segmented_and_exported(fakes, images, tmp_path, capsys):
    out, coco = tmp_path / "out", tmp_path / "results.json"
    arguments = (images, "--instruction", "a ring", "--max-targets", 2, "--save-masks")
    code, shown = run(capsys, *arguments, "--out", out, "--coco", coco, "--json")
    assert code == 0
    report = json.loads(shown.out)
    assert (report["num_rows"], report["num_done"], report["num_failed"]) == (5, 5, 0)
    rows = read_part(out / "part-00000.parquet")
    assert [row.image for row in rows] == ["a.png", "b.jpg", "c.png", "d.png", "more/e.png"]
    assert len(json.loads(coco.read_text())) == 10
    assert len(list((out / "masks").glob("*.png"))) == 10
    assert fakes[0].max_targets == 2


def test_finished_run_is_exported_for_other_tools(fakes, images, tmp_path, capsys):
    arguments = (images, "--instruction", "a ring", "--out", tmp_path / "out")
    assert run(capsys, *arguments)[0] == 0
    tasks, dataset = tmp_path / "tasks.json", tmp_path / "dataset"
    exports = ("--resume", "--fiftyone", dataset, "--label-studio", tasks)
    assert run(capsys, *arguments, *exports)[0] == 0
    samples = json.loads((dataset / "samples.json").read_text())["samples"]
    assert [sample["filepath"] for sample in samples] == [
        str(images / name) for name in ("a.png", "b.jpg", "c.png", "d.png", "more/e.png")
    ]
    found = [task["data"]["image"] for task in json.loads(tasks.read_text())]
    assert found[4] == "/data/local-files/?d=more/e.png"
    assert '<Label value="a ring"/>' in tasks.with_suffix(".xml").read_text()
    assert run(capsys, *arguments, *exports, "--image-root", "s3://bucket")[0] == 0
    assert json.loads(tasks.read_text())[0]["data"]["image"] == "s3://bucket/a.png"


def test_failed_row_is_exit_code_1_with_the_first_error(fakes, images, tmp_path, capsys):
    (images / "broken.png").write_bytes(b"no image")
    arguments = (images, "--instruction", "a ring", "--out", tmp_path / "out")
    code, shown = run(capsys, *arguments)
    assert code == 1
    assert "1 rows failed with ImageDecodeError; row 2: " in shown.err
    assert ["failed", "1"] in [line.split() for line in shown.out.splitlines()]
    code, shown = run(capsys, *arguments)
    assert (code, "pass --resume" in shown.err) == (2, True)
    code, shown = run(capsys, *arguments, "--resume", "--json")
    assert (code, json.loads(shown.out)["num_kept"]) == (1, 6)
    (images / "broken.png").write_bytes((images / "a.png").read_bytes())
    code, shown = run(capsys, *arguments, "--retry-failed")
    assert code == 0
    (images / "broken.png").unlink()
    code, shown = run(capsys, *arguments, "--resume")
    assert (code, "source was" in shown.err) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-targets", "0"], "max_targets is 0"),
        (["--rows-per-file", "0"], "rows_per_file is 0"),
        (["--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["--instruction-column", "ask"], "one of the two"),
        (["--bundle", "nowhere"], "there is no bundle at nowhere"),
    ],
)
def test_wrong_use_is_refused_before_the_work(images, tmp_path, capsys, arguments, message):
    code, shown = run(capsys, images, "--instruction", "a", "--out", tmp_path / "out", *arguments)
    assert code == 2
    assert message in shown.err
    assert not (tmp_path / "out").exists()


def test_missing_pyarrow_is_found_before_the_work(images, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    code, shown = run(capsys, images, "--instruction", "a", "--out", tmp_path / "out")
    assert (code, 'pip install -e ".[batch]"' in shown.err) == (2, True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--replicas", "2"], "--replicas is given; accepted: with --engine ray only"),
        (["--ray-address", "auto"], "--ray-address is given; accepted: with --engine ray only"),
        (["--engine", "ray", "--workers", "1"], "accepted: with --engine local only"),
        (["--engine", "ray", "--replicas", "2:1"], "max_replicas is 1"),
        (["--engine", "ray"], 'pip install -e ".[ray]"'),
    ],
)
def test_engine_and_its_options_are_checked_before_the_work(
    images, tmp_path, capsys, monkeypatch, arguments, message
):
    monkeypatch.setitem(sys.modules, "ray", None)
    out = tmp_path / "out"
    given = ["batch", str(images), "--instruction", "a", "--out", str(out), *arguments]
    assert main(given) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_small_bundle_has_one_worker_a_core_on_the_cpu_only(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1, 2})
    bundle = open_bundle(demo.BUNDLE)
    assert default_num_workers(bundle, RuntimeOptions()) == 3
    assert default_num_workers(bundle, RuntimeOptions(policy="vllm")) == 1
    assert default_num_workers(bundle, RuntimeOptions(device="cuda")) == 1
    assert default_num_workers(bundle, RuntimeOptions(policy_device="cuda:1")) == 1
    monkeypatch.setattr("coprs_deploy.batch.workers.SMALL_BUNDLE_BYTES", 1_000_000)
    assert default_num_workers(bundle, RuntimeOptions()) == 1


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00:00"), (75, "0:01:15"), (90_061, "25:01:01")]
)
def test_duration_is_hours_minutes_and_seconds(seconds, text):
    assert _duration(seconds) == text
