"""The engine cache: which keys hit, which entries are valid, what is removed."""

import errno
import hashlib
import multiprocessing
import os
import shutil
import signal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coprs_deploy.bundle import EngineRecord
from coprs_deploy.engines.trt.build import BuildSettings
from coprs_deploy.engines.trt.cache import BuildTarget, EngineCache, EngineKey
from coprs_deploy.specs import Geometry, OptimizationProfile, graph_specs
from tests.unit.damage import Damaged, damages

FORK = multiprocessing.get_context("fork")
GPUS = ("sm_80", "sm_89")
KEY = EngineKey(
    target=BuildTarget(BuildSettings("tensorrt", GPUS), "1.7.1", None, GPUS),
    graph_sha256="a" * 64,
    spec=graph_specs(Geometry(), 64)["prior"],
    precision="bf16",
    platform="Linux-x86_64",
    revision=1,
)
OTHER_VALUES = {
    "revision": 2,
    "target.settings.variant": "tensorrt-rtx",
    "target.settings.compute_capabilities": ("sm_80",),
    "target.settings.workspace_bytes": 1 << 30,
    "target.settings.version_compatible": True,
    "target.settings.hardware_compatible": True,
    "target.version": "1.7.2",
    "target.gpu": "NVIDIA L4",
    "target.compute_capabilities": ("sm_80",),
    "graph_sha256": "b" * 64,
    "spec": graph_specs(Geometry(), 64, OptimizationProfile(1, 2, 4))["prior"],
    "precision": "fp16",
    "platform": "Linux-aarch64",
}


def field_paths(record, prefix=""):
    """Names of the fields of a record, those of nested build records after a dot."""
    for name in record.__struct_fields__:
        value = getattr(record, name)
        if isinstance(value, (BuildTarget, BuildSettings)):
            yield from field_paths(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def changed(record, path, value):
    name, _, rest = path.partition(".")
    value = changed(getattr(record, name), rest, value) if rest else value
    return msgspec.structs.replace(record, **{name: value})


def record_of(data):
    return EngineRecord(
        variant="tensorrt-rtx",
        version="1.7.1",
        compute_capabilities=("sm_80", "sm_89"),
        gpu=None,
        hardware_compatible=False,
        version_compatible=False,
        workspace_bytes=None,
        graph_sha256="a" * 64,
        sha256=hashlib.sha256(data).hexdigest(),
        size_bytes=len(data),
        build_seconds=1.0,
        network_layers=3,
    )


class Builder:
    """Writes an engine that contains the number of the build."""

    def __init__(self):
        self.count = 0

    def __call__(self, path):
        self.count += 1
        data = f"engine {self.count}".encode()
        path.write_bytes(data)
        return record_of(data)


@pytest.fixture
def cache(tmp_path):
    return EngineCache(tmp_path / "cache")


@pytest.fixture
def build():
    return Builder()


def test_get_or_build_builds_once_for_equal_keys(cache, build, tmp_path):
    first, was_cached = cache.get_or_build(KEY, tmp_path / "one", build)
    assert not was_cached
    second, was_cached = cache.get_or_build(KEY, tmp_path / "two", build)
    assert was_cached
    assert first == second
    assert build.count == 1
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes() == b"engine 1"
    (entry,) = cache.entries()
    assert (entry.key, entry.engine) == (KEY, first)
    assert cache.size_bytes() > len(b"engine 1")


def test_an_entry_lies_under_the_digest_of_its_key(cache, build, tmp_path):
    cache.get_or_build(KEY, tmp_path / "one", build)
    entry = cache.root / "engines" / KEY.digest()
    assert sorted(path.name for path in entry.iterdir()) == ["model.engine", "record.json"]


def test_other_values_cover_every_field_of_the_key():
    assert set(OTHER_VALUES) == set(field_paths(KEY))


@pytest.mark.parametrize("field", OTHER_VALUES)
def test_get_or_build_with_another_key_builds_again(cache, build, tmp_path, field):
    cache.get_or_build(KEY, tmp_path / "one", build)
    other = changed(KEY, field, OTHER_VALUES[field])
    assert cache.get_or_build(other, tmp_path / "two", build)[1] is False
    assert build.count == 2


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:-1]), "was truncated"),
        (lambda p: p.write_bytes(b"ENGINE 1"), "was changed"),
        (lambda p: p.unlink(), "cannot be read"),
        (lambda p: (p.parent / "record.json").write_text("{"), "cannot be read"),
        (lambda p: (p.parent / "record.json").unlink(), "cannot be read"),
        (
            lambda p: (p.parent / "record.json").write_text(
                (p.parent / "record.json").read_text().replace('"bf16"', '"fp16"')
            ),
            "has another key",
        ),
    ],
)
def test_an_invalid_entry_is_rebuilt_with_a_warning(cache, build, tmp_path, damage, message):
    cache.get_or_build(KEY, tmp_path / "one", build)
    damage(cache.root / "engines" / KEY.digest() / "model.engine")
    with pytest.warns(UserWarning, match=f"{message}.*it is rebuilt"):
        _, was_cached = cache.get_or_build(KEY, tmp_path / "two", build)
    assert not was_cached
    assert (tmp_path / "two").read_bytes() == b"engine 2"
    assert cache.get_or_build(KEY, tmp_path / "three", build)[1]


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()])
def test_a_failed_build_leaves_no_entry(cache, build, tmp_path, error):
    def stop(path):
        path.write_bytes(b"half an engine")
        raise error

    with pytest.raises(type(error)):
        cache.get_or_build(KEY, tmp_path / "one", stop)
    assert not (tmp_path / "one").exists()
    assert list((cache.root / "engines").iterdir()) == []
    assert cache.get_or_build(KEY, tmp_path / "one", build)[1] is False


