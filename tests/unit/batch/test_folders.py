"""Folders at URLs: files whole or not at all, the lock of a run, and a run from and to them."""

import json
import time

import pytest

from coprs_deploy.batch import RowSource, SourceColumns, folders
from coprs_deploy.batch.folders import LEASE_S, LOCK_FILE, PENDING, open_folder
from coprs_deploy.batch.local import run_local
from coprs_deploy.batch.manifest import BatchManifest, BatchOutput
from coprs_deploy.batch.workers import WorkerSettings
from coprs_deploy.errors import ArtifactError
from coprs_deploy.runtime import RuntimeOptions

fsspec = pytest.importorskip("fsspec")


@pytest.fixture(autouse=True)
def empty_memory():
    """Remove what a test left in the file system in memory, which all tests share."""
    yield
    filesystem = fsspec.filesystem("memory")
    filesystem.store.clear()
    filesystem.pseudo_dirs[:] = [""]


@pytest.fixture(params=["path", "file", "memory"])
def location(request, tmp_path):
    """Return a new folder: a path, a URL of a file system, one of an object store."""
    if request.param == "path":
        yield str(tmp_path / "out")
    elif request.param == "file":
        yield f"file://{tmp_path}/out"
    else:
        yield "memory://bucket/out"


def test_file_is_written_replaced_and_read(location):
    folder = open_folder(location)
    assert folder.names() == []
    folder.create()
    with pytest.raises(FileNotFoundError):
        folder.open("a")
    for content in (b"first", b"second"):
        folder.write("a", content)
        with folder.open("a") as file:
            assert file.read() == content
    assert folder.names() == ["a"]
    assert folder.below("masks") == f"{location}/masks"


def test_two_runs_in_one_folder_are_refused(location):
    first, second = open_folder(location), open_folder(location)
    first.create()
    refused = pytest.raises(ArtifactError, match="being written by another process")
    with first.exclusive(), refused, second.exclusive():
        pass
    with second.exclusive():
        assert second.names() == []
    with first.exclusive():
        pass


@pytest.mark.parametrize(
    ("changes", "is_held"),
    [
        ({}, True),
        ({"renewed": -2 * LEASE_S}, False),
        ({"host": "elsewhere", "renewed": -2 * LEASE_S}, False),
        ({"host": "elsewhere", "process": 1 << 30}, True),
        ({"process": 1 << 30}, False),
    ],
)
def test_lock_of_a_killed_process_ends(changes, is_held):
    """A process of this host is known to have ended; of another host the age of the lock tells."""
    folder = open_folder("memory://bucket/locked")
    filesystem, path = fsspec.filesystem("memory"), f"/bucket/locked/{LOCK_FILE}"
    with folder.exclusive():
        held = json.loads(filesystem.cat_file(path))
        age = changes.get("renewed", 0)
        changed = {**held, **changes, "owner": "another", "renewed": time.time() + age}
        filesystem.pipe_file(path, json.dumps(changed).encode())
        if is_held:
            with pytest.raises(ArtifactError, match="process"), folder.exclusive():
                pass
        else:
            with folder.exclusive():
                pass


def test_lock_is_renewed_while_it_is_held(monkeypatch):
    monkeypatch.setattr(folders, "LEASE_S", 0.04)
    folder = open_folder("memory://bucket/renewed")
    filesystem, path = fsspec.filesystem("memory"), f"/bucket/renewed/{LOCK_FILE}"

    def renewed():
        return json.loads(filesystem.cat_file(path))["renewed"]

    with folder.exclusive():
        first, end = renewed(), time.monotonic() + 30
        while renewed() == first:
            assert time.monotonic() < end
            time.sleep(0.01)
    assert not filesystem.exists(path)


def test_file_that_a_killed_process_left_pending_is_removed(tmp_path):
    folder = open_folder(f"file://{tmp_path}")
    (tmp_path / f"{PENDING}0-part").write_bytes(b"half")
    with folder.exclusive():
        assert not list(tmp_path.glob(f"{PENDING}*"))


def test_file_that_cannot_be_written_leaves_the_earlier_one(tmp_path, monkeypatch):
    folder = open_folder(f"file://{tmp_path}")
    folder.write("a", b"first")

    def fail(path, content):
        (tmp_path / path.rpartition("/")[2]).write_bytes(content[:1])
        raise OSError("no connection")

    monkeypatch.setattr(folder._files, "pipe_file", fail)
    with pytest.raises(OSError, match="no connection"):
        folder.write("a", b"second")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"first"


@pytest.mark.parametrize("rows_per_file", [2, 1000])
def test_run_from_a_url_to_a_url_equals_a_local_run(
    location, images, tmp_path, open_batch, monkeypatch, rows_per_file
):
    filesystem = fsspec.filesystem("memory")
    filesystem.put(str(images), "/source/images", recursive=True)
    ring = SourceColumns(("a ring",))
    monkeypatch.setattr(
        WorkerSettings, "open", lambda each: open_batch(mask_folder=each.mask_folder)[0]
    )
    found = []
    for source in (str(images), "memory://source/images"):
        rows = RowSource(source, ring)
        manifest = BatchManifest("bundle", rows.fingerprint, {}, rows.num_rows, rows_per_file)
        out = location if "://" in source else tmp_path / "local"
        output = BatchOutput(out, manifest)
        for resume in (False, True):
            with output.opened(resume=resume):
                settings = WorkerSettings(None, RuntimeOptions(), mask_folder=output.mask_folder)
                summary = run_local(rows, output, settings, 1)
        assert (summary.num_kept, summary.num_failed) == (5, 0)
        found.append([(row.row, row.id, row.masks, row.error) for row in output.rows()])
        with pytest.raises(ArtifactError, match="pass --resume"), output.opened(resume=False):
            pass
    assert found[0] == found[1]
    masks = open_folder(open_folder(location).below("masks"))
    assert masks.names() == [f"{number:09d}-1.png" for number in range(5)]
