"""The cache of engines: hits when it should and only then, whatever happened to its files."""

import hashlib
import multiprocessing
import os
import signal
import time
from pathlib import Path

import msgspec
import pytest

from coprs_deploy.bundle import EngineRecord
from coprs_deploy.engines.cache import BuildCache, EngineKey, default_cache_dir
from coprs_deploy.specs import Geometry, OptimizationProfile, graph_specs

SPECS = graph_specs(Geometry(), 64)
KEY = EngineKey(
    revision=1,
    variant="tensorrt-rtx",
    version="1.7.1",
    graph_sha256="a" * 64,
    spec=SPECS["prior"],
    precision="bf16",
    workspace_bytes=None,
    version_compatible=False,
    hardware_compatible=False,
    gpus=("sm_80", "sm_89"),
    gpu=None,
    platform="Linux-x86_64",
)
OTHERS = {
    "revision": 2,
    "variant": "tensorrt",
    "version": "1.7.2",
    "graph_sha256": "b" * 64,
    "spec": graph_specs(Geometry(), 64, OptimizationProfile(1, 2, 4))["prior"],
    "precision": "fp16",
    "workspace_bytes": 1 << 30,
    "version_compatible": True,
    "hardware_compatible": True,
    "gpus": ("sm_80",),
    "gpu": "NVIDIA L4",
    "platform": "Linux-aarch64",
}


def record_of(plan):
    return EngineRecord(
        variant="tensorrt-rtx",
        version="1.7.1",
        compute_capabilities=("sm_80", "sm_89"),
        gpu=None,
        hardware_compatible=False,
        version_compatible=False,
        workspace_bytes=None,
        graph_sha256="a" * 64,
        sha256=hashlib.sha256(plan).hexdigest(),
        size_bytes=len(plan),
        build_seconds=1.0,
        network_layers=3,
    )


class Builder:
    """Writes a plan that tells which build it was."""

    def __init__(self):
        self.count = 0

    def __call__(self, path):
        self.count += 1
        plan = f"plan {self.count}".encode()
        path.write_bytes(plan)
        return record_of(plan)


@pytest.fixture
def cache(tmp_path):
    return BuildCache(tmp_path / "cache")


@pytest.fixture
def build():
    return Builder()


def plan_in(cache):
    (plan,) = cache.root.glob("plans/*/engine.plan")
    return plan


def test_an_engine_is_built_once(cache, build, tmp_path):
    first, was_cached = cache.get_or_build(KEY, tmp_path / "one", build)
    assert not was_cached
    second, was_cached = cache.get_or_build(KEY, tmp_path / "two", build)
    assert was_cached
    assert first == second
    assert build.count == 1
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes() == b"plan 1"
    (entry,) = cache.entries()
    assert (entry.key, entry.engine) == (KEY, first)
    assert cache.size_bytes() > len(b"plan 1")


def test_every_field_of_the_key_is_known_here():
    assert set(OTHERS) == set(EngineKey.__struct_fields__)


@pytest.mark.parametrize("field", OTHERS)
def test_another_key_is_another_engine(cache, build, tmp_path, field):
    cache.get_or_build(KEY, tmp_path / "one", build)
    other = msgspec.structs.replace(KEY, **{field: OTHERS[field]})
    assert cache.get_or_build(other, tmp_path / "two", build)[1] is False
    assert build.count == 2


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:-1]), "was cut short"),
        (lambda p: p.write_bytes(b"PLAN 1"), "was changed"),
        (lambda p: p.unlink(), "cannot be read"),
        (lambda p: (p.parent / "record.json").write_text("{"), "cannot be read"),
        (lambda p: (p.parent / "record.json").unlink(), "cannot be read"),
        (
            lambda p: (p.parent / "record.json").write_text(
                (p.parent / "record.json").read_text().replace('"bf16"', '"fp16"')
            ),
            "was built for something else",
        ),
    ],
)
def test_a_damaged_entry_is_said_and_built_anew(cache, build, tmp_path, damage, message):
    cache.get_or_build(KEY, tmp_path / "one", build)
    damage(plan_in(cache))
    with pytest.warns(UserWarning, match=message):
        _, was_cached = cache.get_or_build(KEY, tmp_path / "two", build)
    assert not was_cached
    assert (tmp_path / "two").read_bytes() == b"plan 2"
    assert cache.get_or_build(KEY, tmp_path / "three", build)[1]


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()])
def test_a_build_that_stops_leaves_nothing(cache, build, tmp_path, error):
    def stop(path):
        path.write_bytes(b"half a plan")
        raise error

    with pytest.raises(type(error)):
        cache.get_or_build(KEY, tmp_path / "one", stop)
    assert not (tmp_path / "one").exists()
    assert list((cache.root / "plans").iterdir()) == []
    assert cache.get_or_build(KEY, tmp_path / "one", build)[1] is False


