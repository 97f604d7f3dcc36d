"""Rows on disk that survive a kill at any moment."""

import json
import subprocess
import sys

import pytest

from coprs_deploy.errors import ArtifactError
from coprs_deploy.evaluation.protocols import LISA, TARGETS
from coprs_deploy.evaluation.rows import EvaluationRow, encode_row, read_rows
from coprs_deploy.evaluation.runner import EvaluationTask
from coprs_deploy.evaluation.store import EvaluationStore, RowFile, evaluation_identity
from coprs_deploy.evaluation.summary import summarize_dataset
from tests.unit.evaluation.fake_source import FakeSource, example_of


def row(index):
    return EvaluationRow(
        index=index, id=str(index), num_targets=1, num_found=0, mask=None, prior=None
    )


@pytest.fixture
def tasks(tmp_path):
    path = tmp_path / "annotations.json"
    path.write_text("annotations")
    source = FakeSource([example_of(i, [{1}]) for i in range(4)], files=[path])
    return [EvaluationTask("fake:val", source, 1, LISA), EvaluationTask("b", source, 1, LISA)]


def write(directory, indices, num_rows=4):
    file = RowFile(directory, num_rows)
    with file.appending():
        for index in indices:
            file.append(row(index))
    return file


def test_rows_are_written_in_the_order_of_the_source_whatever_that_of_the_work(tmp_path):
    file = write(tmp_path / "new", [2, 0])
    assert not file.is_complete
    write(tmp_path / "new", [3])
    again = write(tmp_path / "new", [1])
    assert again.is_complete
    assert again.finish() == [row(i) for i in range(4)] == read_rows(tmp_path / "new/rows.jsonl")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["rows.jsonl"]
    assert RowFile(tmp_path / "new", 4).finish() == [row(i) for i in range(4)]


def test_file_that_was_cut_short_keeps_its_complete_rows(tmp_path):
    content = b"".join(encode_row(row(index)) for index in (3, 1, 0))
    ends = [i for i, byte in enumerate(content) if byte == ord("\n")]
    for length in (0, 1, 200, *(end + step for end in ends for step in (-1, 0, 1, 2))):
        path = tmp_path / "rows.partial.jsonl"
        path.write_bytes(content[:length])
        known = list(RowFile(tmp_path, 4).rows)
        assert known == [3, 1, 0][: content[:length].count(b"\n")]
        left = [index for index in range(4) if index not in known]
        assert write(tmp_path, left).finish() == [row(i) for i in range(4)]
        (tmp_path / "rows.jsonl").unlink()


def test_kill_between_the_two_files_keeps_the_finished_one(tmp_path):
    write(tmp_path, range(4)).finish()
    (tmp_path / "rows.partial.jsonl").write_bytes(encode_row(row(1)))
    assert RowFile(tmp_path, 4).is_complete
    assert not (tmp_path / "rows.partial.jsonl").exists()


def test_zeros_of_a_power_loss_are_dropped_and_damage_elsewhere_is_refused(tmp_path):
    path = tmp_path / "rows.partial.jsonl"
    path.write_bytes(encode_row(row(1)) + bytes(100) + b"\n")
    assert list(RowFile(tmp_path, 4).rows) == [1]
    assert path.read_bytes() == encode_row(row(1))
    path.write_bytes(encode_row(row(1)) + b"{}\n" + encode_row(row(2)))
    with pytest.raises(ArtifactError, match=r"line 2 is damaged: .*pass --overwrite"):
        RowFile(tmp_path, 4)
    path.write_bytes(encode_row(row(7)))
    with pytest.raises(ArtifactError, match="a row 7 of 4 examples"):
        RowFile(tmp_path, 4)


