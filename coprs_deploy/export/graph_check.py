"""Equivalence check of one checkpoint's graphs, and the effect of dropping the padding.

Export and verify use it alike: all graphs, rounded graphs and engines of a checkpoint are compared
with PyTorch on the same samples, so that the reference runs once.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np

from coprs_deploy.bundle import ENGINE_SUFFIX, EngineRecord, EquivalenceRecord
from coprs_deploy.checkpoint import Checkpoint
from coprs_deploy.engines import (
    ONNX_RUNTIMES,
    Runner,
    RunnerOptions,
    open_graph,
    require_runtime,
)
from coprs_deploy.engines.runner import Array
from coprs_deploy.engines.trt.runner import TrtRunner, UnverifiedEngineWarning
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
    decode,
    draw_masked_samples,
    sample_inputs,
)
from coprs_deploy.export.tolerances import END_TO_END, Tolerance
from coprs_deploy.images import PreparedImage
from coprs_deploy.logits import mask_cells
from coprs_deploy.specs import IMAGE_ENCODER, MASK_DECODER, PRIOR, GraphSpec

CPU_RUNTIME = "onnxruntime"
"""Runtime that checks the graphs of runtimes that need a GPU."""

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


def has_roundings(options: ExportOptions) -> bool:
    """Whether graphs are compared with their roundings written out, on :data:`CPU_RUNTIME`."""
    return rest_precision(options.runtime, options.precision) != FP32


def require_check_runtimes(options: ExportOptions) -> None:
    """Check early whether the runtimes of :meth:`GraphCheck.require_graphs` are installed.

    Raises:
        RuntimeUnavailableError: one is not.
    """
    runs_here = options.runtime in ONNX_RUNTIMES
    if runs_here:
        require_runtime(options.runtime)
    if not runs_here or has_roundings(options):
        require_runtime(CPU_RUNTIME)


class GraphCheck:
    """Compare graphs of a checkpoint with PyTorch in float32 on the CPU.

    ``specs`` and ``tolerances`` are by graph name. ``report`` is called with the name of each step.
    ``images`` are those of the samples where masks are compared all together; empty draws some.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        specs: Mapping[str, GraphSpec],
        tolerances: Mapping[str, Tolerance],
        report: Callable[[str], None],
        *,
        seed: int,
        images: Sequence[PreparedImage] = (),
    ) -> None:
        self._checkpoint = checkpoint
        self._specs = specs
        self._tolerances = tolerances
        self._report = report
        self._reference = reference_opener(checkpoint, specs)
        self._known: dict[str, list[Array]] = {}
        config, count = checkpoint.config.model, specs[PRIOR].targets.opt
        self.samples = sample_inputs(
            config.geometry,
            config.policy_hidden_size,
            count,
            seed,
            valid_region=specs[IMAGE_ENCODER].valid_region,
        )
        if tolerances[END_TO_END].pools_masks:  # then the masks must not be empty
            report("reference")
            images = images or [sample.prepared for sample in self.samples]
            self.samples, self._known = draw_masked_samples(
                images, self._reference, config.policy_hidden_size, count, seed
            )

    def compare(
        self, candidate: RunnerOpener, step_prefix: str = ""
    ) -> tuple[EquivalenceRecord, ...]:
        """Compare three graphs, each alone and then end to end; they may fail."""
        return compare_graphs(
            reference=self._reference,
            candidate=candidate,
            samples=self.samples,
            tolerances=self._tolerances,
            report=lambda step: self._report(f"{step_prefix}{step}"),
            known=self._known,
        )

    def require_graphs(
        self, graphs: Mapping[str, Path], options: ExportOptions, scratch: Path
    ) -> tuple[EquivalenceRecord, ...]:
        """Compare ONNX graphs, on the CPU if their runtime needs a GPU.

        Graphs of lower precision are first compared with their roundings written out as float32
        operations, which shows on any CPU what a GPU computes; ``scratch`` is for these graphs.

        Raises:
            EquivalenceError: a graph is outside its tolerance.
        """
        runs_here = options.runtime in ONNX_RUNTIMES
        runtime = options.runtime if runs_here else CPU_RUNTIME
        is_rounded = has_roundings(options)

        def open_rounded(name: str) -> Runner:
            path = scratch / f"{name}.rounded.onnx"
            write_rounded_graph(graphs[name], path)
            runner = open_graph(CPU_RUNTIME, path, self._specs[name], RunnerOptions())
            for written in scratch.glob(f"{path.name}*"):  # the session has read it
                written.unlink()
            return runner

        def open_written(name: str) -> Runner:
            return open_graph(runtime, graphs[name], self._specs[name], RunnerOptions())

        records: tuple[EquivalenceRecord, ...] = ()
        if is_rounded:
            records = self._require(open_rounded, "rounded ")
        if runs_here or not is_rounded:
            records = self._require(open_written)
        return records

    def require_engines(
        self, engines: Mapping[str, EngineRecord], runtime: str, directory: Path
    ) -> tuple[tuple[EquivalenceRecord, ...], dict[str, EngineRecord]]:
        """Compare the engines in a directory on this machine's GPU, and complete their records.

        Raises:
            EquivalenceError: an engine is outside its tolerance.
        """
        verified = dict(engines)
        # The host code of version-compatible engines is trusted: they were built just now.
        options = RunnerOptions(device="cuda", allow_engine_host_code=True)

        def open_engine(name: str) -> Runner:
            path = directory / f"{name}{ENGINE_SUFFIX}"
            runner, verified[name] = open_unverified(
                runtime, path, self._specs[name], engines[name], options
            )
            return runner

        return self._require(open_engine, "engine "), verified

    def _require(
        self, candidate: RunnerOpener, step_prefix: str = ""
    ) -> tuple[EquivalenceRecord, ...]:
        records = self.compare(candidate, step_prefix)
        require_equivalence(records, self._tolerances)
        return records

    def dropped_padding(self) -> tuple[EquivalenceRecord, ...]:
        """Compare masks with and without padding in the encoder, in PyTorch, after :meth:`compare`.

        Returns:
            The record of the mask logits inside the images, whose mask IoU is the cIoU; empty if
            the encoder computes the padding.
        """
        encoder = self._specs[IMAGE_ENCODER]
        if not encoder.drops_padding:
            return ()
        self._report("dropped padding")
        whole = msgspec.structs.replace(encoder, valid_region=None)
        opener = reference_opener(self._checkpoint, {**self._specs, IMAGE_ENCODER: whole})
        config = self._checkpoint.config.model
        samples, known = draw_masked_samples(
            [sample.prepared for sample in self.samples],
            opener,
            config.policy_hidden_size,
            self._specs[PRIOR].targets.opt,
        )
        found, expected = list[Array](), list[Array]()
        embeddings = self._known[IMAGE_ENCODER]
        with opener(PRIOR) as prior, opener(MASK_DECODER) as decoder:
            for sample, embedding, whole_masks in zip(
                samples, embeddings, known[MASK_DECODER], strict=True
            ):
                image = sample.prepared
                _, masks = decode(prior, decoder, image, embedding, sample.concentration)
                height, width = mask_cells(image.unpadded_size, config.geometry)
                found.append(np.ravel(masks[..., :height, :width]))
                expected.append(np.ravel(whole_masks[..., :height, :width]))
        return (summarize(WITHOUT_PADDING, found, expected, NO_TOLERANCE),)


def open_unverified(
    runtime: str, path: Path, spec: GraphSpec, engine: EngineRecord, options: RunnerOptions
) -> tuple[Runner, EngineRecord]:
    """Open an engine to verify it; its record gets layers, memory and GPU as read back."""
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
