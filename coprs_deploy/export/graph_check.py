"""Equivalence checks of one export: graphs, engines, and the effect of dropping the padding.

A graph of lower precision is checked with its roundings written out as float32 operations, which
shows on any CPU what a GPU computes. Engines are checked if a GPU here can run them.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np

from coprs_deploy.bundle import ENGINE_SUFFIX, EngineRecord, EquivalenceRecord
from coprs_deploy.checkpoint import Checkpoint, load_segmentation_model
from coprs_deploy.engines import ONNX_RUNTIMES, Runner, RunnerOptions, open_graph
from coprs_deploy.engines.cuda import current_gpu
from coprs_deploy.engines.runner import Array
from coprs_deploy.engines.trt.cache import BuildTarget
from coprs_deploy.engines.trt.runner import TrtRunner, UnverifiedEngineWarning
from coprs_deploy.errors import EquivalenceError
from coprs_deploy.export.block_errors import block_errors, describe
from coprs_deploy.export.calibration import CalibrationResult
from coprs_deploy.export.equivalence import (
    compare_graphs,
    reference_opener,
    require_equivalence,
    summarize,
)
from coprs_deploy.export.options import ExportOptions
from coprs_deploy.export.precision import FP32, rest_precision, write_rounded_graph
from coprs_deploy.export.samples import (
    RunnerOpener,
    SampleInput,
    draw_masked_samples,
    sample_inputs,
)
from coprs_deploy.export.tolerances import TOLERANCES, Tolerance
from coprs_deploy.images import load_image, mask_cells, prepare_image
from coprs_deploy.specs import IMAGE_ENCODER, MASK_DECODER, PRIOR, GraphSpec

CPU_RUNTIME = "onnxruntime"
"""Runtime that checks the graphs of runtimes that need a GPU."""

INT8_ADVICE = (
    "What to try: more images in --calibration, of the kind that the model will see, or "
    "--precision fp16"
)

WITHOUT_PADDING = "without_padding"
"""Name of the record of dropping the padding, beside the names of the graphs."""

NO_TOLERANCE = Tolerance(
    math.inf,
    math.inf,
    -1.0,
    0.0,
    "deliberately a different function; its masks have to be evaluated on images of its use",
    pools_masks=True,
)


class GraphCheck:
    """Compare everything that an export writes with PyTorch.

    The tolerances are those of the export's runtime and precision. All comparisons use the same
    samples, so that the reference runs once.

    Args:
        checkpoint: exported checkpoint.
        specs: graph name to inputs and outputs.
        options: export options.
        report: called with the name of each step as it starts.
        scratch: directory for intermediate graphs.
        calibration: calibration of an int8 encoder; None for other precisions.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        specs: Mapping[str, GraphSpec],
        options: ExportOptions,
        report: Callable[[str], None],
        scratch: Path,
        *,
        calibration: CalibrationResult | None = None,
    ) -> None:
        self._checkpoint = checkpoint
        self._specs = specs
        self._options = options
        self._report = report
        self._scratch = scratch
        self._calibration = calibration
        self._samples: list[SampleInput] = []
        self._known: dict[str, list[Array]] = {}
        self._tolerances = TOLERANCES[options.runtime, options.precision]

    def graphs(self, graphs: Mapping[str, Path]) -> tuple[EquivalenceRecord, ...]:
        """Compare the ONNX graphs.

        Raises:
            EquivalenceError: a graph is outside its tolerance; for an int8 encoder the error of
                each block is listed.
        """
        records: tuple[EquivalenceRecord, ...] = ()
        runtime = self._options.runtime if self._options.runtime in ONNX_RUNTIMES else CPU_RUNTIME
        rest = rest_precision(self._options.runtime, self._options.precision)
        is_rounded = rest != FP32
        try:
            if is_rounded:
                records = self._compare(
                    lambda name: self._open_rounded(name, graphs[name]), "rounded "
                )
            if not is_rounded or self._options.runtime in ONNX_RUNTIMES:
                records = self._compare(lambda name: self._open_cpu(name, graphs[name], runtime))
        except EquivalenceError as error:
            if self._calibration is None:
                raise
            lines = self._block_errors(graphs[IMAGE_ENCODER], self._calibration, is_rounded)
            raise EquivalenceError(f"{error}\n{lines}\n{INT8_ADVICE}") from error
        return records

    def engines(
        self, directory: Path, engines: Mapping[str, EngineRecord]
    ) -> tuple[tuple[EquivalenceRecord, ...], dict[str, EngineRecord]]:
        """Compare the engines on this machine's GPU.

        Returns:
            The equivalence records, and the engine records with layers, memory and GPU.

        Raises:
            EquivalenceError: an engine is outside its tolerance.
        """
        verified = dict(engines)
        # The host code of version-compatible engines is trusted: they were built just now.
        options = RunnerOptions(device="cuda", allow_engine_host_code=True)

        def open_engine(name: str) -> Runner:
            path = directory / f"{name}{ENGINE_SUFFIX}"
            runner, verified[name] = open_unverified(
                self._options.runtime, path, self._specs[name], engines[name], options
            )
            return runner

        return self._compare(open_engine, "engine "), verified

    def dropped_padding(self) -> tuple[EquivalenceRecord, ...]:
        """Measure the effect of dropping the padding; empty if the encoder computes it."""
        if not self._specs[IMAGE_ENCODER].drops_padding:
            return ()
        self._report("dropped padding")
        embeddings = self._known[IMAGE_ENCODER]
        return (measure_dropped_padding(self._checkpoint, self._specs, self._samples, embeddings),)

    def _compare(
        self, candidate: RunnerOpener, step_prefix: str = ""
    ) -> tuple[EquivalenceRecord, ...]:
        reference = reference_opener(self._checkpoint, self._specs)
        if not self._samples:
            self._draw_samples(reference)
        records = compare_graphs(
            reference=reference,
            candidate=candidate,
            samples=self._samples,
            tolerances=self._tolerances,
            report=lambda step: self._report(f"{step_prefix}{step}"),
            known=self._known,
        )
        require_equivalence(records, self._tolerances)
        return records

    def _draw_samples(self, reference: RunnerOpener) -> None:
        """Draw random samples, or use the held-out calibration images."""
        config = self._checkpoint.config.model
        geometry, hidden_size = config.geometry, config.policy_hidden_size
        count = self._options.targets.opt
        if self._calibration is None:
            self._samples = sample_inputs(
                geometry, hidden_size, count, valid_region=self._specs[IMAGE_ENCODER].valid_region
            )
            return
        self._report("reference")
        images = [
            prepare_image(load_image(path), geometry) for path in self._calibration.images.held_out
        ]
        self._samples, self._known = draw_masked_samples(images, reference, hidden_size, count)

    def _block_errors(self, graph: Path, calibration: CalibrationResult, is_rounded: bool) -> str:
        """Describe the error of each block of a refused encoder, on one image."""
        self._report("error of each block")
        path = graph
        if is_rounded:
            path = self._scratch / f"{IMAGE_ENCODER}.rounded.onnx"
            write_rounded_graph(graph, path)
        encoder, spec = (
            load_segmentation_model(self._checkpoint).image_encoder,
            self._specs[IMAGE_ENCODER],
        )
        encoder.set_valid_region(spec.valid_region)
        errors = block_errors(
            encoder,
            path,
            lambda path, spec: open_graph(CPU_RUNTIME, path, spec, RunnerOptions()),
            spec,
            images=[self._samples[0].prepared.image],
            ranges=calibration.ranges,
        )
        return describe(errors)

    def _open_cpu(self, name: str, graph: Path, runtime: str = CPU_RUNTIME) -> Runner:
        return open_graph(runtime, graph, self._specs[name], RunnerOptions())

    def _open_rounded(self, name: str, graph: Path) -> Runner:
        path = self._scratch / f"{name}.rounded.onnx"
        write_rounded_graph(graph, path)
        runner = self._open_cpu(name, path)
        for written in self._scratch.glob(f"{path.name}*"):  # the session has read it
            written.unlink()
        return runner


