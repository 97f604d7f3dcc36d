"""Export a checkpoint to a bundle: graphs, engines, equivalence check, policy, manifest.

The bundle is written as a whole or not at all.
"""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from coprs_deploy.artifacts import check_replaceable, new_directory, record_files
from coprs_deploy.bundle import (
    ENGINE_SUFFIX,
    MANIFEST_FILE,
    SCHEMA_VERSION,
    TRT_VARIANT_NAMES,
    Bundle,
    EngineRecord,
    EquivalenceRecord,
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
from coprs_deploy.engines.trt.build import BuildCallbacks
from coprs_deploy.engines.trt.cache import (
    BuildTarget,
    EngineCache,
    build_engine,
    check_build_resources,
    resolve_target,
)
from coprs_deploy.export.calibration import (
    CalibrationImages,
    CalibrationResult,
    check_calibration_images,
    find_calibration_images,
)
from coprs_deploy.export.graph_check import GraphCheck, can_run_here
from coprs_deploy.export.graph_writer import write_graph, write_int8_graph
from coprs_deploy.export.options import ExportOptions
from coprs_deploy.export.precision import INT8, OPSETS, graph_precision, rest_precision
from coprs_deploy.machine import installed_versions, peak_memory_bytes
from coprs_deploy.specs import GRAPH_NAMES, IMAGE_ENCODER, GraphSpec, graph_specs
from coprs_deploy.version import __version__

if TYPE_CHECKING:
    from coprs_deploy.models import SegmentationModel

Progress = Callable[[str], None]


@dataclass(frozen=True)
class ExportReport:
    """Result of an export, with its time and memory.

    Attributes:
        bundle: exported bundle.
        seconds: wall time by step.
        weights_bytes: size of the segmentation weights in float32.
        peak_bytes_export: peak memory of the process after writing the graphs.
        peak_bytes_total: peak memory of the process at the end, equivalence check included.
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
    callbacks: BuildCallbacks | None = None,
) -> ExportReport:
    """Export a checkpoint to a bundle that is proven equivalent to PyTorch.

    Args:
        checkpoint: checkpoint directory, or an opened checkpoint.
        out: bundle directory to write.
        options: export options.
        progress: called with the name of each step as it starts.
        callbacks: notes and progress of engine builds and calibration.

    Raises:
        CheckpointError: the checkpoint cannot be used.
        ArtifactError: ``out`` exists.
        ImageError: a calibration image cannot be read, or lies outside the valid region.
        ValueError: there are too few calibration images, or the aspect ratio saves nothing.
        EquivalenceError: a graph is outside its tolerance; nothing is written.
        EngineBuildError: an engine cannot be built; nothing is written.
        RuntimeUnavailableError: engines of this variant cannot be built here, or the processor
            cannot run the precision.
    """
    timer = _StepTimer(progress)
    job = _prepare(
        checkpoint, Path(out), options or ExportOptions(), timer, callbacks or BuildCallbacks()
    )
    with ExitStack() as stack:
        bundle_dir = stack.enter_context(
            new_directory(job.out, MANIFEST_FILE, job.options.overwrite)
        )
        # Beside the bundle rather than in a temporary directory, which may be in memory.
        scratch = stack.enter_context(new_scratch(job.out))
        graphs, calibration = _write_graphs(job, bundle_dir, scratch)
        peak_bytes_export = peak_memory_bytes()
        _release_weights(job.model)  # the check maps them again, one graph at a time
        check = GraphCheck(
            job.checkpoint,
            job.specs,
            job.options,
            lambda step: timer.start(f"check {step}"),
            scratch,
            calibration=calibration,
        )
        records, engines = check.graphs(graphs), dict[str, EngineRecord]()
        if job.target is not None:
            engines = _build_engines(job, job.target, graphs, bundle_dir)
            if can_run_here(job.target):
                records, engines = check.engines(bundle_dir, engines)
        records += check.dropped_padding()
        timer.start("write bundle")
        manifest = _write_manifest(job, bundle_dir, engines, records)
    timer.stop()
    return ExportReport(
        bundle=Bundle(job.out, manifest),
        seconds=timer.seconds,
        weights_bytes=job.weights_bytes,
        peak_bytes_export=peak_bytes_export,
        peak_bytes_total=peak_memory_bytes(),
    )


@dataclass(frozen=True)
class _Job:
    """Everything that the steps of one export share.

    Attributes:
        checkpoint: opened checkpoint.
        fingerprint: hash of the checkpoint.
        out: bundle directory.
        options: export options.
        target: what engines are built for; None for ONNX graphs.
        images: calibration images; None unless int8.
        model: segmentation model, its encoder restricted to the valid region.
        specs: graph name to inputs and outputs.
        precisions: graph name to precision.
        cache: cache of engines and calibration ranges.
        weights_bytes: size of the segmentation weights in float32.
        timer: announces and times the steps.
        callbacks: notes and progress of engine builds and calibration.
    """

    checkpoint: Checkpoint
    fingerprint: str
    out: Path
    options: ExportOptions
    target: BuildTarget | None
    images: CalibrationImages | None
    model: SegmentationModel
    specs: dict[str, GraphSpec]
    precisions: dict[str, str]
    cache: EngineCache
    weights_bytes: int
    timer: _StepTimer
    callbacks: BuildCallbacks


def _prepare(
    checkpoint: str | Path | Checkpoint,
    out: Path,
    options: ExportOptions,
    timer: _StepTimer,
    callbacks: BuildCallbacks,
) -> _Job:
    """Check everything that can be refused early, and load the model."""
    target = None
    if options.runtime in TRT_VARIANT_NAMES:
        target = resolve_target(options.build_settings())
    if (options.runtime, options.precision) == ("openvino", INT8):
        openvino_runner.require_int8_units()
    source = checkpoint if isinstance(checkpoint, Checkpoint) else read_checkpoint(checkpoint)
    check_replaceable(out, MANIFEST_FILE, options.overwrite)
    images = None
    if options.calibration_images is not None:
        images = find_calibration_images(options.calibration_images)
    timer.start("load checkpoint")
    model = load_segmentation_model(source)
    sizes, valid_region = source.config.model, None
    if options.aspect_ratio is not None:
        valid_region = sizes.sam.valid_region(
            options.aspect_ratio, drops_padding=options.drop_padding
        )
        model.image_encoder.set_valid_region(valid_region)
    if images is not None:
        check_calibration_images(images, sizes.geometry, valid_region)
    specs = graph_specs(
        sizes.geometry, sizes.policy_hidden_size, options.targets, options.images, valid_region
    )
    timer.start("fingerprint checkpoint")
    return _Job(
        checkpoint=source,
        fingerprint=source.fingerprint(),
        out=out,
        options=options,
        target=target,
        images=images,
        model=model,
        specs=specs,
        precisions={
            name: graph_precision(name, options.runtime, options.precision) for name in GRAPH_NAMES
        },
        cache=EngineCache(options.cache_dir),
        weights_bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
        timer=timer,
        callbacks=callbacks,
    )


def _write_graphs(
    job: _Job, bundle_dir: Path, scratch: Path
) -> tuple[dict[str, Path], CalibrationResult | None]:
    """Write the ONNX graphs, into the scratch directory if engines are built from them."""
    directory = bundle_dir if job.target is None else scratch
    graphs = {name: directory / f"{name}.onnx" for name in GRAPH_NAMES}
    calibration = None
    for name, module in job.model.graph_modules().items():
        job.timer.start(f"export {name}")
        metadata = {
            "graph": name,
            "version": __version__,
            "checkpoint": job.fingerprint,
            "opset": str(OPSETS[job.precisions[name]]),
            "precision": job.precisions[name],
        }
        if job.images is not None and name == IMAGE_ENCODER:
            calibration = write_int8_graph(
                module,
                job.specs[name],
                graphs[name],
                metadata,
                rest=rest_precision(job.options.runtime, job.options.precision),
                scratch=scratch,
                images=job.images,
                geometry=job.model.config.geometry,
                cache=job.cache,
                on_step=job.timer.start,
                on_progress=job.callbacks.on_progress,
            )
            continue
        # PyTorch's exporter keeps some small tensors alive, and one is enough to keep the whole
        # weight file mapped: the small modules are copied.
        write_graph(
            module if name == IMAGE_ENCODER else copy.deepcopy(module),
            job.specs[name],
            graphs[name],
            metadata,
            precision=job.precisions[name],
            scratch=scratch,
        )
    return graphs, calibration


def _release_weights(model: SegmentationModel) -> None:
    """Free the memory of all parameters."""
    for parameter in model.parameters():
        parameter.data = parameter.data.new_empty(0)


def _build_engines(
    job: _Job, target: BuildTarget, graphs: Mapping[str, Path], bundle_dir: Path
) -> dict[str, EngineRecord]:
    """Build the engine of every graph into the bundle."""
    job.callbacks.on_note(check_build_resources(list(graphs.values()), bundle_dir, job.cache))
    engines = {}
    for name, graph in graphs.items():
        job.timer.start(f"build {name}")
        engines[name] = build_engine(
            graph,
            bundle_dir / f"{name}{ENGINE_SUFFIX}",
            spec=job.specs[name],
            precision=job.precisions[name],
            target=target,
            cache=job.cache,
            callbacks=job.callbacks,
        )
    if job.options.max_cache_bytes is not None:
        num_removed = job.cache.prune(job.options.max_cache_bytes)
        job.callbacks.on_note(f"removed {num_removed} older engines from the cache")
    return engines


def _write_manifest(
    job: _Job,
    bundle_dir: Path,
    engines: Mapping[str, EngineRecord],
    records: tuple[EquivalenceRecord, ...],
) -> Manifest:
    """Copy the policy unless it is external, and write the manifest."""
    files = record_files(bundle_dir)  # the policy's are recorded separately
    policy = job.checkpoint.policy_path
    if job.options.external_policy:
        policy_path = Path(os.path.relpath(policy.resolve(), job.out.resolve())).as_posix()
    else:
        policy_path = POLICY_DIRECTORY
        shutil.copytree(policy, bundle_dir / POLICY_DIRECTORY)
    config = job.checkpoint.config
    suffix = ".onnx" if job.target is None else ENGINE_SUFFIX
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        package_version=__version__,
        checkpoint_fingerprint=job.fingerprint,
        checkpoint_note=str(config.provenance.get("note", "")),
        geometry=config.model.geometry,
        graphs={
            name: GraphRecord(
                spec=job.specs[name],
                runtime=job.options.runtime,
                precision=job.precisions[name],
                file=f"{name}{suffix}",
                engine=engines.get(name),
                calibration=job.images.record() if job.images and name == IMAGE_ENCODER else None,
            )
            for name in GRAPH_NAMES
        },
        policy=PolicyRecord(
            path=policy_path,
            prompt=config.prompt,
            hidden_size=config.model.policy_hidden_size,
            min_pixels=config.policy_image.min_pixels,
            max_pixels=config.policy_image.max_pixels,
            files=record_files(policy),
        ),
        files=files,
        toolchain=installed_versions(),
        gpu=job.target.gpu if job.target else None,
        equivalence=records,
    )
    write_manifest(bundle_dir, manifest)
    return manifest


@contextmanager
def new_scratch(out: Path) -> Iterator[Path]:
    """Yield a hidden temporary directory beside the bundle, for intermediate graphs."""
    parent = out.absolute().parent
    with tempfile.TemporaryDirectory(prefix=f".{out.absolute().name}.graphs-", dir=parent) as path:
        yield Path(path)


class _StepTimer:
    """Announce consecutive steps and measure their wall time."""

    def __init__(self, progress: Progress) -> None:
        self.seconds: dict[str, float] = {}
        self._progress = progress
        self._step = ""
        self._started = 0.0

    def start(self, step: str) -> None:
        """Finish the current step and start the next."""
        self.stop()
        self._progress(step)
        self._step, self._started = step, time.perf_counter()

    def stop(self) -> None:
        """Finish the current step."""
        if self._step:
            self.seconds[self._step] = time.perf_counter() - self._started
            self._step = ""
