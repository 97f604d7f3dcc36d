"""A checkpoint to a bundle, all or nothing: graphs, policy, equivalence, manifest."""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from coprs_deploy.artifacts import check_replaceable, new_directory, record_files
from coprs_deploy.bundle import (
    ENGINE_SUFFIX,
    MANIFEST_FILE,
    SCHEMA_VERSION,
    TRT_VARIANT_NAMES,
    Bundle,
    EngineRecord,
    GraphRecord,
    Manifest,
    PolicyRecord,
    write_manifest,
)
from coprs_deploy.checkpoint import (
    POLICY_DIRECTORY,
    Checkpoint,
    load_segmentation_model,
    read_checkpoint,
)
from coprs_deploy.engines import openvino_runner
from coprs_deploy.engines.cache import BuildCache
from coprs_deploy.engines.trt.cache import BuildCallbacks, build_engine, resolve_target, state_need
from coprs_deploy.export.calibration import find_pictures, require_pictures_inside
from coprs_deploy.export.graph_check import GraphCheck, can_run_here
from coprs_deploy.export.graph_writer import write_graph, write_int8_graph
from coprs_deploy.export.options import ExportOptions
from coprs_deploy.export.precision import (
    INT8,
    OPSETS,
    graph_precision,
    rest_precision,
)
from coprs_deploy.machine import installed_versions, peak_memory_bytes
from coprs_deploy.specs import (
    GRAPH_NAMES,
    IMAGE_ENCODER,
    graph_specs,
)
from coprs_deploy.version import __version__

Progress = Callable[[str], None]


@dataclass(frozen=True)
class ExportReport:
    """What an export made and what it took.

    Attributes:
        bundle: the bundle on disk.
        seconds: wall time a step.
        weights_bytes: size of the segmentation weights in float32.
        peak_bytes_export: peak memory of the process when the last graph had been written.
        peak_bytes_total: peak memory of the process at the end, the equivalence check included.
    """

    bundle: Bundle
    seconds: dict[str, float]
    weights_bytes: int
    peak_bytes_export: int
    peak_bytes_total: int


