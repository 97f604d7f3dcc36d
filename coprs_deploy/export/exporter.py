"""Export a checkpoint to a bundle: graphs, engines, equivalence check, policy, manifest.

The bundle is written as a whole or not at all.
"""

from __future__ import annotations

import copy
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from coprs_deploy.artifacts import check_replaceable, new_directory, record_files, scratch_directory
from coprs_deploy.bundle import (
    ENGINE_SUFFIX,
    MANIFEST_FILE,
    POLICY_GRAPHS_DIRECTORY,
    SCHEMA_VERSION,
    TRT_VARIANT_NAMES,
    Bundle,
    EngineRecord,
    EquivalenceRecord,
    GraphRecord,
    Manifest,
    PolicyGraphsRecord,
    PolicyRecord,
    write_manifest,
)
from coprs_deploy.checkpoint import (
    POLICY_DIRECTORY,
    SEGMENTATION_FILE,
    Checkpoint,
    check_values,
    load_segmentation_model,
    read_checkpoint,
)
from coprs_deploy.engines import openvino_runner
from coprs_deploy.engines.cuda import current_gpu
from coprs_deploy.engines.trt.build import BuildCallbacks
from coprs_deploy.engines.trt.cache import (
    BuildTarget,
    EngineCache,
    build_engine,
    check_build_resources,
    resolve_target,
)
from coprs_deploy.errors import ArtifactError, EquivalenceError
from coprs_deploy.export.block_errors import describe_int8_errors
from coprs_deploy.export.calibration import (
    CalibrationImages,
    Ranges,
    check_calibration_images,
    find_calibration_images,
)
from coprs_deploy.export.calibration_examples import CalibrationExamples, split_examples
from coprs_deploy.export.graph_check import GraphCheck, require_check_runtimes
from coprs_deploy.export.graph_writer import write_graph, write_int8_graph
from coprs_deploy.export.options import ExportOptions
from coprs_deploy.export.policy.compression import MAX_CALIBRATION_EXAMPLES, MAX_HELD_OUT
from coprs_deploy.export.precision import (
    FP32,
    INT8,
    OPSETS,
    rest_precision,
    write_rounded_graph,
)
from coprs_deploy.export.tolerances import TOLERANCES
from coprs_deploy.hub import hub_location
from coprs_deploy.images import load_image, prepare_image
from coprs_deploy.machine import installed_versions, peak_memory_bytes
from coprs_deploy.policy.compressed_weights import require_float_weights
from coprs_deploy.policy.policy_size import check_policy_size
from coprs_deploy.specs import GRAPH_NAMES, IMAGE_ENCODER, graph_specs
from coprs_deploy.version import __version__

SEED = 0
"""Seed of the samples; verify uses 1."""

Progress = Callable[[str], None]


@dataclass(frozen=True)
class ExportReport:
    """Result of an export, with its time and memory.

    Attributes:
        bundle: exported bundle.
        seconds: wall time by step; one that is repeated has the sum.
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
        ArtifactError: ``out`` exists, or is on the hub.
        ImageError: a calibration image cannot be read, or lies outside the valid region.
        ValueError: there are too few calibration images, or the aspect ratio saves nothing.
        EquivalenceError: a graph is outside its tolerance; nothing is written.
        EngineBuildError: an engine cannot be built; nothing is written.
        MissingDependencyError: a package that converts the policy is not installed.
        RuntimeUnavailableError: engines of this variant cannot be built here, the runtime that
            checks the graphs is not installed, or the processor cannot run the precision.
    """
    job = _Export(
        checkpoint, Path(out), options or ExportOptions(), progress, callbacks or BuildCallbacks()
    )
    with (
        new_directory(job.out, MANIFEST_FILE, job.options.overwrite) as bundle_dir,
        # Beside the bundle rather than in a temporary directory, which may be in memory.
        scratch_directory(job.out.absolute(), "graphs") as scratch,
    ):
        manifest = job.write(bundle_dir, scratch)
    job.timer.stop()
    return ExportReport(
        bundle=Bundle(job.out, manifest),
        seconds=job.timer.seconds,
        weights_bytes=job.weights_bytes,
        peak_bytes_export=job.peak_bytes_export,
        peak_bytes_total=peak_memory_bytes(),
    )


