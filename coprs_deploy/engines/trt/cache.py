"""From an ONNX graph to an engine file, through the cache of engines that were built before."""

from __future__ import annotations

import platform
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from coprs_deploy.artifacts import FileRecord, fingerprint, hash_file
from coprs_deploy.bundle import EngineRecord
from coprs_deploy.engines.cache import BuildCache, EngineKey
from coprs_deploy.engines.cuda import current_gpu
from coprs_deploy.engines.trt.build import BUILDER_REVISION, BuildSettings, build_engine_bytes
from coprs_deploy.engines.trt.variants import TRT_VARIANTS, check_capabilities, known_capabilities
from coprs_deploy.errors import EngineBuildError, RuntimeUnavailableError
from coprs_deploy.specs import GraphSpec

TIMING_CACHE_FOLDER = "timing"

MEMORY_FACTOR = 4
"""Peak memory of a build in multiples of its graph (ViT-B, TensorRT for RTX 1.7: 4.0)."""

FIXED_MEMORY_BYTES = 500_000_000
"""What the libraries take before any graph is read."""


@dataclass(frozen=True)
class BuildCallbacks:
    """Who listens to a build.

    Attributes:
        note: called with a line that stays.
        phase: called often, from another thread, with what the library does right now.
    """

    note: Callable[[str], None] = lambda line: None
    phase: Callable[[str], None] = lambda text: None


@dataclass(frozen=True)
class BuildTarget:
    """What engines are built for, resolved on this machine before anything is exported.

    Attributes:
        settings: with the compute capabilities filled in where the flavor takes a list.
        version: of the library.
        gpu: name of the GPU that builds; None without one.
        capabilities: what the engines run on.
    """

    settings: BuildSettings
    version: str
    gpu: str | None
    capabilities: tuple[str, ...]


def resolve_target(settings: BuildSettings) -> BuildTarget:
    """Find out what to build for, and refuse early what cannot be built here.

    Raises:
        MissingDependencyError: the library is not installed.
        ValueError: the GPUs are not named, or not ones that the library knows.
        RuntimeUnavailableError: the flavor needs a GPU and there is none.
    """
    variant = TRT_VARIANTS[settings.variant]
    library = variant.load()
    check_capabilities(library, variant, settings.gpus)
    if settings.gpus:
        return BuildTarget(settings, library.__version__, None, settings.gpus)
    gpu = current_gpu()
    if not variant.builds_without_gpu:
        if gpu is None:
            raise RuntimeUnavailableError(
                f"{variant.title} builds on the GPU that runs the engine, and PyTorch sees none "
                "here: export there, or take --runtime tensorrt-rtx with --gpu"
            )
        here = (gpu.compute_capability,)
        return BuildTarget(settings, library.__version__, gpu.name, here)
    known = known_capabilities(library)
    if gpu is None or gpu.compute_capability not in known:
        found = "there is none here" if gpu is None else f"{gpu.name} is {gpu.compute_capability}"
        raise ValueError(
            f"gpu is not named, and {found}; pass --gpu with what shall run the engines, of "
            f"{', '.join(known)}"
        )
    here = (gpu.compute_capability,)
    return BuildTarget(replace(settings, gpus=here), library.__version__, None, here)


