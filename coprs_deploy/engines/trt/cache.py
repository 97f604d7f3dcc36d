"""Build engines through the cache: keys, records, and what a build needs of the machine.

    engines/<key>/model.engine record.json    an engine, its key and its record
    timing/<variant>-<version>-<GPU>.cache    kernel timings of TensorRT

An engine is found by everything that determines it (:class:`EngineKey`) and used only if its hash
matches. Concurrent builds of one engine wait for each other.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import warnings
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path

import msgspec

from coprs_deploy.artifacts import (
    FileRecord,
    atomic_write,
    fingerprint,
    hash_file,
    new_directory,
    write_json,
)
from coprs_deploy.bundle import EngineRecord
from coprs_deploy.engines.cache import (
    ENGINE_FOLDER,
    RECORD_FILE,
    Cache,
    graph_bytes,
    graph_files,
)
from coprs_deploy.engines.cuda import current_gpu
from coprs_deploy.engines.trt.build import (
    BUILDER_REVISION,
    BuildCallbacks,
    BuildSettings,
    build_engine_bytes,
)
from coprs_deploy.engines.trt.variants import (
    TRT_VARIANTS,
    check_capabilities,
    supported_capabilities,
)
from coprs_deploy.errors import EngineBuildError, RuntimeUnavailableError
from coprs_deploy.specs import GraphSpec, Record

ENGINE_FILE = "model.engine"
TIMING_FOLDER = "timing"

MEMORY_FACTOR = 4
"""Peak memory of a build in multiples of its graph (ViT-B, TensorRT for RTX 1.7: 4.0)."""

FIXED_MEMORY_BYTES = 500_000_000
"""Memory of the libraries before any graph is read."""


class BuildTarget(Record, frozen=True):
    """What engines are built for: the settings, the library, and the GPUs that build and run."""

    settings: BuildSettings
    version: str
    gpu: str | None
    compute_capabilities: tuple[str, ...]


class EngineKey(Record, frozen=True):
    """Everything that determines an engine; equal keys mean the same engine."""

    target: BuildTarget
    graph_sha256: str
    spec: GraphSpec
    precision: str
    platform: str
    revision: int = BUILDER_REVISION

    def digest(self) -> str:
        """Return the SHA-256 of the fields, in hexadecimal."""
        text = json.dumps(self.to_json(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


class CacheEntry(Record, frozen=True):
    """The record of a cached engine: its key and what is known about it."""

    key: EngineKey
    engine: EngineRecord


class EngineCache(Cache):
    """A cache folder with engines in it."""

    def get_or_build(
        self,
        key: EngineKey,
        out: Path,
        build: Callable[[Path], EngineRecord],
        on_wait: Callable[[], None] = lambda: None,
    ) -> tuple[EngineRecord, bool]:
        """Write the engine of a key to a file; build it unless a valid one is in the cache.

        ``build`` writes the engine to a path and returns its record; ``on_wait`` is called if
        another process is building this engine. Returns the engine's record, and whether it was in
        the cache.
        """
        entry = self.root / ENGINE_FOLDER / key.digest()
        is_writable = self.is_writable(ENGINE_FOLDER)
        with self.lock(key.digest(), on_wait) if is_writable else nullcontext():
            found = self._find(entry, key)
            if found is not None:
                shutil.copyfile(entry / ENGINE_FILE, out)
                return found, True
            with atomic_write(out) as partial:
                engine = build(partial)
            try:
                with new_directory(entry, RECORD_FILE) as partial:
                    shutil.copyfile(out, partial / ENGINE_FILE)
                    write_json(partial / RECORD_FILE, CacheEntry(key, engine).to_json())
            except OSError as error:  # read-only, or a full disk
                self.warn_unwritable(error)
        return engine, False

    def entries(self) -> list[CacheEntry]:
        """List the cached engines, except those whose record cannot be read."""
        found = []
        for entry in sorted((self.root / ENGINE_FOLDER).glob("*")):
            with suppress(ValueError, OSError):
                found.append(_read_entry(entry))
        return found

    def _find(self, entry: Path, key: EngineKey) -> EngineRecord | None:
        """Read an entry; an invalid one is removed with a warning."""
        if not entry.exists():
            return None
        problem = None
        try:
            record = _read_entry(entry)
            path = entry / ENGINE_FILE
            if record.key != key:
                problem = "has another key"
            elif path.stat().st_size != record.engine.size_bytes:
                problem = "was truncated"
            elif hash_file(path) != record.engine.sha256:
                problem = "was changed"
        except (ValueError, OSError) as error:
            problem = f"cannot be read ({error})"
        if problem is None:
            with suppress(OSError):  # a read-only cache
                os.utime(entry / RECORD_FILE)  # the last use, for prune()
            return record.engine
        warnings.warn(f"the cached engine in {entry} {problem}: it is rebuilt", stacklevel=2)
        shutil.rmtree(entry, ignore_errors=True)
        return None


def _read_entry(entry: Path) -> CacheEntry:
    return CacheEntry.from_json(json.loads((entry / RECORD_FILE).read_text(encoding="utf-8")))


def resolve_target(settings: BuildSettings) -> BuildTarget:
    """Determine what to build for, and refuse early what cannot be built on this machine.

    Raises:
        MissingDependencyError: the library is not installed.
        ValueError: compute capabilities are missing, or the library does not support them.
        RuntimeUnavailableError: the variant builds on a GPU and there is none.
    """
    variant = TRT_VARIANTS[settings.variant]
    library = variant.load()
    check_capabilities(library, variant, settings.compute_capabilities)
    if settings.compute_capabilities:
        return BuildTarget(settings, library.__version__, None, settings.compute_capabilities)
    gpu = current_gpu()
    if not variant.builds_without_gpu:
        if gpu is None:
            raise RuntimeUnavailableError(
                f"{variant.title} builds on the GPU that runs the engine, and PyTorch finds none: "
                "export on that machine, or use --runtime tensorrt-rtx with --compute-capabilities"
            )
        return BuildTarget(settings, library.__version__, gpu.name, (gpu.compute_capability,))
    supported = supported_capabilities(library)
    if gpu is None or gpu.compute_capability not in supported:
        found = "PyTorch finds no GPU" if gpu is None else f"{gpu.name} is {gpu.compute_capability}"
        raise ValueError(
            f"compute_capabilities is empty, and {found}; pass --compute-capabilities with the "
            f"GPUs that will run the engines; accepted: {', '.join(supported)}"
        )
    capabilities = (gpu.compute_capability,)
    filled = msgspec.structs.replace(settings, compute_capabilities=capabilities)
    return BuildTarget(filled, library.__version__, None, capabilities)


def build_engine(
    graph: Path,
    out: Path,
    *,
    spec: GraphSpec,
    precision: str,
    target: BuildTarget,
    cache: EngineCache,
    callbacks: BuildCallbacks | None = None,
) -> EngineRecord:
    """Write the engine of an ONNX file, from the cache if it was built before.

    Raises:
        EngineBuildError: the graph cannot be parsed or compiled.
    """
    callbacks = callbacks or BuildCallbacks()
    system = f"{platform.system()}-{platform.machine()}"
    key = EngineKey(target, hash_graph(graph), spec, precision, system)
    engine, was_cached = cache.get_or_build(
        key,
        out,
        build=lambda path: _build(graph, path, key, cache, callbacks.on_progress),
        on_wait=lambda: callbacks.on_note(f"another process is building {spec.name}: waiting"),
    )
    source = f"from the cache in {cache.root}" if was_cached else f"{engine.build_seconds:.1f} s"
    callbacks.on_note(f"{out.name}: {engine.size_bytes / 1e6:,.1f} MB, {source}")
    return engine


def _build(
    graph: Path, out: Path, key: EngineKey, cache: Cache, on_progress: Callable[[str], None]
) -> EngineRecord:
    """Build an engine, with the kernel timings of earlier builds on the same GPU."""
    target, settings = key.target, key.target.settings
    gpu = re.sub(r"[^A-Za-z0-9]+", "-", target.gpu or "")
    timing_name = f"{settings.variant}-{target.version}-{gpu}.cache"
    timings = cache.load_blob(TIMING_FOLDER, timing_name) if gpu else None
    built = build_engine_bytes(graph, key.spec, settings, timings, on_progress)
    if gpu and built.timing_cache:
        cache.save_blob(TIMING_FOLDER, timing_name, built.timing_cache)
    with out.open("wb") as file:
        file.write(built.data)
    return EngineRecord(
        variant=settings.variant,
        version=target.version,
        compute_capabilities=target.compute_capabilities,
        gpu=target.gpu,
        hardware_compatible=settings.hardware_compatible,
        version_compatible=settings.version_compatible,
        workspace_bytes=settings.workspace_bytes,
        graph_sha256=key.graph_sha256,
        sha256=hash_file(out),
        size_bytes=out.stat().st_size,
        build_seconds=built.seconds,
        network_layers=built.network_layers,
    )


def check_build_resources(graphs: list[Path], out: Path, cache: Cache) -> str:
    """Check the disk space for builds into a folder and the cache, and say what they take.

    Raises:
        EngineBuildError: there is too little disk space.
    """
    sizes = [graph_bytes(graph) for graph in graphs]
    memory = FIXED_MEMORY_BYTES + MEMORY_FACTOR * max(sizes)
    folders = (out, cache.root) if cache.is_writable() else (out,)
    devices = [folder.stat().st_dev for folder in folders]
    for folder, device in zip(folders, devices, strict=True):
        needed = 2 * sum(sizes) * devices.count(device)
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise EngineBuildError(
                f"the engines need about {needed / 1e9:.1f} GB of disk at {folder}, and "
                f"{free / 1e9:.1f} GB are free: free some space, or set COPRS_DEPLOY_CACHE to "
                "another folder"
            )
    return (
        f"building takes about {memory / 1e9:.1f} GB of memory, {2 * sum(sizes) / 1e9:.1f} GB "
        f"of disk for the bundle and as much for the cache in {cache.root}"
    )


def hash_graph(graph: Path) -> str:
    """Return the SHA-256 of a graph, external weights included."""
    files = graph_files(graph)
    if len(files) == 1:
        return hash_file(graph)
    return fingerprint(tuple(FileRecord(f.name, f.stat().st_size, hash_file(f)) for f in files))