def test_get_or_build_without_a_writable_cache_builds_and_warns(cache, build, tmp_path):
    cache.root.touch()  # a file in its place stops root, too
    with pytest.warns(UserWarning, match="cannot be written .* set COPRS_DEPLOY_CACHE"):
        engine, was_cached = cache.get_or_build(KEY, tmp_path / "one", build)
    assert not was_cached and engine == record_of(b"engine 1")
    assert (tmp_path / "one").read_bytes() == b"engine 1"
    with pytest.warns(UserWarning, match="cannot be written; set COPRS_DEPLOY_CACHE"):
        assert cache.prune(0) == 0


def test_get_or_build_with_a_full_disk_keeps_the_engine(cache, build, tmp_path, monkeypatch):
    def copy_to_full_disk(source, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))

    monkeypatch.setattr(shutil, "copyfile", copy_to_full_disk)
    with pytest.warns(UserWarning, match=r"cannot be written \(No space left on device\)"):
        _, was_cached = cache.get_or_build(KEY, tmp_path / "one", build)
    assert not was_cached
    assert (tmp_path / "one").read_bytes() == b"engine 1"
    assert cache.entries() == []
    assert [path.name for path in (cache.root / "engines").iterdir()] == []


def test_get_or_build_reads_a_cache_that_cannot_be_written(cache, build, tmp_path, monkeypatch):
    cache.get_or_build(KEY, tmp_path / "one", build)
    monkeypatch.setattr(cache, "is_writable", lambda folder: False)
    monkeypatch.setattr(os, "utime", raise_permission_error)
    assert cache.get_or_build(KEY, tmp_path / "two", build)[1]
    assert (tmp_path / "two").read_bytes() == b"engine 1"


def raise_permission_error(path):
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


@pytest.fixture(scope="module")
def cached_engine(tmp_path_factory):
    """A cache with one engine, of which one file at a time is damaged."""
    root = tmp_path_factory.mktemp("engine")
    EngineCache(root / "cache").get_or_build(KEY, root / "out", Builder())
    return Damaged(root / "cache", root / "damaged")