def can_run_here(target: BuildTarget) -> bool:
    """Return whether this machine's GPU is one that the engines were built for."""
    gpu = current_gpu()
    return gpu is not None and gpu.compute_capability in target.compute_capabilities


def open_unverified(
    runtime: str, path: Path, spec: GraphSpec, engine: EngineRecord, options: RunnerOptions
) -> tuple[Runner, EngineRecord]:
    """Open an engine to verify it, without the warning that it never ran.

    Returns:
        The runner, and the engine's record with layers, memory and GPU as read back.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnverifiedEngineWarning)
        runner = open_graph(runtime, path, spec, options, engine)
    if isinstance(runner, TrtRunner):
        engine = msgspec.structs.replace(
            engine,
            layers=runner.layers,
            device_memory_bytes=runner.device_memory_bytes,
            verified_on=runner.gpu_name,
        )
    return runner, engine


def measure_dropped_padding(
    checkpoint: Checkpoint,
    specs: Mapping[str, GraphSpec],
    samples: Sequence[SampleInput],
    embeddings: Sequence[Array],
) -> EquivalenceRecord:
    """Compare masks with and without padding in the encoder, in PyTorch and float32.

    Args:
        checkpoint: weights.
        specs: graph name to inputs and outputs; the encoder drops the padding.
        samples: images; concentrations with usable masks are drawn for them.
        embeddings: embedding of each image from PyTorch's encoder without padding.

    Returns:
        The record of the mask logits inside the images; its mask IoU is the cIoU.
    """
    whole = msgspec.structs.replace(specs[IMAGE_ENCODER], valid_region=None)
    opener = reference_opener(checkpoint, {**specs, IMAGE_ENCODER: whole})
    config = checkpoint.config.model
    masked_samples, known = draw_masked_samples(
        [sample.prepared for sample in samples],
        opener,
        config.policy_hidden_size,
        specs[PRIOR].targets.opt,
    )
    found, expected = list[Array](), list[Array]()
    with opener(PRIOR) as prior, opener(MASK_DECODER) as decoder:
        for sample, embedding, whole_masks in zip(
            masked_samples, embeddings, known[MASK_DECODER], strict=True
        ):
            priors = prior(image_embedding=embedding, concentration=sample.concentration)
            masks = decoder(
                image_embedding=embedding,
                prior_logits=priors["prior_logits"],
                unpadded_size=sample.prepared.unpadded_size,
            )
            height, width = mask_cells(sample.prepared.unpadded_size, config.geometry)
            found.append(np.ravel(masks["mask_logits"].numpy()[..., :height, :width]))
            expected.append(np.ravel(whole_masks[..., :height, :width]))
    return summarize(WITHOUT_PADDING, found, expected, NO_TOLERANCE)
