"""Runs on one machine: part files, what is kept, what is repeated, and COCO results."""

import json

import msgspec
import pytest
from pycocotools.coco import COCO

from coprs_deploy.batch import SegmentBatch
from coprs_deploy.batch import workers as workers_module
from coprs_deploy.batch.coco import image_id, write_coco
from coprs_deploy.batch.local import run_local
from coprs_deploy.batch.manifest import BatchManifest, BatchOutput
from coprs_deploy.batch.rows import read_part
from coprs_deploy.batch.sources import RowSource, SourceColumns
from coprs_deploy.batch.workers import WorkerSettings
from coprs_deploy.errors import ArtifactError
from coprs_deploy.runtime import RuntimeOptions

ROWS_PER_FILE = 4


class Run:
    """A run over a table of ten rows on five images, in parts of four, with fakes."""

    def __init__(self, folder, open_batch, monkeypatch):
        self.folder, self.segmented, self.progress = folder, [], []
        self.fail_after = None
        batch, self.runners = open_batch()
        monkeypatch.setattr(batch, "close", lambda: None)  # it serves several runs

        def segment(rows):
            if self.fail_after is not None and len(self.segmented) >= self.fail_after:
                raise KeyboardInterrupt
            self.segmented += [row.row for row in rows]
            return SegmentBatch.__call__(batch, rows)

        monkeypatch.setattr(WorkerSettings, "open", lambda settings: batch)
        monkeypatch.setattr(workers_module.Workers, "_run", lambda workers, rows: segment(rows))
        monkeypatch.setattr("coprs_deploy.batch.local.ROWS_PER_TASK", 2)

    def output(self, **changes):
        source = RowSource(str(self.folder / "rows.jsonl"), SourceColumns())
        manifest = BatchManifest("bundle", source.fingerprint, {}, source.num_rows, ROWS_PER_FILE)
        return source, BatchOutput(
            self.folder / "out", msgspec.structs.replace(manifest, **changes)
        )

    def __call__(self, *, resume=False, retry_failed=False):
        source, output = self.output()
        settings = WorkerSettings(None, RuntimeOptions())
        with output.opened(resume=resume or retry_failed):
            return run_local(
                source,
                output,
                settings,
                1,
                retry_failed=retry_failed,
                on_progress=lambda done, total: self.progress.append((done, total)),
            )

    def rows(self):
        """Return the rows of all parts without their timings."""
        found = [row for path in self.parts() for row in read_part(path)]
        return [msgspec.structs.replace(row, timings={}) for row in found]

    def parts(self):
        return sorted((self.folder / "out").glob("part-*.parquet"))


