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
        tolerances: by graph name and ``end_to_end``.
        report: called with the name of each step as it starts.
        known: the reference's outputs by graph; missing ones are computed and added.

    Returns:
        One record per graph, and one for ``end_to_end``.
    """
    known = {} if known is None else known
    records = []
    # The inputs of each graph: the reference's outputs of the graph before it, or (end to end)
    # the candidate's own.
    exact = [sample.first_inputs() for sample in samples]
    own = [sample.first_inputs() for sample in samples]
    for name in GRAPH_NAMES:
        if name not in known:
            report(f"reference {name}")
            with reference(name) as runner:
                known[name] = [run_graph(runner, values) for values in exact]
        expected = known[name]
        report(f"candidate {name}")
        with candidate(name) as runner:
            found = [run_graph(runner, values) for values in exact]
            follows = found if name == IMAGE_ENCODER else [run_graph(runner, v) for v in own]
            output = runner.spec.outputs[0].name
            batched, wanted = _encode_batches(runner, exact, expected)
        records.append(summarize(name, [*found, *batched], [*expected, *wanted], tolerances[name]))
        for values, result in zip([*exact, *own], [*expected, *follows], strict=True):
            values[output] = result
    last = [values["mask_logits"] for values in exact]
    final = _fused_masks(candidate, own) or [values["mask_logits"] for values in own]
    records.append(summarize(END_TO_END, final, last, tolerances[END_TO_END]))
    return tuple(records)


def _fused_masks(
    candidate: RunnerOpener, inputs: Sequence[Mapping[str, Array]]
) -> list[Array] | None:
    """Decode with the fused launch of prior and mask decoder; None if the runtime has none."""
    with candidate(PRIOR) as prior, candidate(MASK_DECODER) as decoder:
        fused = prior.fused_with(decoder)
        if fused is None:
            return None
        with fused:
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
    """Return the norm of the difference over the norm of the reference, in float64.

    Args:
        found: array to compare.
        expected: reference; if it is zero, the norm of the difference is returned.
        order: infinity for the largest absolute values, 2 for the Euclidean norm.
    """
    wanted = expected.astype(np.float64).ravel()
    difference = found.astype(np.float64).ravel() - wanted
    scale = float(np.linalg.norm(wanted, order)) or 1.0
    return float(np.linalg.norm(difference, order)) / scale


def mask_iou(first: Array, second: Array) -> float:
    """Return the IoU of two arrays of mask logits thresholded at 0; 1.0 if both are empty."""
    return iou(count_pixels(first > 0, second > 0), empty=1.0)


def _encode_batches(
    runner: Runner, inputs: Sequence[Mapping[str, Array]], expected: Sequence[Array]
) -> tuple[list[Array], list[Array]]:
    """Encode samples in the batch sizes above 1 that the runtime uses; none for a static graph.

    Returns:
        The encoder's and the reference's embeddings, image by image.
    """
    images, found, wanted = runner.spec.images, list[Array](), list[Array]()
    for size in {images.opt, images.max} - {1}:
        chosen = [number % len(inputs) for number in range(size)]
        batch = np.concatenate([inputs[number]["image"] for number in chosen])
        encoded = runner(image=batch)[runner.spec.outputs[0].name]
        found += [np.asarray(row.numpy()) for row in encoded.rows()]
        wanted += [expected[number] for number in chosen]
    return found, wanted


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
        max_abs_error = max(max_abs_error, float(np.abs(difference).max()))
        largest = max(largest, relative_error(a, b))
        mean = float(difference.mean()) / scale
        mean_error = mean if abs(mean) > abs(mean_error) else mean_error
        cosine = min(cosine, cosine_similarity(a, b))
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
        has_tolerance=allowed.is_finite,
    )