def _slow_build(root: Path, out: Path, log: Path) -> None:
    def build(path):
        with log.open("a") as file:
            file.write("built\n")
        path.write_bytes(b"half")
        time.sleep(0.5)
        path.write_bytes(b"whole plan")
        return record_of(b"whole plan")

    BuildCache(root).get_or_build(KEY, out, build)


def test_two_processes_build_one_engine(tmp_path):
    context = multiprocessing.get_context("fork")
    outs = [tmp_path / "one", tmp_path / "two"]
    workers = [
        context.Process(target=_slow_build, args=(tmp_path / "cache", out, tmp_path / "log"))
        for out in outs
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert (tmp_path / "log").read_text() == "built\n"
    assert [out.read_bytes() for out in outs] == [b"whole plan"] * 2


def test_a_killed_build_harms_none(tmp_path, build):
    context = multiprocessing.get_context("fork")
    log = tmp_path / "log"
    worker = context.Process(target=_slow_build, args=(tmp_path / "cache", tmp_path / "one", log))
    worker.start()
    deadline = time.monotonic() + 60
    while not log.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(worker.pid, signal.SIGKILL)
    worker.join(60)
    assert worker.exitcode == -signal.SIGKILL
    cache = BuildCache(tmp_path / "cache")
    assert cache.get_or_build(KEY, tmp_path / "two", build)[1] is False
    assert (tmp_path / "two").read_bytes() == b"plan 1"


def test_waiting_is_said(cache, build, tmp_path):
    said = []
    with cache._lock(KEY.digest()):
        context = multiprocessing.get_context("fork")
        queue = context.Queue()

        def wait():
            queue.put("waiting")

        worker = context.Process(
            target=cache.get_or_build, args=(KEY, tmp_path / "one", build, wait)
        )
        worker.start()
        said.append(queue.get(timeout=60))
    worker.join(60)
    assert said == ["waiting"]
    assert worker.exitcode == 0


def others(count):
    return [msgspec.structs.replace(KEY, graph_sha256=str(number) * 64) for number in range(count)]


def test_what_was_not_used_for_longest_is_removed(cache, build, tmp_path):
    keys = others(4)
    for age, key in enumerate(keys):
        cache.get_or_build(key, tmp_path / "out", build)
        record = cache.root / "plans" / key.digest() / "record.json"
        os.utime(record, (1000.0 + age, 1000.0 + age))
    assert cache.get_or_build(keys[0], tmp_path / "out", build)[1]  # used again
    assert cache.prune(cache.size_bytes()) == 0
    assert cache.prune(cache.size_bytes() - 1) == 1
    assert {entry.key for entry in cache.entries()} == {keys[0], keys[2], keys[3]}
    assert cache.prune(0) == 3
    assert cache.entries() == []
    assert cache.get_or_build(keys[0], tmp_path / "out", build)[1] is False


def test_what_is_in_use_stays(cache, build, tmp_path):
    keys = others(2)
    for key in keys:
        cache.get_or_build(key, tmp_path / "out", build)
    with cache._lock(keys[0].digest()):
        assert cache.prune(0) == 1
    assert [entry.key for entry in cache.entries()] == [keys[0]]


def test_what_a_killed_build_left_is_removed_and_a_running_one_is_not(cache, build, tmp_path):
    cache.get_or_build(KEY, tmp_path / "out", build)
    left = cache.root / "plans" / f".{KEY.digest()}.partial-abc"
    left.mkdir()
    (left / "engine.plan").write_bytes(b"half")
    with cache._lock(KEY.digest()):
        cache.prune(1 << 40)
    assert left.exists()
    assert cache.prune(1 << 40) == 0
    assert not left.exists()
    assert len(cache.entries()) == 1


def test_blobs_are_kept_whole(cache):
    assert cache.load_blob("timing", "one.cache") is None
    cache.save_blob("timing", "one.cache", b"first")
    cache.save_blob("timing", "one.cache", b"second")
    assert cache.load_blob("timing", "one.cache") == b"second"
    assert [p.name for p in (cache.root / "timing").iterdir()] == ["one.cache"]


def test_the_folder_can_be_named(monkeypatch, tmp_path):
    monkeypatch.setenv("COPRS_DEPLOY_CACHE", str(tmp_path / "mine"))
    assert default_cache_dir() == tmp_path / "mine"
    monkeypatch.delenv("COPRS_DEPLOY_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "coprs-deploy"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == Path.home() / ".cache" / "coprs-deploy"
