"""A checkpoint to a bundle, all or nothing: graphs, policy, equivalence, manifest."""

from __future__ import annotations

import copy
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from coprs_deploy.artifacts import check_replaceable, new_directory, record_files
from coprs_deploy.bundle import (
    MANIFEST_FILE,
    SCHEMA_VERSION,
    Bundle,
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
from coprs_deploy.engines import RunnerOptions, open_graph
from coprs_deploy.export.equivalence import (
    TOLERANCES,
    compare_stages,
    reference_opener,
    require_equivalence,
    sample_inputs,
)
from coprs_deploy.export.onnx_graph import OPSET, export_onnx_graph
from coprs_deploy.models.sam_encoder import AttentionForm
from coprs_deploy.specs import GRAPH_NAMES, IMAGE_ENCODER, TargetsProfile, graph_specs
from coprs_deploy.version import __version__, installed_versions

Progress = Callable[[str], None]

ATTENTION_FORMS: dict[str, AttentionForm] = {"onnxruntime": "bias"}
"""The form of relative positions that measured best in each runtime (see ``AttentionForm``)."""


@dataclass(frozen=True)
class ExportOptions:
    """How a checkpoint is exported.

    Attributes:
        runtime: which runtime shall run the graphs.
        precision: of weights and products.
        targets: how many concentrations one call takes.
        copy_policy: whether the policy is copied into the bundle; else it is referred to, from
            the bundle, so that both may move together.
        overwrite: whether a bundle that stands there may be replaced.
    """

    runtime: str = "onnxruntime"
    precision: str = "fp32"
    targets: TargetsProfile = field(default_factory=TargetsProfile)
    copy_policy: bool = True
    overwrite: bool = False

    def __post_init__(self) -> None:
        if (self.runtime, self.precision) not in TOLERANCES:
            known = ", ".join(f"{runtime} {precision}" for runtime, precision in TOLERANCES)
            raise ValueError(
                f"runtime and precision are {self.runtime} {self.precision}; accepted: {known}"
            )


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
) -> ExportReport:
    """Export a checkpoint; the bundle appears complete and proven equal, or not at all.

    Args:
        checkpoint: a checkpoint directory.
        out: where the bundle shall stand.
        options: how to export.
        progress: called with the name of each step as it starts.

    Raises:
        CheckpointError: the checkpoint is not usable.
        ArtifactError: ``out`` is taken.
        EquivalenceError: a graph is outside its tolerance; nothing is written.
    """
    options = options or ExportOptions()
    out = Path(out)
    source = checkpoint if isinstance(checkpoint, Checkpoint) else read_checkpoint(checkpoint)
    check_replaceable(out, MANIFEST_FILE, options.overwrite)
    clock = _StepClock(progress)
    clock.start("load checkpoint")
    model = load_segmentation_model(source)
    model.image_encoder.set_attention_form(ATTENTION_FORMS[options.runtime])
    # PyTorch's exporter keeps some small tensors alive, and one is enough to keep the checkpoint's
    # whole file mapped: the small stages are copies.
    stages = {
        name: stage if name == IMAGE_ENCODER else copy.deepcopy(stage)
        for name, stage in model.stages().items()
    }
    weights_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    geometry, width = source.config.model.geometry, source.config.model.policy_width
    specs = graph_specs(geometry, width, options.targets)
    clock.start("fingerprint checkpoint")
    checkpoint_fingerprint = source.fingerprint()
    with new_directory(out, MANIFEST_FILE, options.overwrite) as partial:
        for name in GRAPH_NAMES:
            clock.start(f"export {name}")
            metadata = {
                "graph": name,
                "version": __version__,
                "checkpoint": checkpoint_fingerprint,
                "opset": str(OPSET),
                "precision": options.precision,
            }
            export_onnx_graph(stages[name], specs[name], partial / f"{name}.onnx", metadata)
        peak_bytes_export = peak_memory_bytes()
        # The check maps the weights again, a stage at a time; the large ones are let go before.
        for parameter in model.parameters():
            parameter.data = parameter.data.new_empty(0)
        del model, stages

        tolerances = TOLERANCES[options.runtime, options.precision]
        records = compare_stages(
            reference=reference_opener(source, specs),
            candidate=lambda name: open_graph(
                options.runtime, partial / f"{name}.onnx", specs[name], RunnerOptions()
            ),
            samples=sample_inputs(geometry, width, options.targets.preferred),
            tolerances=tolerances,
            report=lambda step: clock.start(f"check {step}"),
        )
        require_equivalence(records, tolerances)

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
                name: GraphRecord(specs[name], options.runtime, options.precision, f"{name}.onnx")
                for name in GRAPH_NAMES
            },
            policy=PolicyRecord(
                path=policy_path,
                prompt=source.config.prompt,
                width=width,
                min_pixels=source.config.policy_image.min_pixels,
                max_pixels=source.config.policy_image.max_pixels,
                files=record_files(source.policy_path),
            ),
            files=files,
            toolchain=installed_versions(),
            gpu=None,
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


def peak_memory_bytes() -> int:
    """Largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


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
