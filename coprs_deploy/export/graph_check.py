"""What an export compares with PyTorch before it writes a bundle: graphs, then engines.

A graph of a lower precision is first checked with its roundings written out, which shows on any CPU
what a GPU would compute; engines are checked where a GPU can run them.
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
from coprs_deploy.export.calibration import Calibrated
from coprs_deploy.export.equivalence import (
    TOLERANCES,
    RunnerOpener,
    SampleInput,
    Tolerance,
    compare_stages,
    reference_opener,
    require_equivalence,
    sample_inputs,
    summarize,
)
from coprs_deploy.export.options import ExportOptions
from coprs_deploy.export.precision import FP32, rest_precision, write_rounded_graph
from coprs_deploy.export.samples import draw_masked_samples
from coprs_deploy.images import load_image, mask_cells, prepare_image
from coprs_deploy.specs import IMAGE_ENCODER, MASK_DECODER, PRIOR, GraphSpec

CPU_RUNTIME = "onnxruntime"
"""The runtime that checks graphs of runtimes that are not of the CPU."""


INT8_ADVICE = (
    "What to try: more pictures in --calibration, of the kind that the model will see, or "
    "--precision fp16"
)


class GraphCheck:
    """Compares what an export wrote with PyTorch, in the tolerances of its runtime and precision.

    Args:
        source: the checkpoint.
        specs: inputs and outputs of the graphs.
        options: of the export.
        report: called with the name of each step as it starts.
        scratch: a folder for graphs that do not stay.
        calibrated: how an int8 encoder was calibrated; None for other precisions.
    """

    def __init__(
        self,
        source: Checkpoint,
        specs: Mapping[str, GraphSpec],
        options: ExportOptions,
        report: Callable[[str], None],
        scratch: Path,
        *,
        calibrated: Calibrated | None = None,
    ) -> None:
        self._source = source
        self._specs = specs
        self._options = options
        self._report = report
        self._scratch = scratch
        self._calibrated = calibrated
        self._samples: list[SampleInput] = []
        self._known: dict[str, list[Array]] = {}
        self._tolerances = TOLERANCES[options.runtime, options.precision]

    def graphs(self, graphs: Mapping[str, Path]) -> tuple[EquivalenceRecord, ...]:
        """Compare the ONNX graphs.

        Raises:
            EquivalenceError: one is outside its tolerance; of an int8 encoder the error of each
                block is listed.
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
            if self._calibrated is None:
                raise
            lines = self._block_errors(graphs[IMAGE_ENCODER], self._calibrated, is_rounded)
            raise EquivalenceError(f"{error}\n{lines}\n{INT8_ADVICE}") from error
        return records

    def dropped_padding(self) -> tuple[EquivalenceRecord, ...]:
        """Measure what an encoder that drops the padding changes; nothing where none does."""
        if not self._specs[IMAGE_ENCODER].drops_padding:
            return ()
        self._report("dropped padding")
        embeddings = self._known[IMAGE_ENCODER]
        return (measure_dropped_padding(self._source, self._specs, self._samples, embeddings),)

    def engines(
        self, folder: Path, engines: Mapping[str, EngineRecord]
    ) -> tuple[tuple[EquivalenceRecord, ...], dict[str, EngineRecord]]:
        """Compare the engines on this machine's GPU.

        Returns:
            The measured equality, and the engines' records with what the GPU read back.

        Raises:
            EquivalenceError: one is outside its tolerance.
        """
        verified = dict(engines)

        def open_engine(name: str) -> Runner:
            runner = open_unverified(
                self._options.runtime,
                folder / f"{name}{ENGINE_SUFFIX}",
                self._specs[name],
                engines[name],
                RunnerOptions(
                    device="cuda", allow_engine_host_code=True
                ),  # it was built right here
            )
            if isinstance(runner, TrtRunner):
                verified[name] = verified_record(engines[name], runner)
            return runner

        return self._compare(open_engine, "engine "), verified

    def _compare(self, candidate: RunnerOpener, what: str = "") -> tuple[EquivalenceRecord, ...]:
        reference = reference_opener(self._source, self._specs)
        if not self._samples:
            self._draw_samples(reference)
        records = compare_stages(
            reference=reference,
            candidate=candidate,
            samples=self._samples,
            tolerances=self._tolerances,
            report=lambda step: self._report(f"{what}{step}"),
            known=self._known,
        )
        require_equivalence(records, self._tolerances)
        return records

    def _draw_samples(self, reference: RunnerOpener) -> None:
        geometry = self._source.config.model.geometry
        width = self._specs[PRIOR].inputs[1].shape[1]
        assert isinstance(width, int)
        count = self._options.targets.opt
        if self._calibrated is None:
            self._samples = sample_inputs(
                geometry, width, count, valid_region=self._specs[IMAGE_ENCODER].valid_region
            )
            return
        self._report("reference")
        pictures = [
            prepare_image(load_image(path), geometry) for path in self._calibrated.pictures.held_out
        ]
        self._samples, self._known = draw_masked_samples(pictures, reference, width, count)

    def _block_errors(self, graph: Path, calibrated: Calibrated, is_rounded: bool) -> str:
        """Say how far each block of a refused encoder is from float32, on one picture."""
        self._report("error of each block")
        path = graph
        if is_rounded:
            path = self._scratch / f"{IMAGE_ENCODER}.rounded.onnx"
            write_rounded_graph(graph, path)
        encoder, spec = (
            load_segmentation_model(self._source).image_encoder,
            self._specs[IMAGE_ENCODER],
        )
        encoder.set_picture_extent(spec.valid_region)
        errors = block_errors(
            encoder,
            path,
            lambda path, spec: open_graph(CPU_RUNTIME, path, spec, RunnerOptions()),
            spec,
            images=[self._samples[0].prepared.image],
            ranges=calibrated.ranges,
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
    """Whether this machine's GPU is one that the engines were built for."""
    gpu = current_gpu()
    return gpu is not None and gpu.compute_capability in target.compute_capabilities


def open_unverified(
    runtime: str, path: Path, spec: GraphSpec, engine: EngineRecord, options: RunnerOptions
) -> Runner:
    """Open an engine in order to verify it: that it never ran is no news here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnverifiedEngineWarning)
        return open_graph(runtime, path, spec, options, engine)


def verified_record(engine: EngineRecord, runner: TrtRunner) -> EngineRecord:
    """Say what a GPU read back of an engine that it ran."""
    return msgspec.structs.replace(
        engine,
        layers=runner.layers,
        device_memory_bytes=runner.device_memory_bytes,
        verified_on=runner.gpu_name,
    )


WITHOUT_PADDING = "without_padding"
"""Name of the record, beside those of graphs."""


NOT_JUDGED = Tolerance(
    math.inf,
    math.inf,
    -1.0,
    0.0,
    "another function on purpose; whether its masks are good is for pictures of its use to say",
    pools_masks=True,
)


def measure_dropped_padding(
    checkpoint: Checkpoint,
    specs: Mapping[str, GraphSpec],
    samples: Sequence[SampleInput],
    embeddings: Sequence[Array],
) -> EquivalenceRecord:
    """Compare masks with those of the encoder that sees the padding; both in PyTorch, in float32.

    Args:
        checkpoint: the weights.
        specs: of the graphs, whose encoder drops the padding.
        samples: pictures; concentrations with telling masks are drawn for them.
        embeddings: what PyTorch's encoder without padding gave for each.

    Returns:
        The record of the masks' logits inside the pictures; its mask IoU is of all together.
    """
    whole = msgspec.structs.replace(specs[IMAGE_ENCODER], valid_region=None)
    opener = reference_opener(checkpoint, {**specs, IMAGE_ENCODER: whole})
    _, width = specs[PRIOR].inputs[1].shape
    assert isinstance(width, int)
    asked, known = draw_masked_samples(
        [sample.prepared for sample in samples], opener, width, specs[PRIOR].targets.opt
    )
    geometry = checkpoint.config.model.geometry
    found, wanted = list[Array](), list[Array]()
    with opener(PRIOR) as prior, opener(MASK_DECODER) as decoder:
        for sample, embedding, expected in zip(asked, embeddings, known[MASK_DECODER], strict=True):
            priors = prior(image_embedding=embedding, concentration=sample.concentration)
            masks = decoder(
                image_embedding=embedding,
                prior_logits=priors["prior_logits"],
                unpadded_size=sample.prepared.unpadded_size,
            )
            height, width = mask_cells(sample.prepared.unpadded_size, geometry)
            found.append(np.ravel(masks["mask_logits"].numpy()[..., :height, :width]))
            wanted.append(np.ravel(expected[..., :height, :width]))
    return summarize(WITHOUT_PADDING, found, wanted, NOT_JUDGED)