@pytest.fixture
def run(tmp_path, images, open_batch, monkeypatch):
    names = ["a.png", "b.jpg", "missing.png", "c.png", "a.png"]
    lines = [
        {"image": f"images/{name}", "instruction": f"ask {turn}", "image_id": number}
        for turn in range(2)
        for number, name in enumerate(names)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return Run(tmp_path, open_batch, monkeypatch)


def test_every_row_is_in_one_part_in_the_order_of_the_source(run):
    summary = run()
    assert [len(read_part(path)) for path in run.parts()] == [4, 4, 2]
    assert [row.row for row in run.rows()] == list(range(10))
    assert [row.instruction for row in run.rows()] == ["ask 0"] * 5 + ["ask 1"] * 5
    assert (summary.num_rows, summary.num_done, summary.num_failed) == (10, 10, 2)
    assert summary.errors["FileNotFoundError"][0] == 2
    assert "row 2: " in summary.errors["FileNotFoundError"][1]
    assert run.progress[-1] == (10, 10)
    assert not list((run.folder / "out").glob(".*part*"))


@pytest.mark.parametrize("after", range(1, 8, 2))
def test_resumed_run_segments_only_what_is_missing(run, after):
    run.fail_after = after
    with pytest.raises(KeyboardInterrupt):
        run()
    kept = [row.row for row in run.rows()]
    run.fail_after, run.segmented = None, []
    summary = run(resume=True)
    assert sorted(kept + run.segmented) == list(range(10))
    assert (summary.num_kept, summary.num_done, summary.num_failed) == (
        len(kept),
        10 - len(kept),
        2,
    )
    assert [row.row for row in run.rows()] == list(range(10))


def test_resumed_run_equals_an_uninterrupted_one(run):
    run()
    expected = run.rows()
    run.parts()[1].unlink()
    (run.folder / "out" / ".part-00001.parquet.new-99999999-0").write_bytes(b"left by a killed run")
    run(resume=True)
    assert run.rows() == expected
    assert not list((run.folder / "out").glob(".*new*"))


def test_complete_run_is_not_repeated(run):
    run()
    before = [path.stat().st_mtime_ns for path in run.parts()]
    run.segmented = []
    summary = run(resume=True)
    assert (run.segmented, summary.num_kept, summary.num_failed) == ([], 10, 2)
    assert [path.stat().st_mtime_ns for path in run.parts()] == before


def test_retry_repeats_failed_rows_only(run, images):
    run()
    expected = [row for row in run.rows() if not row.error]
    (images / "missing.png").write_bytes((images / "a.png").read_bytes())
    run.segmented = []
    summary = run(retry_failed=True)
    assert sorted(run.segmented) == [2, 7]
    assert (summary.num_kept, summary.num_done, summary.num_failed) == (8, 2, 0)
    assert [row.row for row in run.rows()] == list(range(10))
    assert [row for row in run.rows() if row.row not in (2, 7)] == expected
    assert all(row.found for row in run.rows())


def test_resume_without_a_run_starts_one(run):
    assert run(resume=True).num_done == 10


def test_existing_run_is_refused_without_resume(run):
    run()
    with pytest.raises(ArtifactError, match="pass --resume"):
        run()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows_per_file": 5}, "rows_per_file was 4 and is 5"),
        ({"bundle": "other"}, "bundle was 'bundle' and is 'other'"),
        ({"source": "other"}, "source was "),
        ({"options": {"max_targets": 2}}, "max_targets was None and is 2"),
    ],
)
def test_another_run_is_refused(run, changes, message):
    run()
    _, output = run.output(**changes)
    with pytest.raises(ArtifactError, match=message), output.opened(resume=True):
        pass


def test_folder_with_other_files_is_refused(run):
    (run.folder / "out").mkdir()
    (run.folder / "out" / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"no manifest\.json"):
        run(resume=True)


def test_part_of_another_run_is_refused(run):
    run()
    parts = run.parts()
    parts[1].write_bytes(parts[2].read_bytes())
    with pytest.raises(ArtifactError, match="belongs to another run"):
        run(resume=True)
    parts[1].write_bytes(b"damaged")
    with pytest.raises(ArtifactError, match="cannot be read as a part file"):
        run(resume=True)


def test_two_runs_in_one_folder_are_refused(run):
    _, output = run.output()
    _, other = run.output()
    with (
        output.opened(resume=False),
        pytest.raises(ArtifactError, match="being written by another process"),
        other.opened(resume=True),
    ):
        pass


def test_damaged_manifest_is_refused(run):
    run()
    (run.folder / "out" / "manifest.json").write_text("{}")
    with pytest.raises(ArtifactError, match="no manifest of a batch run"):
        run(resume=True)


def test_coco_results_are_read_by_pycocotools(run, tmp_path):
    run()
    _, output = run.output()
    path = tmp_path / "results.json"
    assert write_coco(path, output.rows()) == 8
    dataset = COCO()
    dataset.dataset = {"images": [{"id": n, "width": 30, "height": 20} for n in range(5)]}
    dataset.dataset |= {"annotations": [], "categories": [{"id": 1, "name": "object"}]}
    dataset.createIndex()
    found = dataset.loadRes(str(path))
    assert sorted(found.getImgIds()) == [0, 1, 2, 3, 4]
    assert {each["image_id"] for each in found.anns.values()} == {0, 1, 3, 4}
    assert all(each["area"] == 600 for each in found.anns.values())


def test_coco_results_without_a_mask_are_an_empty_list(tmp_path):
    assert write_coco(tmp_path / "results.json", []) == 0
    assert json.loads((tmp_path / "results.json").read_text()) == []


@pytest.mark.parametrize(
    ("text", "expected"), [("9", 9), ("0", 0), ("009", "009"), ("a.png", "a.png"), ("", "")]
)
def test_image_id_is_a_number_where_it_is_one(text, expected):
    assert image_id(text) == expected