def build_engine(
    graph: Path,
    out: Path,
    *,
    spec: GraphSpec,
    precision: str,
    target: BuildTarget,
    cache: BuildCache,
    watch: BuildCallbacks | None = None,
) -> EngineRecord:
    """Write the engine of a graph; it is taken from the cache when it was built before.

    Args:
        graph: an ONNX file; external weights stand beside it under its name.
        out: the plan file to write.
        spec: the graph's inputs and outputs.
        precision: the precision that its tensors have.
        target: what to build for.
        cache: engines that were built before.
        watch: who listens.

    Raises:
        EngineBuildError: it cannot be built, or there is no room for it.
        KeyboardInterrupt: Ctrl-C; nothing is written.
    """
    watch = watch or BuildCallbacks()
    settings = target.settings
    graph_hash = hash_graph(graph)
    key = EngineKey(
        revision=BUILDER_REVISION,
        variant=settings.variant,
        version=target.version,
        graph_sha256=graph_hash,
        spec=spec,
        precision=precision,
        workspace_bytes=settings.workspace_bytes,
        version_compatible=settings.version_compatible,
        hardware_compatible=settings.hardware_compatible,
        gpus=target.capabilities,
        gpu=target.gpu,
        platform=f"{platform.system()}-{platform.machine()}",
    )

    def build(plan_path: Path) -> EngineRecord:
        name = _timing_name(target)
        timing = cache.load_blob(TIMING_CACHE_FOLDER, name) if target.gpu else None
        built = build_engine_bytes(graph, spec, settings, timing, watch.phase)
        if target.gpu and built.timing_cache:
            cache.keep_blob(TIMING_CACHE_FOLDER, name, built.timing_cache)
        with plan_path.open("wb") as file:
            file.write(built.plan)
        return EngineRecord(
            variant=settings.variant,
            version=target.version,
            compute_capabilities=target.capabilities,
            gpu=target.gpu,
            hardware_compatible=settings.hardware_compatible,
            version_compatible=settings.version_compatible,
            workspace_bytes=settings.workspace_bytes,
            graph_sha256=graph_hash,
            sha256=hash_file(plan_path),
            size_bytes=plan_path.stat().st_size,
            build_seconds=built.seconds,
            network_layers=built.network_layers,
        )

    def wait() -> None:
        watch.note(f"another process builds {spec.name}: waiting for it")

    engine, was_cached = cache.get_or_build(key, out, build, wait)
    source = f"from the cache in {cache.root}" if was_cached else f"{engine.build_seconds:.1f} s"
    watch.note(f"{out.name}: {engine.size_bytes / 1e6:,.1f} MB, {source}")
    return engine


def state_need(graphs: list[Path], out: Path, cache: BuildCache) -> str:
    """Say what memory and disk the builds of these graphs take, one after the other.

    Raises:
        EngineBuildError: a disk has less room than that.
    """
    sizes = [graph_bytes(graph) for graph in graphs]
    memory = FIXED_MEMORY_BYTES + MEMORY_FACTOR * max(sizes)
    cache.root.mkdir(parents=True, exist_ok=True)
    room: dict[int, tuple[Path, int]] = {}
    for folder in (out, cache.root):
        device = folder.stat().st_dev
        room[device] = (folder, room.get(device, (folder, 0))[1] + 2 * sum(sizes))
    for folder, needed in room.values():
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise EngineBuildError(
                f"the engines need about {needed / 1e9:.1f} GB of disk at {folder}, and "
                f"{free / 1e9:.1f} GB are free: make room, or name another cache folder with "
                "COPRS_DEPLOY_CACHE"
            )
    return (
        f"building takes about {memory / 1e9:.1f} GB of memory, and {2 * sum(sizes) / 1e9:.1f} GB "
        f"of disk for the bundle and as much for the cache in {cache.root}"
    )


def hash_graph(graph: Path) -> str:
    """Name a graph by its contents, external weights included."""
    data = graph.with_name(f"{graph.name}.data")
    if not data.exists():
        return hash_file(graph)
    files = (FileRecord(f.name, f.stat().st_size, hash_file(f)) for f in (graph, data))
    return fingerprint(tuple(files))


def graph_bytes(graph: Path) -> int:
    """Size of a graph with its external weights."""
    data = graph.with_name(f"{graph.name}.data")
    return graph.stat().st_size + (data.stat().st_size if data.exists() else 0)


def _timing_name(target: BuildTarget) -> str:
    gpu = re.sub(r"[^A-Za-z0-9]+", "-", target.gpu or "none")
    return f"{target.settings.variant}-{target.version}-{gpu}.cache"