def export_checkpoint(
    checkpoint: str | Path | Checkpoint,
    out: str | Path,
    options: ExportOptions | None = None,
    progress: Progress = lambda step: None,
    watch: BuildCallbacks | None = None,
) -> ExportReport:
    """Export a checkpoint; the bundle appears complete and proven equal, or not at all.

    Args:
        checkpoint: a checkpoint directory.
        out: where the bundle shall stand.
        options: how to export.
        progress: called with the name of each step as it starts.
        watch: who listens to the build of engines.

    Raises:
        CheckpointError: the checkpoint is not usable.
        ArtifactError: ``out`` is taken.
        ImageError: a picture of the calibration cannot be read, or reaches beyond the aspect.
        ValueError: there are too few of them, or the aspect saves nothing.
        EquivalenceError: a graph is outside its tolerance; nothing is written.
        EngineBuildError: an engine cannot be built; nothing is written.
        RuntimeUnavailableError: engines of this flavor cannot be built here, or this processor has
            no units for the precision.
    """
    options, watch = options or ExportOptions(), watch or BuildCallbacks()
    out = Path(out)
    builds_engines = options.runtime in TRT_VARIANT_NAMES
    target = resolve_target(options.build_settings()) if builds_engines else None
    if (options.runtime, options.precision) == ("openvino", INT8):
        openvino_runner.require_int8_units()
    source = checkpoint if isinstance(checkpoint, Checkpoint) else read_checkpoint(checkpoint)
    check_replaceable(out, MANIFEST_FILE, options.overwrite)
    pictures = None if options.calibration is None else find_pictures(options.calibration)
    clock = _StepClock(progress)
    clock.start("load checkpoint")
    model = load_segmentation_model(source)
    # PyTorch's exporter keeps some small tensors alive, and one is enough to keep the checkpoint's
    # whole file mapped: the small stages are copies.
    stages = {
        name: stage if name == IMAGE_ENCODER else copy.deepcopy(stage)
        for name, stage in model.stages().items()
    }
    weights_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    geometry, width = source.config.model.geometry, source.config.model.policy_hidden_size
    valid_region = None
    if options.aspect_ratio is not None:
        sam = source.config.model.sam
        valid_region = sam.picture_extent(options.aspect_ratio, drops_padding=options.drop_padding)
        model.image_encoder.set_picture_extent(valid_region)
    if pictures is not None:
        require_pictures_inside(pictures, geometry, valid_region)
    specs = graph_specs(geometry, width, options.targets, options.images, valid_region)
    clock.start("fingerprint checkpoint")
    checkpoint_fingerprint = source.fingerprint()
    with ExitStack() as stack:
        partial = stack.enter_context(new_directory(out, MANIFEST_FILE, options.overwrite))
        # Beside the bundle rather than in a temporary folder, which may be in memory.
        scratch = stack.enter_context(new_scratch(out))
        graphs = {
            name: (scratch if builds_engines else partial) / f"{name}.onnx" for name in GRAPH_NAMES
        }
        cache = BuildCache(options.cache)
        precisions = {
            name: graph_precision(name, options.runtime, options.precision) for name in GRAPH_NAMES
        }
        calibrated = None
        for name in GRAPH_NAMES:
            clock.start(f"export {name}")
            metadata = {
                "graph": name,
                "version": __version__,
                "checkpoint": checkpoint_fingerprint,
                "opset": str(OPSETS[precisions[name]]),
                "precision": precisions[name],
            }
            if pictures is not None and name == IMAGE_ENCODER:
                calibrated = write_int8_graph(
                    stages[name],
                    specs[name],
                    graphs[name],
                    metadata,
                    rest=rest_precision(options.runtime, options.precision),
                    scratch=scratch,
                    pictures=pictures,
                    geometry=geometry,
                    cache=cache,
                    progress=clock.start,
                    watch=watch,
                )
                continue
            write_graph(
                stages[name],
                specs[name],
                graphs[name],
                metadata,
                precision=precisions[name],
                scratch=scratch,
            )
        peak_bytes_export = peak_memory_bytes()
        # The check maps the weights again, a stage at a time; the large ones are let go before.
        for parameter in model.parameters():
            parameter.data = parameter.data.new_empty(0)
        del model, stages

        check = GraphCheck(
            source,
            specs,
            options,
            lambda step: clock.start(f"check {step}"),
            scratch,
            calibrated=calibrated,
        )
        records = check.graphs(graphs)
        engines: dict[str, EngineRecord] = {}
        if target is not None:
            watch.note(state_need(list(graphs.values()), partial, cache))
            for name in GRAPH_NAMES:
                clock.start(f"build {name}")
                plan = partial / f"{name}{ENGINE_SUFFIX}"
                engines[name] = build_engine(
                    graphs[name],
                    plan,
                    spec=specs[name],
                    precision=precisions[name],
                    target=target,
                    cache=cache,
                    watch=watch,
                )
            if options.cache_limit_bytes is not None:
                num_removed = cache.prune(options.cache_limit_bytes)
                watch.note(f"removed {num_removed} older engines from the cache")
            if can_run_here(target):
                records, engines = check.engines(partial, engines)
        records += check.dropped_padding()

        clock.start("write bundle")
        files = record_files(partial)
        if options.copy_policy:
            shutil.copytree(source.policy_path, partial / POLICY_DIRECTORY)
        policy_path = POLICY_DIRECTORY
        if not options.copy_policy:
            policy_path = Path(
                os.path.relpath(source.policy_path.resolve(), out.resolve())
            ).as_posix()
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            package_version=__version__,
            checkpoint_fingerprint=checkpoint_fingerprint,
            checkpoint_note=str(source.config.provenance.get("note", "")),
            geometry=geometry,
            graphs={
                name: GraphRecord(
                    spec=specs[name],
                    runtime=options.runtime,
                    precision=precisions[name],
                    file=f"{name}{ENGINE_SUFFIX if builds_engines else '.onnx'}",
                    engine=engines.get(name),
                    calibration=pictures.record() if pictures and name == IMAGE_ENCODER else None,
                )
                for name in GRAPH_NAMES
            },
            policy=PolicyRecord(
                path=policy_path,
                prompt=source.config.prompt,
                hidden_size=width,
                min_pixels=source.config.policy_image.min_pixels,
                max_pixels=source.config.policy_image.max_pixels,
                files=record_files(source.policy_path),
            ),
            files=files,
            toolchain=installed_versions(),
            gpu=target.gpu if target else None,
            equivalence=records,
        )
        write_manifest(partial, manifest)
    clock.stop()
    return ExportReport(
        bundle=Bundle(out, manifest),
        seconds=clock.seconds,
        weights_bytes=weights_bytes,
        peak_bytes_export=peak_bytes_export,
        peak_bytes_total=peak_memory_bytes(),
    )


@contextmanager
def new_scratch(out: Path) -> Iterator[Path]:
    """Give a hidden folder beside the bundle, for graphs that do not stay."""
    parent = out.absolute().parent
    with tempfile.TemporaryDirectory(prefix=f".{out.absolute().name}.graphs-", dir=parent) as path:
        yield Path(path)


class _StepClock:
    """Announce steps and time them, one after the other."""

    def __init__(self, progress: Progress) -> None:
        self.seconds: dict[str, float] = {}
        self._progress = progress
        self._step = ""
        self._since = 0.0

    def start(self, step: str) -> None:
        self.stop()
        self._progress(step)
        self._step, self._since = step, time.perf_counter()

    def stop(self) -> None:
        if self._step:
            self.seconds[self._step] = time.perf_counter() - self._since
            self._step = ""