class _Export:
    """One export: what it needs, checked and loaded, and the steps that write the bundle."""

    def __init__(
        self,
        checkpoint: str | Path | Checkpoint,
        out: Path,
        options: ExportOptions,
        progress: Progress,
        callbacks: BuildCallbacks,
    ) -> None:
        if location := hub_location(out):
            raise ArtifactError(
                f"out is {location}, a location on the hub; export to a directory, and upload it "
                f"with `coprs-deploy push DIRECTORY {location}`"
            )
        self.out, self.options, self.callbacks = out, options, callbacks
        self.timer = _StepTimer(progress)
        self.target: BuildTarget | None = None
        if options.runtime in TRT_VARIANT_NAMES:
            self.target = resolve_target(options.build_settings())
        if (options.runtime, options.precision) == ("openvino", INT8):
            openvino_runner.require_int8_units()
        require_check_runtimes(options)
        if not isinstance(checkpoint, Checkpoint):
            checkpoint = read_checkpoint(checkpoint)
        if options.policy_runtime != "transformers":
            require_float_weights(
                checkpoint.policy_path, f"--policy-runtime {options.policy_runtime}"
            )
            from coprs_deploy.export.policy.graphs import require_converters

            require_converters(options.policy_precision)
        check_replaceable(out, MANIFEST_FILE, options.overwrite)
        self.images: CalibrationImages | None = None
        if options.calibration_images is not None:
            self.images = find_calibration_images(options.calibration_images)
        self.policy_examples: CalibrationExamples | None = None
        if options.policy_calibration is not None:
            self.policy_examples = split_examples(
                options.policy_calibration, MAX_CALIBRATION_EXAMPLES, MAX_HELD_OUT
            )
        self.timer.start("load checkpoint")
        self.checkpoint, config = checkpoint, checkpoint.config.model
        self.model = load_segmentation_model(checkpoint)
        check_policy_size(checkpoint.policy_path)
        check_values(self.model.state_dict(), str(checkpoint.path / SEGMENTATION_FILE))
        self.weights_bytes = sum(p.numel() * p.element_size() for p in self.model.parameters())
        valid_region = None
        if options.aspect_ratio is not None:
            valid_region = config.sam.valid_region(
                options.aspect_ratio, drops_padding=options.drop_padding
            )
            self.model.image_encoder.set_valid_region(valid_region)
        self.model.fold_batch_norms()
        if self.images is not None:
            check_calibration_images(self.images, config.geometry, valid_region)
        self.specs = graph_specs(
            config.geometry,
            config.policy_hidden_size,
            options.targets,
            options.images,
            valid_region,
        )
        self.rest = rest_precision(options.runtime, options.precision)
        self.precisions = dict.fromkeys(GRAPH_NAMES, self.rest)
        self.precisions[IMAGE_ENCODER] = options.precision  # the only graph with int8 products
        self.cache = EngineCache(options.cache_dir)
        self.peak_bytes_export = 0
        self.timer.start("fingerprint checkpoint")
        self.fingerprint = checkpoint.fingerprint()

    def write(self, bundle_dir: Path, scratch: Path) -> Manifest:
        """Write and check everything; ``scratch`` is for intermediate graphs."""
        directory = bundle_dir if self.target is None else scratch
        graphs = {name: directory / f"{name}.onnx" for name in GRAPH_NAMES}
        ranges = self._write_graphs(graphs, scratch)
        self.peak_bytes_export = peak_memory_bytes()
        for parameter in self.model.parameters():  # the check maps them again, graph by graph
            parameter.data = parameter.data.new_empty(0)
        geometry = self.checkpoint.config.model.geometry
        check = GraphCheck(
            self.checkpoint,
            self.specs,
            TOLERANCES[self.options.runtime, self.options.precision],
            lambda step: self.timer.start(f"check {step}"),
            seed=SEED,
            images=[
                prepare_image(load_image(path), geometry)
                for path in (self.images.held_out if self.images else ())
            ],
        )
        records = self._check_graphs(check, graphs, ranges, scratch)
        engines: dict[str, EngineRecord] = {}
        if self.target is not None:
            engines = self._build_engines(self.target, graphs, bundle_dir)
            gpu = current_gpu()
            if gpu is not None and gpu.compute_capability in self.target.compute_capabilities:
                records, engines = check.require_engines(engines, self.options.runtime, bundle_dir)
        records += check.dropped_padding()
        policy_graphs = self._write_policy_graphs(bundle_dir, scratch)
        self.timer.start("write bundle")
        return self._write_manifest(bundle_dir, engines, records, policy_graphs)

    def _write_graphs(self, graphs: Mapping[str, Path], scratch: Path) -> Ranges:
        """Write the ONNX graphs, and return the ranges of an int8 encoder."""
        ranges: Ranges = {}
        for name, module in self.model.graph_modules().items():
            self.timer.start(f"export {name}")
            metadata = {
                "graph": name,
                "version": __version__,
                "checkpoint": self.fingerprint,
                "opset": str(OPSETS[self.precisions[name]]),
                "precision": self.precisions[name],
            }
            spec, path = self.specs[name], graphs[name]
            if self.images is not None and name == IMAGE_ENCODER:
                ranges = write_int8_graph(
                    self.model.image_encoder,
                    spec,
                    path,
                    metadata,
                    rest=self.rest,
                    scratch=scratch,
                    images=self.images,
                    geometry=self.model.config.geometry,
                    cache=self.cache,
                    on_step=self.timer.start,
                    on_progress=self.callbacks.on_progress,
                )
                continue
            # PyTorch's exporter keeps some small tensors alive, and one is enough to keep the whole
            # weight file mapped: the small modules are copied.
            copied = module if name == IMAGE_ENCODER else copy.deepcopy(module)
            precision = self.precisions[name]
            write_graph(copied, spec, path, metadata, precision=precision, scratch=scratch)
        return ranges

    def _check_graphs(
        self, check: GraphCheck, graphs: Mapping[str, Path], ranges: Ranges, scratch: Path
    ) -> tuple[EquivalenceRecord, ...]:
        """Compare the ONNX graphs; if an int8 encoder is refused, list the error of each block."""
        try:
            return check.require_graphs(graphs, self.options, scratch)
        except EquivalenceError as error:
            if not ranges:
                raise
            self.timer.start("check error of each block")
            path, spec = graphs[IMAGE_ENCODER], self.specs[IMAGE_ENCODER]
            if self.rest != FP32:
                path = scratch / f"{IMAGE_ENCODER}.rounded.onnx"
                write_rounded_graph(graphs[IMAGE_ENCODER], path)
            encoder = load_segmentation_model(self.checkpoint).image_encoder
            encoder.set_valid_region(spec.valid_region)
            image = check.samples[0].prepared.image
            lines = describe_int8_errors(encoder, path, spec, image, ranges)
            raise EquivalenceError(
                f"{error}\n{lines}\nWhat to try: more images in --calibration, of the kind that "
                "the model will see, or --precision fp16"
            ) from error

    def _build_engines(
        self, target: BuildTarget, graphs: Mapping[str, Path], bundle_dir: Path
    ) -> dict[str, EngineRecord]:
        """Build the engine of every graph into the bundle."""
        note = self.callbacks.on_note
        note(check_build_resources(list(graphs.values()), bundle_dir, self.cache))
        engines = {}
        for name, graph in graphs.items():
            self.timer.start(f"build {name}")
            engines[name] = build_engine(
                graph,
                bundle_dir / f"{name}{ENGINE_SUFFIX}",
                spec=self.specs[name],
                precision=self.precisions[name],
                target=target,
                cache=self.cache,
                callbacks=self.callbacks,
            )
        if self.options.max_cache_bytes is not None:
            num_removed = self.cache.prune(self.options.max_cache_bytes)
            note(f"removed {num_removed} older engines from the cache")
        return engines

    def _write_policy_graphs(self, bundle_dir: Path, scratch: Path) -> PolicyGraphsRecord | None:
        """Convert the policy and compare it with PyTorch, if the options say so."""
        if self.options.policy_runtime == "transformers":
            return None
        from coprs_deploy.export.policy.export import PolicyExport

        return PolicyExport(
            checkpoint=self.checkpoint,
            graphs=bundle_dir / POLICY_GRAPHS_DIRECTORY,
            precision=self.options.policy_precision,
            calibration=self.policy_examples,
            allow_inexact=self.options.allow_inexact_policy,
            report=self.timer.start,
            note=self.callbacks.on_note,
        ).write(scratch)

    def _write_manifest(
        self,
        bundle_dir: Path,
        engines: Mapping[str, EngineRecord],
        records: tuple[EquivalenceRecord, ...],
        policy_graphs: PolicyGraphsRecord | None,
    ) -> Manifest:
        """Copy the policy unless it is external, and write the manifest."""
        files = record_files(bundle_dir)  # the policy's are recorded separately
        policy = self.checkpoint.policy_path
        policy_path: str | None = POLICY_DIRECTORY
        if self.options.policy_runtime == "openvino":
            policy_path = None
        elif self.options.external_policy:
            policy_path = Path(os.path.relpath(policy.resolve(), self.out.resolve())).as_posix()
        else:
            shutil.copytree(policy, bundle_dir / POLICY_DIRECTORY)
        config = self.checkpoint.config
        suffix = ".onnx" if self.target is None else ENGINE_SUFFIX
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            package_version=__version__,
            checkpoint_fingerprint=self.fingerprint,
            checkpoint_note=str(config.provenance.get("note", "")),
            image_encoder=config.model.sam.encoder_name,
            geometry=config.model.geometry,
            graphs={
                name: GraphRecord(
                    spec=self.specs[name],
                    runtime=self.options.runtime,
                    precision=self.precisions[name],
                    file=f"{name}{suffix}",
                    engine=engines.get(name),
                    calibration=self.images.record()
                    if self.images and name == IMAGE_ENCODER
                    else None,
                )
                for name in GRAPH_NAMES
            },
            policy=PolicyRecord(
                path=policy_path,
                prompt=config.prompt,
                hidden_size=config.model.policy_hidden_size,
                min_pixels=config.policy_image.min_pixels,
                max_pixels=config.policy_image.max_pixels,
                files=record_files(policy) if policy_path else (),
                quantization=config.policy_quantization,
            ),
            files=files,
            toolchain=installed_versions(),
            gpu=self.target.gpu if self.target else None,
            equivalence=records,
            policy_graphs=policy_graphs,
        )
        write_manifest(bundle_dir, manifest)
        return manifest


class _StepTimer:
    """Announce consecutive steps and measure their wall time, as a sum if one is repeated."""

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
            seconds = time.perf_counter() - self._started
            self.seconds[self._step] = self.seconds.get(self._step, 0.0) + seconds
            self._step = ""
