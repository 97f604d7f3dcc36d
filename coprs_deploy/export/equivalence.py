"""Does an exported graph compute what PyTorch computes in float32? Measured, not assumed.

Each graph is compared alone, fed with the reference's own inputs, and then the chain of all three
end to end, where the masks count. Every graph is open only while it is compared, so that the peak
of memory is one graph's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coprs_deploy.bundle import EquivalenceRecord
from coprs_deploy.checkpoint import Checkpoint, load_segmentation_model
from coprs_deploy.engines.runner import Array, Runner
from coprs_deploy.engines.torch_runner import TorchRunner
from coprs_deploy.errors import EquivalenceError
from coprs_deploy.images import PreparedImage, prepare_image, unpadded_size
from coprs_deploy.specs import (
    GRAPH_NAMES,
    IMAGE_ENCODER,
    MASK_DECODER,
    PRIOR,
    Geometry,
    GraphSpec,
    ValidRegion,
)

END_TO_END = "end_to_end"

RunnerOpener = Callable[[str], Runner]
"""Opens the runner of a graph by name; it is closed after use."""


@dataclass(frozen=True)
class Tolerance:
    """What an output may differ by.

    Attributes:
        relative_error: largest absolute difference over the largest absolute value of the reference.
        mean_error: largest absolute mean difference on that scale; noise averages out, a shift
            does not.
        cosine: smallest cosine.
        mask_iou: smallest IoU of the thresholded masks; None where the output is no mask.
        reason: why these numbers.
        pools_masks: whether ``mask_iou`` is of all samples together, intersections over unions
            (cIoU), rather than of the worst one.
    """

    relative_error: float
    mean_error: float
    cosine: float
    mask_iou: float | None
    reason: str
    pools_masks: bool = False

    @property
    def judges(self) -> bool:
        """Whether anything finite can be outside of it."""
        return math.isfinite(self.relative_error)


_FLOAT32_ENCODER = "up to 32 blocks of float32 sums in another order; ViT-H measures below 2e-5"
_FLOAT32_PRIOR = "one product and two small convolutions in another order"
_FLOAT32_DECODER = "two attention blocks; logits cancel near zero, so the scale is the maximum"
_FLOAT32_CHAIN = "only cells whose logit is within the decoder's error of zero may flip"

_HALF_ENCODER = "every tensor between two nodes is rounded, over up to 32 blocks"
_HALF_PRIOR = "only the keys and the query are rounded; scores and fusion are float32"
_HALF_DECODER = "two attention blocks in half precision; the last product is float32"
_HALF_CHAIN = "random weights put many logits near zero, where a rounding flips the mask"
_BFLOAT16_PRIOR = "eight bits of keys and query; the shipped model's sharp prior measures 2.3e-2"
_BFLOAT16_MASK = "a mask of some dozen cells may lose two: the shipped model measures .943 at worst"

_INT8_ENCODER = "inputs of 127 steps in each block: ViT-B 2.8e-2, the shipped model 5.2e-2 at worst"
_INT8_CHAIN = "all masks together, cIoU: the shipped model measures .984, random ViT-B .993"

_FLOAT32 = {
    IMAGE_ENCODER: Tolerance(1e-4, 1e-6, 0.999999, None, _FLOAT32_ENCODER),
    PRIOR: Tolerance(1e-5, 1e-6, 0.999999, None, _FLOAT32_PRIOR),
    MASK_DECODER: Tolerance(1e-4, 1e-5, 0.999999, 0.999, _FLOAT32_DECODER),
    END_TO_END: Tolerance(1e-3, 1e-4, 0.99999, 0.999, _FLOAT32_CHAIN),
}
_FLOAT16 = {
    IMAGE_ENCODER: Tolerance(1e-2, 1e-4, 0.9999, None, _HALF_ENCODER),
    PRIOR: Tolerance(2e-3, 2e-4, 0.9999, None, _HALF_PRIOR),
    MASK_DECODER: Tolerance(1e-2, 1e-3, 0.9999, 0.98, _HALF_DECODER),
    END_TO_END: Tolerance(2e-2, 2e-3, 0.9999, 0.98, _HALF_CHAIN),
}
_BFLOAT16 = {
    IMAGE_ENCODER: Tolerance(5e-2, 5e-4, 0.999, None, _HALF_ENCODER),
    PRIOR: Tolerance(5e-2, 5e-3, 0.999, None, _BFLOAT16_PRIOR),
    MASK_DECODER: Tolerance(5e-2, 5e-3, 0.999, 0.92, _BFLOAT16_MASK),
    END_TO_END: Tolerance(8e-2, 8e-3, 0.998, 0.92, _BFLOAT16_MASK),
}

_INT8 = {
    IMAGE_ENCODER: Tolerance(0.1, 5e-3, 0.998, None, _INT8_ENCODER),
    PRIOR: Tolerance(2e-3, 2e-4, 0.9999, None, _HALF_PRIOR),
    MASK_DECODER: Tolerance(1e-2, 1e-3, 0.9999, 0.98, _HALF_DECODER),
    END_TO_END: Tolerance(0.2, 2e-2, 0.995, 0.95, _INT8_CHAIN, pools_masks=True),
}

TOLERANCES: Mapping[tuple[str, str], Mapping[str, Tolerance]] = {
    ("onnxruntime", "fp32"): _FLOAT32,
    ("onnxruntime", "fp16"): _FLOAT16,
    ("onnxruntime", "int8"): _INT8,
    ("openvino", "fp32"): _FLOAT32,
    ("openvino", "bf16"): _BFLOAT16,
    ("openvino", "fp16"): _FLOAT16,
    ("openvino", "int8"): _INT8,
    ("tensorrt", "fp32"): _FLOAT32,
    ("tensorrt", "bf16"): _BFLOAT16,
    ("tensorrt", "fp16"): _FLOAT16,
    ("tensorrt", "int8"): _INT8,
    ("tensorrt-rtx", "fp32"): _FLOAT32,
    ("tensorrt-rtx", "bf16"): _BFLOAT16,
    ("tensorrt-rtx", "fp16"): _FLOAT16,
    ("tensorrt-rtx", "int8"): _INT8,
}
"""The one table of tolerances, by runtime and precision."""


@dataclass(frozen=True)
class SampleInput:
    """One image and the concentrations that are asked of it."""

    prepared: PreparedImage
    concentration: NDArray[np.float32]


_ANY_SHAPES = ((270, 480), (400, 256), (333, 333))
"""Height and width: landscape, portrait and square."""


def sample_inputs(
    geometry: Geometry,
    policy_hidden_size: int,
    num_targets: int = 1,
    seed: int = 0,
    *,
    valid_region: ValidRegion | None = None,
) -> list[SampleInput]:
    """Draw inputs that differ in content and, without an extent, in their shape.

    Args:
        geometry: sizes of the model.
        policy_hidden_size: D.
        num_targets: N, concentrations an image.
        seed: equal seeds give equal inputs.
        valid_region: how far the pictures may reach.

    Returns:
        Three samples: shapes on a gradient, noise, and shapes again; landscape, portrait and
        square, or as the extent has them. The concentrations are standard normal, the scale of a
        normalized hidden state.
    """
    generator = np.random.default_rng(seed)
    samples = []
    shapes = _ANY_SHAPES if valid_region is None else _shapes_within(valid_region)
    for (height, width), is_noise in zip(shapes, (False, True, False), strict=True):
        if is_noise:
            picture = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        else:
            picture = _draw_scene(generator, height, width)
        concentration = generator.standard_normal(
            (num_targets, policy_hidden_size), dtype=np.float32
        )
        samples.append(SampleInput(prepare_image(picture, geometry), concentration))
    return samples


def _shapes_within(valid_region: ValidRegion) -> tuple[tuple[int, int], ...]:
    """Heights and widths of a picture of the aspect, one that fills the extent, and a long one."""
    height, width = valid_region.height, valid_region.width
    size, (across, down) = max(height, width), valid_region.aspect_ratio
    asked = unpadded_size(down, across, size)
    longer = (height // 2, width) if width > height else (height, width // 2)
    return asked, (height, width), (max(1, longer[0]), max(1, longer[1]))


def _draw_scene(generator: np.random.Generator, height: int, width: int) -> NDArray[np.uint8]:
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    ramp = generator.uniform(0, 255, (3, 3))
    picture = ramp[0] * x[..., None] + ramp[1] * y[..., None] + ramp[2] * 0.5
    for _ in range(8):
        center, radius = generator.uniform(0, 1, 2), generator.uniform(0.05, 0.2)
        inside = (y - center[0]) ** 2 + (x - center[1]) ** 2 < radius**2
        picture[inside] = generator.uniform(0, 255, 3)
    drawn: NDArray[np.uint8] = np.clip(picture, 0, 255).astype(np.uint8)
    return drawn


def reference_opener(checkpoint: Checkpoint, specs: Mapping[str, GraphSpec]) -> RunnerOpener:
    """Open PyTorch's stages of a checkpoint, on the CPU in float32.

    The weights are mapped anew for each stage, so that they are gone when its runner is closed. The
    image encoder computes the whole square, unless its graph drops the padding.
    """

    def open_stage(name: str) -> Runner:
        model = load_segmentation_model(checkpoint)
        if specs[name].drops_padding:
            model.image_encoder.set_picture_extent(specs[name].valid_region)
        return TorchRunner(model.stages()[name], specs[name])

    return open_stage


def compare_stages(
    reference: RunnerOpener,
    candidate: RunnerOpener,
    samples: Sequence[SampleInput],
    tolerances: Mapping[str, Tolerance],
    report: Callable[[str], None] = lambda step: None,
    *,
    known: dict[str, list[Array]] | None = None,
) -> tuple[EquivalenceRecord, ...]:
    """Compare three stages with the reference, each alone and then as a chain.

    Args:
        reference: opens PyTorch's stages.
        candidate: opens the stages in question.
        samples: what both are fed.
        tolerances: by graph name and ``end_to_end``.
        report: called with the name of each step as it starts.
        known: the reference's outputs by graph; what is missing is computed and put in, so that
            the next comparison on the same samples finds it.

    Returns:
        A record for each graph and one for the chain.
    """
    known = {} if known is None else known
    records = []
    # What each stage is fed with: the reference's outputs of the stage before, or (in the chain)
    # the candidate's own.
    truth: list[dict[str, Array]] = [_first_inputs(sample) for sample in samples]
    chain: list[dict[str, Array]] = [_first_inputs(sample) for sample in samples]
    for name in GRAPH_NAMES:
        if name not in known:
            report(f"reference {name}")
            with reference(name) as runner:
                known[name] = [_run(runner, values) for values in truth]
        expected = known[name]
        report(f"candidate {name}")
        with candidate(name) as runner:
            found = [_run(runner, values) for values in truth]
            follows = found if name == IMAGE_ENCODER else [_run(runner, v) for v in chain]
            output = runner.spec.outputs[0].name
            company = _in_company(runner, truth, expected)
        compared = ([*found, *company[0]], [*expected, *company[1]])
        records.append(summarize(name, *compared, tolerances[name]))
        for values, chained, ours, next_value in zip(truth, chain, expected, follows, strict=True):
            values[output] = ours
            chained[output] = next_value
    last = [values["mask_logits"] for values in truth]
    final = _joined_masks(candidate, chain) or [values["mask_logits"] for values in chain]
    records.append(summarize(END_TO_END, final, last, tolerances[END_TO_END]))
    return tuple(records)


def _joined_masks(
    candidate: RunnerOpener, chain: Sequence[Mapping[str, Array]]
) -> list[Array] | None:
    """Decode as an answer does where the runtime joins prior and mask decoder; else None."""
    with candidate(PRIOR) as prior, candidate(MASK_DECODER) as decoder:
        joined = prior.fused_with(decoder)
        if joined is None:
            return None
        with joined:
            names = [tensor.name for tensor in joined.spec.inputs]
            outputs = (joined(**{name: values[name] for name in names}) for values in chain)
            return [np.asarray(output["mask_logits"].numpy()) for output in outputs]


def require_equivalence(
    records: Sequence[EquivalenceRecord], tolerances: Mapping[str, Tolerance]
) -> None:
    """Raise when any record is outside its tolerance.

    Raises:
        EquivalenceError: names each failing graph, what was measured and what is allowed.
    """
    lines = []
    for record in records:
        if not record.passed:
            allowed = tolerances[record.graph]
            iou = "" if record.mask_iou is None else f", mask IoU {record.mask_iou:.5f}"
            least = "" if allowed.mask_iou is None else f", mask IoU {allowed.mask_iou}"
            lines.append(
                f"{record.graph}: relative {record.relative_error:.2e}, mean {record.mean_error:+.2e}, "
                f"cosine {record.cosine:.7f}{iou} (allowed: {allowed.relative_error:.0e}, "
                f"{allowed.mean_error:.0e}, {allowed.cosine}{least})"
            )
    if lines:
        raise EquivalenceError(
            "the exported graphs do not compute what PyTorch computes. " + "; ".join(lines)
        )


def cosine_similarity(found: Array, expected: Array) -> float:
    """Return the cosine between two arrays, in float64; of a zero array, whether both are equal."""
    a, b = found.astype(np.float64), expected.astype(np.float64)
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(np.vdot(a, b)) / norms if norms else float(np.array_equal(a, b))


def relative_error(found: Array, expected: Array, order: float = math.inf) -> float:
    """Return the norm of the difference over the norm of the reference, in float64.

    Args:
        found: what is compared.
        expected: the reference; a zero one leaves the norm of the difference.
        order: of the norm: infinity takes the largest absolute values, 2 the Euclidean norms.
    """
    wanted = expected.astype(np.float64).ravel()
    difference = found.astype(np.float64).ravel() - wanted
    scale = float(np.linalg.norm(wanted, order)) or 1.0
    return float(np.linalg.norm(difference, order)) / scale


def mask_iou(first: Array, second: Array) -> float:
    """IoU of two stacks of mask logits thresholded at 0; two empty masks agree (1.0)."""
    a, b = first > 0, second > 0
    union = np.count_nonzero(a | b)
    return float(np.count_nonzero(a & b) / union) if union else 1.0


def _first_inputs(sample: SampleInput) -> dict[str, Array]:
    return {
        "image": sample.prepared.image,
        "concentration": sample.concentration,
        "unpadded_size": sample.prepared.unpadded_size,
    }


def _in_company(
    runner: Runner, truth: Sequence[Mapping[str, Array]], expected: Sequence[Array]
) -> tuple[list[Array], list[Array]]:
    """Encode samples in batches of the other sizes that the encoder is called with.

    Returns:
        What it gives and what the reference gave, image by image; nothing for a static graph.
    """
    images, found, wanted = runner.spec.images, list[Array](), list[Array]()
    for size in {images.opt, images.max} - {1}:
        chosen = [number % len(truth) for number in range(size)]
        batch = np.concatenate([truth[number]["image"] for number in chosen])
        encoded = runner(image=batch)[runner.spec.outputs[0].name]
        found += [np.asarray(row.numpy()) for row in encoded.rows()]
        wanted += [expected[number] for number in chosen]
    return found, wanted


def _run(runner: Runner, values: Mapping[str, Array]) -> Array:
    outputs = runner(**{tensor.name: values[tensor.name] for tensor in runner.spec.inputs})
    return outputs[runner.spec.outputs[0].name].numpy()


def summarize(
    name: str, found: Sequence[Array], expected: Sequence[Array], allowed: Tolerance
) -> EquivalenceRecord:
    """Summarize by the worst sample; a value that is not finite fails every comparison."""
    max_abs_error = largest = mean_error = 0.0
    cosine = iou = 1.0
    finite = True
    for output, truth in zip(found, expected, strict=True):
        finite = finite and bool(np.isfinite(output).all() and np.isfinite(truth).all())
        a, b = output.astype(np.float64), truth.astype(np.float64)
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
        has_tolerance=allowed.judges,
    )
