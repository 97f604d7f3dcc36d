"""Equivalence check: measure how far exported graphs are from PyTorch in float32.

Each graph is compared alone, on the reference's own inputs, and then all three in a row (end to
end), where the masks count. One graph is open at a time, so that the peak memory is one graph's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from coprs_deploy.bundle import EquivalenceRecord
from coprs_deploy.checkpoint import Checkpoint, load_segmentation_model
from coprs_deploy.engines.runner import Array, Runner
from coprs_deploy.engines.torch_runner import TorchRunner
from coprs_deploy.errors import EquivalenceError
from coprs_deploy.evaluation.metrics import count_pixels, iou
from coprs_deploy.export.samples import RunnerOpener, SampleInput
from coprs_deploy.export.tolerances import END_TO_END, Tolerance
from coprs_deploy.specs import GRAPH_NAMES, IMAGE_ENCODER, MASK_DECODER, PRIOR, GraphSpec

OUTPUTS = {
    IMAGE_ENCODER: "image_embedding",
    PRIOR: "prior_logits",
    MASK_DECODER: "mask_logits",
    END_TO_END: "mask_logits",
}
"""Name of the compared tensor of each graph."""

Outputs = Mapping[str, list[Array]]
"""Outputs of one backend: one array per sample, by graph name and ``end_to_end``."""


def reference_opener(checkpoint: Checkpoint, specs: Mapping[str, GraphSpec]) -> RunnerOpener:
    """Return a function that opens PyTorch's modules of a checkpoint, on the CPU in float32.

    The weights are mapped again for each graph, so that they are freed with its runner. The image
    encoder computes the whole square, unless its graph drops the padding.
    """

    def open_module(name: str) -> Runner:
        model = load_segmentation_model(checkpoint)
        if specs[name].drops_padding:
            model.image_encoder.set_valid_region(specs[name].valid_region)
        return TorchRunner(model.graph_modules()[name], specs[name])

    return open_module


def compare_graphs(
    reference: RunnerOpener,
    candidate: RunnerOpener,
    samples: Sequence[SampleInput],
    tolerances: Mapping[str, Tolerance],
    report: Callable[[str], None] = lambda step: None,
    *,
    known: dict[str, list[Array]] | None = None,
) -> tuple[EquivalenceRecord, ...]:
    """Compare the three graphs with the reference, each alone and then end to end.

    Args:
        reference: opens PyTorch's modules.
        candidate: opens the graphs under test.
        samples: inputs.
        tolerances: by graph name and ``end_to_end``, as the records that are returned.
        report: called with the name of each step as it starts.
        known: the reference's outputs by graph; computed and added if it is empty.
    """
    known = {} if known is None else known
    if not known:
        outputs = run_graphs(reference, samples, report=lambda name: report(f"reference {name}"))
        known |= {name: outputs[name] for name in GRAPH_NAMES}
    found = run_graphs(
        candidate, samples, known, lambda name: report(f"candidate {name}"), encodes_batches=True
    )
    fused = _fused_masks(candidate, samples, found[IMAGE_ENCODER])
    found[END_TO_END] = fused or found[END_TO_END]
    records = []
    for name, values in found.items():
        expected = known[MASK_DECODER if name == END_TO_END else name]
        repeated = [expected[number % len(expected)] for number in range(len(values))]
        records.append(summarize(name, values, repeated, tolerances[name]))
    return tuple(records)


def run_graphs(
    opener: RunnerOpener,
    samples: Sequence[SampleInput],
    reference: Outputs | None = None,
    report: Callable[[str], None] = lambda name: None,
    *,
    encodes_batches: bool = False,
) -> dict[str, list[Array]]:
    """Run each graph of a backend on every sample, and all three in a row as ``end_to_end``.

    The outputs of ``reference`` feed the next graph; None selects the backend's own. With
    ``encodes_batches``, embeddings of the samples in batches follow those of single images.
    """
    outputs: dict[str, list[Array]] = {}
    fed = [sample.first_inputs() for sample in samples]
    own = [sample.first_inputs() for sample in samples]
    for name in GRAPH_NAMES:
        report(name)
        with opener(name) as runner:
            found = [run_graph(runner, values) for values in fed]
            follows = found
            if name != IMAGE_ENCODER and reference is not None:
                follows = [run_graph(runner, values) for values in own]
            batches = _encode_batches(runner, fed) if encodes_batches else []
        expected = found if reference is None else reference[name]
        for values, output in zip([*fed, *own], [*expected, *follows], strict=True):
            values[OUTPUTS[name]] = output
        outputs[name] = [*found, *batches]
    outputs[END_TO_END] = [values["mask_logits"] for values in own]
    return outputs


def _fused_masks(
    candidate: RunnerOpener, samples: Sequence[SampleInput], embeddings: Sequence[Array]
) -> list[Array] | None:
    """Decode with the fused launch of prior and mask decoder; None if the runtime has none."""
    with candidate(PRIOR) as prior, candidate(MASK_DECODER) as decoder:
        fused = prior.fused_with(decoder)
        if fused is None:
            return None
        with fused:
            inputs = (
                {**sample.first_inputs(), "image_embedding": embedding}
                for sample, embedding in zip(samples, embeddings, strict=False)
            )
            outputs = (fused(**_inputs_of(fused, values)) for values in inputs)
            return [np.asarray(output["mask_logits"].numpy()) for output in outputs]


def require_equivalence(
    records: Sequence[EquivalenceRecord], tolerances: Mapping[str, Tolerance]
) -> None:
    """Raise :class:`EquivalenceError` with measured values and limits of each failing record."""
    lines = []
    for record in records:
        if not record.passed:
            allowed = tolerances[record.graph]
            iou = "" if record.mask_iou is None else f", mask IoU {record.mask_iou:.5f}"
            least = "" if allowed.mask_iou is None else f", mask IoU {allowed.mask_iou}"
            lines.append(
                f"{record.graph}: relative error {record.relative_error:.2e}, "
                f"mean error {record.mean_error:+.2e}, cosine {record.cosine:.7f}{iou} "
                f"(allowed: {allowed.relative_error:.0e}, {allowed.mean_error:.0e}, "
                f"{allowed.cosine}{least})"
            )
    if lines:
        raise EquivalenceError(
            "the exported graphs do not compute what PyTorch computes. " + "; ".join(lines)
        )


def cosine_similarity(found: Array, expected: Array) -> float:
    """Return the cosine of two arrays in float64; with a zero array, whether both are equal."""
    a, b = found.astype(np.float64), expected.astype(np.float64)
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(np.vdot(a, b)) / norms if norms else float(np.array_equal(a, b))


def relative_error(found: Array, expected: Array, order: float = math.inf) -> float:
    """Return the norm of the difference over the norm of the reference, unless that is zero.

    The order is infinity for the largest absolute values, 2 for the Euclidean norm; in float64.
    """
    wanted = expected.astype(np.float64).ravel()
    difference = found.astype(np.float64).ravel() - wanted
    scale = float(np.linalg.norm(wanted, order)) or 1.0
    return float(np.linalg.norm(difference, order)) / scale


def mask_iou(first: Array, second: Array) -> float:
    """Return the IoU of two arrays of mask logits thresholded at 0; 1.0 if both are empty."""
    return iou(count_pixels(first > 0, second > 0), empty=1.0)


def _encode_batches(runner: Runner, inputs: Sequence[Mapping[str, Array]]) -> list[Array]:
    """Encode samples in the batch sizes above 1 that the runtime uses; none for a static graph."""
    images, found = runner.spec.images, list[Array]()
    for size in sorted({images.opt, images.max} - {1}):
        chosen = ((len(found) + number) % len(inputs) for number in range(size))
        batch = np.concatenate([inputs[number]["image"] for number in chosen])
        encoded = runner(image=batch)[runner.spec.outputs[0].name]
        found += [np.asarray(row.numpy()) for row in encoded.rows()]
    return found


def run_graph(runner: Runner, values: Mapping[str, Array]) -> Array:
    """Run a graph on the tensors among ``values`` that it needs, and return its first output."""
    outputs = runner(**_inputs_of(runner, values))
    return outputs[runner.spec.outputs[0].name].numpy()


def _inputs_of(runner: Runner, values: Mapping[str, Array]) -> dict[str, Array]:
    return {tensor.name: values[tensor.name] for tensor in runner.spec.inputs}


def summarize(
    name: str, found: Sequence[Array], expected: Sequence[Array], allowed: Tolerance
) -> EquivalenceRecord:
    """Summarize the differences of one graph by the worst sample; values must be finite."""
    max_abs_error = largest = mean_error = 0.0
    cosine = iou = 1.0
    finite = True
    for output, reference in zip(found, expected, strict=True):
        finite = finite and bool(np.isfinite(output).all() and np.isfinite(reference).all())
        a, b = output.astype(np.float64), reference.astype(np.float64)
        difference, scale = a - b, float(np.abs(b).max()) or 1.0
        # Unlike `max`, `np.maximum` keeps NaN, so that an error names what was not finite.
        max_abs_error = float(np.maximum(max_abs_error, np.abs(difference).max()))
        largest = float(np.maximum(largest, relative_error(a, b)))
        mean = float(difference.mean()) / scale
        mean_error = mean_error if abs(mean) <= abs(mean_error) else mean
        cosine = float(np.minimum(cosine, cosine_similarity(a, b)))
        iou = min(iou, mask_iou(a, b))
    if allowed.pools_masks:
        iou = mask_iou(*(np.concatenate([np.ravel(o) for o in side]) for side in (found, expected)))
    passed = (
        finite
        and largest <= allowed.relative_error
        and abs(mean_error) <= allowed.mean_error
        and cosine >= allowed.cosine
        and (allowed.mask_iou is None or iou >= allowed.mask_iou)
    )
    return EquivalenceRecord(
        graph=name,
        max_abs_error=max_abs_error,
        relative_error=largest,
        mean_error=mean_error,
        cosine=min(cosine, 1.0),
        mask_iou=None if allowed.mask_iou is None else iou,
        inputs=len(found),
        passed=passed,
        has_tolerance=math.isfinite(allowed.relative_error),
    )