def test_store_resumes_its_own_evaluation_and_names_what_differs(tmp_path, tasks):
    identity = evaluation_identity("abc", tasks, {"runtime": None})
    with EvaluationStore.open(tmp_path / "out", identity) as store:
        write(store.folders["fake:val"], [0, 1])
        assert store.folders["fake:val"].name == "fake-val"
    with EvaluationStore.open(tmp_path / "out", identity) as store:
        assert list(store.row_file(tasks[0]).rows) == [0, 1]
    other = evaluation_identity("def", [*tasks[1:]], {"runtime": "openvino"})
    with (
        pytest.raises(
            ArtifactError, match=r"bundle is 'abc' there and 'def' now; datasets.fake:val"
        ),
        EvaluationStore.open(tmp_path / "out", other),
    ):
        pass
    with EvaluationStore.open(tmp_path / "out", other, overwrite=True) as store:
        assert not (tmp_path / "out/fake-val/rows.partial.jsonl").exists()
    assert json.loads((tmp_path / "out/evaluation.json").read_text())["identity"] == other


def test_identity_covers_protocol_annotations_and_size(tmp_path, tasks):
    def identity(task):
        return evaluation_identity("abc", [task], {})

    first = identity(tasks[0])
    source = tasks[0].examples
    assert identity(EvaluationTask("fake:val", source, 1, TARGETS)) != first
    assert identity(EvaluationTask("fake:val", source, 2, LISA)) != first
    source.files[0].write_text("other annotations")
    assert identity(tasks[0]) != first
    generated = [example_of(0, [{1}]), example_of(1, [{2}])]
    moved = [example_of(0, [{1}]), example_of(1, [{3}])]
    first = identity(EvaluationTask("scenes", generated, 1, TARGETS))
    assert identity(EvaluationTask("scenes", generated[:], 1, TARGETS)) == first
    assert identity(EvaluationTask("scenes", moved, 1, TARGETS)) != first


def test_folders_of_data_sets_are_distinct_and_names_unique(tasks):
    source = tasks[0].examples
    names = ["a:b", "a/b", "..", "a-b"]
    identity = evaluation_identity("", [EvaluationTask(n, source, 1, LISA) for n in names], {})
    assert [each["folder"] for each in identity["datasets"]] == ["a-b", "a-b-1", "dataset", "a-b-3"]
    with pytest.raises(ValueError, match="b is given twice"):
        evaluation_identity("", [tasks[1], tasks[1]], {})


def test_rows_without_an_identity_are_removed(tmp_path, tasks):
    write(tmp_path / "fake-val", [0])
    with EvaluationStore.open(tmp_path, evaluation_identity("", tasks, {})) as store:
        assert store.row_file(tasks[0]).rows == {}


OTHER_PROCESS = """
import sys
from pathlib import Path
from coprs_deploy.evaluation.store import EvaluationStore
with EvaluationStore.open(Path(sys.argv[1]), {"datasets": []}):
    print("open", flush=True)
    sys.stdin.read()
"""


def test_directory_in_use_is_refused(tmp_path, tasks):
    command = [sys.executable, "-c", OTHER_PROCESS, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        assert process.stdout.readline() == "open\n"
        with (
            pytest.raises(ArtifactError, match="is used by another evaluation"),
            EvaluationStore.open(tmp_path, evaluation_identity("", tasks, {})),
        ):
            pass
        process.stdin.close()


@pytest.mark.parametrize("content", ["", "[]", '{"identity": 3}', '{"identity": {}}'])
def test_file_of_something_else_is_refused(tmp_path, tasks, content):
    (tmp_path / "evaluation.json").write_text(content)
    with (
        pytest.raises(ArtifactError, match="is not the file of an evaluation"),
        EvaluationStore.open(tmp_path, evaluation_identity("", tasks, {})),
    ):
        pass


def test_finish_writes_the_metrics_by_data_set(tmp_path, tasks):
    identity = evaluation_identity("", tasks, {})
    with EvaluationStore.open(tmp_path, identity) as store:
        summary = summarize_dataset([row(0)], LISA)
        store.finish({"fake:val": summary})
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert found["identity"] == identity
    assert found["datasets"]["fake:val"] == json.loads(json.dumps(summary.to_json()))
