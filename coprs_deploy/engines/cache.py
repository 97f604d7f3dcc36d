"""Engines that were built before, in the user's cache folder.

    plans/<key>/engine.plan record.json    a plan, the key that it was built for, its hash
    timing/<name>, runtime/<name>          what TensorRT measured, what TensorRT for RTX compiled
    calibration/<name>                     ranges that int8 was calibrated to
    locks/<name>                           one file a writer holds

A plan is found by everything that shapes it (:class:`EngineKey`) and used only while its hash holds.
Two builds of one engine wait for each other; the second finds what the first made. A process that
dies leaves no lock, and nothing half-written under a name that is read.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from coprs_deploy.artifacts import atomic_write, file_lock, hash_file, new_directory, write_json
from coprs_deploy.bundle import EngineRecord
from coprs_deploy.specs import GraphSpec, Record

CACHE_VARIABLE = "COPRS_DEPLOY_CACHE"
"""Environment variable that names another cache folder."""

PLAN_FILE = "engine.plan"
RECORD_FILE = "record.json"


class EngineKey(Record, frozen=True):
    """Everything that shapes an engine; two equal keys mean the same engine.

    Attributes:
        revision: of the code that builds.
        variant: ``tensorrt`` or ``tensorrt-rtx``.
        version: of the library.
        graph_sha256: hash of the ONNX graph, external weights included.
        spec: inputs and outputs, and the range of targets or images.
        precision: of the graph.
        workspace_bytes: limit of scratch memory.
        version_compatible: whether later versions load the plan.
        hardware_compatible: whether other GPUs run it.
        gpus: compute capabilities.
        gpu: the GPU that builds; None without one.
        platform: operating system and processor.
    """

    revision: int
    variant: str
    version: str
    graph_sha256: str
    spec: GraphSpec
    precision: str
    workspace_bytes: int | None
    version_compatible: bool
    hardware_compatible: bool
    gpus: tuple[str, ...]
    gpu: str | None
    platform: str

    def digest(self) -> str:
        """Name the key: a SHA-256 of its fields."""
        text = json.dumps(self.to_json(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


class CacheEntry(Record, frozen=True):
    """A plan in the cache: what it was built for, and what is known about it."""

    key: EngineKey
    engine: EngineRecord


class BuildCache:
    """A folder of engines.

    Args:
        root: the folder; None takes :func:`default_cache`.
    """

    def __init__(self, root: Path | None = None) -> None:
        self.root = (root or default_cache()).absolute()

    def get_or_build(
        self,
        key: EngineKey,
        out: Path,
        build: Callable[[Path], EngineRecord],
        on_wait: Callable[[], None] = lambda: None,
    ) -> tuple[EngineRecord, bool]:
        """Write the engine of a key; it is built when there is none whose hash holds.

        Args:
            key: what shapes the engine.
            out: where a copy of the plan shall stand.
            build: writes the plan to a path and says what is known about it.
            on_wait: called when another process builds this engine and is waited for.

        Returns:
            What is known about the engine, and whether it was in the cache.
        """
        place = self.root / "plans" / key.digest()
        with self._lock(key.digest(), on_wait):
            found = self._find(place, key)
            if found is None:
                with new_directory(place, RECORD_FILE) as partial:
                    engine = build(partial / PLAN_FILE)
                    write_json(partial / RECORD_FILE, CacheEntry(key, engine).to_json())
            shutil.copyfile(place / PLAN_FILE, out)
        return (engine, False) if found is None else (found, True)

    def _find(self, place: Path, key: EngineKey) -> EngineRecord | None:
        """Read an entry; one that does not hold is removed, and a warning says so."""
        if not place.exists():
            return None
        problem = None
        try:
            entry = read_entry(place)
            plan = place / PLAN_FILE
            if entry.key != key:
                problem = "was built for something else"
            elif plan.stat().st_size != entry.engine.size_bytes:
                problem = "was cut short"
            elif hash_file(plan) != entry.engine.sha256:
                problem = "was changed"
        except (ValueError, OSError) as error:
            problem = f"cannot be read ({error})"
        if problem is None:
            os.utime(place / RECORD_FILE)  # what prune() goes by
            return entry.engine
        warnings.warn(f"the cached engine in {place} {problem}: it is built anew", stacklevel=2)
        shutil.rmtree(place, ignore_errors=True)
        return None

    def entries(self) -> list[CacheEntry]:
        """List what the cache holds; entries that cannot be read are left out."""
        found = []
        for place in sorted((self.root / "plans").glob("*")):
            with suppress(ValueError, OSError):
                found.append(read_entry(place))
        return found

    def size_bytes(self) -> int:
        """Add up the sizes of all files of the cache."""
        total = 0
        for path in self.root.rglob("*"):
            with suppress(OSError):  # another process may remove it meanwhile
                total += path.stat().st_size if path.is_file() else 0
        return total

    def blobs(self, folder: str) -> list[Path]:
        """List what :meth:`keep_blob` kept in a folder."""
        return sorted((self.root / folder).glob("[!.]*"))

    def prune(self, limit_bytes: int) -> int:
        """Remove the engines that were not used for longest until the cache is within a limit.

        What a killed build left is removed as well. An engine that another process builds or copies
        at this moment stays.

        Args:
            limit_bytes: most bytes that the cache shall hold, timing and runtime caches included.

        Returns:
            How many engines were removed.
        """
        plans = self.root / "plans"
        for partial in plans.glob(".*.partial-*"):
            with self._lock_if_free(partial.name[1:].partition(".")[0]) as is_free:
                if is_free:
                    shutil.rmtree(partial, ignore_errors=True)
        num_removed, total = 0, self.size_bytes()
        for place in sorted(plans.glob("[!.]*"), key=_last_use):
            if total <= limit_bytes:
                break
            with self._lock_if_free(place.name) as is_free:
                if is_free:
                    total -= sum(path.stat().st_size for path in place.iterdir())
                    shutil.rmtree(place, ignore_errors=True)
                    num_removed += 1
        return num_removed

    def load_blob(self, folder: str, name: str) -> bytes | None:
        """Read what :meth:`keep_blob` kept; None when there is none."""
        try:
            return (self.root / folder / name).read_bytes()
        except FileNotFoundError:
            return None

    def keep_blob(self, folder: str, name: str, data: bytes) -> None:
        """Keep a timing cache or a runtime cache; a reader sees the old or the new one, whole."""
        path = self.root / folder / name
        with self._lock(f"{folder}-{name}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as partial:
                partial.write_bytes(data)

    @contextmanager
    def _lock(self, name: str, on_wait: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Hold a lock between processes; the system lets go of it when a process dies."""
        lock = self._lock_of(name)
        try:
            held = lock.acquire(blocking=False)
        except Timeout:
            on_wait()
            held = lock.acquire()
        with held:
            yield

    @contextmanager
    def _lock_if_free(self, name: str) -> Iterator[bool]:
        """Hold a lock between processes; False where another holds it."""
        try:
            held = self._lock_of(name).acquire(blocking=False)
        except Timeout:
            yield False
            return
        with held:
            yield True

    def _lock_of(self, name: str) -> FileLock:
        path = self.root / "locks" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return file_lock(path)


def _last_use(place: Path) -> float:
    try:
        return (place / RECORD_FILE).stat().st_mtime
    except OSError:  # a folder without a record is of no use to anyone
        return 0.0


def default_cache() -> Path:
    """Name the cache folder: ``COPRS_DEPLOY_CACHE``, else below the user's cache folder."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "coprs-deploy"


def read_entry(place: Path) -> CacheEntry:
    """Read the record of one folder of the cache.

    Raises:
        ValueError: it is no record of this version; OSError: there is none.
    """
    return CacheEntry.from_json(json.loads((place / RECORD_FILE).read_text(encoding="utf-8")))
