"""The cache folder: its location, blobs and locks."""

import multiprocessing
import os
import tempfile
from pathlib import Path

import platformdirs
import pytest

from coprs_deploy.engines.cache import CACHE_VARIABLE, Cache, default_cache_dir


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache")


def test_default_cache_dir_on_linux_follows_the_variable_then_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "mine"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "mine"
    monkeypatch.delenv(CACHE_VARIABLE)
    assert default_cache_dir() == tmp_path / "coprs-deploy"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert default_cache_dir() == Path.home() / ".cache" / "coprs-deploy"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == Path.home() / ".cache" / "coprs-deploy"


def test_cache_without_a_root_uses_the_default_folder(monkeypatch, tmp_path):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "mine"))
    assert Cache().root == tmp_path / "mine"
    assert not Cache().root.exists()


def test_a_saved_blob_replaces_the_older_one(cache):
    assert cache.load_blob("timing", "one.cache") is None
    cache.save_blob("timing", "one.cache", b"first")
    cache.save_blob("timing", "one.cache", b"second")
    assert cache.load_blob("timing", "one.cache") == b"second"
    assert cache.blobs("timing") == [cache.root / "timing" / "one.cache"]
    assert [path.name for path in (cache.root / "timing").iterdir()] == ["one.cache"]


def test_blobs_of_a_missing_folder_are_none(cache):
    assert cache.blobs("timing") == []
    assert cache.size_bytes() == 0


def test_size_bytes_adds_all_folders(cache):
    cache.save_blob("timing", "one", bytes(1000))
    cache.save_blob("calibration", "two", bytes(500))
    assert cache.size_bytes() == 1500  # lock files are empty


def test_lock_of_another_process_is_awaited_and_announced(cache):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()

    def take():
        with cache.lock("one", lambda: queue.put("waiting")):
            queue.put("held")

    with cache.lock("one"):
        worker = context.Process(target=take)
        worker.start()
        assert queue.get(timeout=60) == "waiting"
        assert queue.empty()
    assert queue.get(timeout=60) == "held"
    worker.join(60)
    assert worker.exitcode == 0


def test_lock_of_another_name_is_free(cache):
    announced = []
    with cache.lock("one"), cache.lock("two", lambda: announced.append("waiting")):
        assert announced == []


def test_default_cache_dir_without_a_home_is_in_the_temporary_directory(monkeypatch, tmp_path):
    def no_home(*names, **options):
        raise RuntimeError("could not determine the home directory")

    monkeypatch.delenv(CACHE_VARIABLE, raising=False)
    monkeypatch.setattr(platformdirs, "user_cache_path", no_home)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    assert default_cache_dir() == tmp_path / f"coprs-deploy-{os.getuid()}"


def test_cache_that_cannot_be_written_warns_and_holds_nothing(tmp_path):
    (tmp_path / "file").touch()
    cache = Cache(tmp_path / "file" / "cache")
    assert not cache.is_writable()
    with pytest.warns(UserWarning, match=f"{CACHE_VARIABLE} to another folder"):
        cache.save_blob("timing", "one", b"data")
    assert cache.load_blob("timing", "one") is None