@pytest.mark.fuzz
@given(name=st.sampled_from(["model.engine", "record.json"]), damage=damages())
@pytest.mark.filterwarnings("ignore:the cached engine")
def test_get_or_build_damaged_entry_gives_the_engine_of_its_record(cached_engine, name, damage):
    cache, out = EngineCache(cached_engine.root), cached_engine.root.parent / "copy"
    with cached_engine.file(f"engines/{KEY.digest()}/{name}", damage):
        engine, was_cached = cache.get_or_build(KEY, out, Builder())
    assert out.read_bytes() == b"engine 1"
    assert engine.sha256 == hashlib.sha256(b"engine 1").hexdigest()
    assert was_cached or engine == record_of(b"engine 1")


def test_two_processes_build_one_engine_once(cache, tmp_path):
    other_waits, num_builds = FORK.Event(), FORK.Value("i", 0)

    def work(out):
        def build(path):
            num_builds.value += 1
            path.write_bytes(b"half")
            assert other_waits.wait(60)
            path.write_bytes(b"whole engine")
            return record_of(b"whole engine")

        cache.get_or_build(KEY, out, build, other_waits.set)

    outs = [tmp_path / "one", tmp_path / "two"]
    workers = [FORK.Process(target=work, args=(out,)) for out in outs]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert num_builds.value == 1
    assert [out.read_bytes() for out in outs] == [b"whole engine"] * 2


def test_a_killed_build_is_repeated(cache, build, tmp_path):
    has_started = FORK.Event()

    def work():
        def build(path):
            path.write_bytes(b"half")
            has_started.set()
            signal.pause()

        cache.get_or_build(KEY, tmp_path / "one", build)

    worker = FORK.Process(target=work)
    worker.start()
    assert has_started.wait(60)
    os.kill(worker.pid, signal.SIGKILL)
    worker.join(60)
    assert worker.exitcode == -signal.SIGKILL
    assert cache.get_or_build(KEY, tmp_path / "two", build)[1] is False
    assert (tmp_path / "two").read_bytes() == b"engine 1"


def keys(count):
    return [msgspec.structs.replace(KEY, graph_sha256=str(number) * 64) for number in range(count)]


def test_prune_removes_the_least_recently_used_engines(cache, build, tmp_path):
    four = keys(4)
    for age, key in enumerate(four):
        cache.get_or_build(key, tmp_path / "out", build)
        record = cache.root / "engines" / key.digest() / "record.json"
        os.utime(record, (1000.0 + age, 1000.0 + age))
    assert cache.get_or_build(four[0], tmp_path / "out", build)[1]  # used again
    assert cache.prune(cache.size_bytes()) == 0
    assert cache.prune(cache.size_bytes() - 1) == 1
    assert {entry.key for entry in cache.entries()} == {four[0], four[2], four[3]}
    assert cache.prune(0) == 3
    assert cache.entries() == []
    assert cache.get_or_build(four[0], tmp_path / "out", build)[1] is False


def test_prune_keeps_blobs(cache, build, tmp_path):
    cache.get_or_build(KEY, tmp_path / "out", build)
    cache.save_blob("timing", "one.cache", bytes(1000))
    assert cache.prune(0) == 1
    assert cache.size_bytes() == 1000


def test_prune_keeps_locked_engines(cache, build, tmp_path):
    two = keys(2)
    for key in two:
        cache.get_or_build(key, tmp_path / "out", build)
    with cache.lock(two[0].digest()):
        assert cache.prune(0) == 1
    assert [entry.key for entry in cache.entries()] == [two[0]]


def test_prune_removes_leftovers_of_killed_builds_only(cache, build, tmp_path):
    cache.get_or_build(KEY, tmp_path / "out", build)
    left = cache.root / "engines" / f".{KEY.digest()}.partial-abc"
    left.mkdir()
    (left / "model.engine").write_bytes(b"half")
    with cache.lock(KEY.digest()):
        cache.prune(1 << 40)
    assert left.exists()
    assert cache.prune(1 << 40) == 0
    assert not left.exists()
    assert len(cache.entries()) == 1
