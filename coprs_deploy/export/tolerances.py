"""Tolerances of the equivalence check, by runtime and precision, each with its reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from coprs_deploy.specs import IMAGE_ENCODER, MASK_DECODER, PRIOR

END_TO_END = "end_to_end"
"""Name of the record of all three graphs in a row, beside the names of the graphs."""


@dataclass(frozen=True)
class Tolerance:
    """Limits of the difference in one output.

    Attributes:
        relative_error: largest absolute difference over the largest absolute reference value.
        mean_error: largest absolute mean difference on the same scale; noise averages out, a
            one-sided shift does not.
        cosine: smallest cosine similarity.
        mask_iou: smallest IoU of the thresholded masks; None if the output is not a mask.
        reason: justification of the numbers.
        pools_masks: whether ``mask_iou`` is the cIoU over all samples instead of the worst IoU.
    """

    relative_error: float
    mean_error: float
    cosine: float
    mask_iou: float | None
    reason: str
    pools_masks: bool = False


_FLOAT32_ENCODER = "up to 32 blocks of float32 sums in another order; ViT-H measures below 2e-5"
_FLOAT32_PRIOR = "one product and two small convolutions in another order"
_FLOAT32_DECODER = "two attention blocks; logits cancel near zero, so the scale is the maximum"
_FLOAT32_END = "only cells whose logit is within the decoder's error of zero may flip"

_HALF_ENCODER = "every tensor between two nodes is rounded, over up to 32 blocks"
_HALF_PRIOR = "only the keys and the query are rounded; scores and fusion are float32"
_HALF_DECODER = "two attention blocks in half precision; the last product is float32"
_HALF_END = "random weights put many logits near zero, where a rounding flips the mask"
_BFLOAT16_PRIOR = "eight bits of keys and query; the demo model's sharp prior measures 2.3e-2"
_BFLOAT16_MASK = "all masks together, cIoU: examples/full, whose objects are small, measures .924"

_INT8_ENCODER = "inputs of 127 steps in each block: ViT-B 2.8e-2, the demo model 5.2e-2 at worst"
_INT8_END = "all masks together, cIoU: the demo model measures .984, random ViT-B .993"

_FLOAT32 = {
    IMAGE_ENCODER: Tolerance(1e-4, 1e-6, 0.999999, None, _FLOAT32_ENCODER),
    PRIOR: Tolerance(1e-5, 1e-6, 0.999999, None, _FLOAT32_PRIOR),
    MASK_DECODER: Tolerance(1e-4, 1e-5, 0.999999, 0.999, _FLOAT32_DECODER),
    END_TO_END: Tolerance(1e-3, 1e-4, 0.99999, 0.999, _FLOAT32_END),
}
_FLOAT16 = {
    IMAGE_ENCODER: Tolerance(1e-2, 1e-4, 0.9999, None, _HALF_ENCODER),
    PRIOR: Tolerance(2e-3, 2e-4, 0.9999, None, _HALF_PRIOR),
    MASK_DECODER: Tolerance(1e-2, 1e-3, 0.9999, 0.98, _HALF_DECODER),
    END_TO_END: Tolerance(2e-2, 2e-3, 0.9999, 0.98, _HALF_END),
}
_BFLOAT16 = {
    IMAGE_ENCODER: Tolerance(5e-2, 5e-4, 0.999, None, _HALF_ENCODER),
    PRIOR: Tolerance(5e-2, 5e-3, 0.999, None, _BFLOAT16_PRIOR),
    MASK_DECODER: Tolerance(5e-2, 5e-3, 0.999, 0.9, _BFLOAT16_MASK, pools_masks=True),
    END_TO_END: Tolerance(8e-2, 8e-3, 0.998, 0.9, _BFLOAT16_MASK, pools_masks=True),
}
_INT8 = {
    IMAGE_ENCODER: Tolerance(0.1, 5e-3, 0.998, None, _INT8_ENCODER),
    PRIOR: Tolerance(2e-3, 2e-4, 0.9999, None, _HALF_PRIOR),
    MASK_DECODER: Tolerance(1e-2, 1e-3, 0.9999, 0.98, _HALF_DECODER),
    END_TO_END: Tolerance(0.2, 2e-2, 0.995, 0.95, _INT8_END, pools_masks=True),
}

_BY_PRECISION = {"fp32": _FLOAT32, "bf16": _BFLOAT16, "fp16": _FLOAT16, "int8": _INT8}

TOLERANCES: Mapping[tuple[str, str], Mapping[str, Tolerance]] = {
    (runtime, precision): tolerances
    for runtime in ("onnxruntime", "openvino", "tensorrt", "tensorrt-rtx")
    for precision, tolerances in _BY_PRECISION.items()
    if (runtime, precision) != ("onnxruntime", "bf16")  # its CPU provider has no bfloat16
}
"""The one table of tolerances, by runtime and precision."""


@dataclass(frozen=True)
class PolicyTolerance:
    """Limits of the difference between a policy's graphs or quantized weights and PyTorch.

    Attributes:
        relative_error: largest absolute difference of a hidden state at ``<REF_POS>``, over the
            largest absolute reference value.
        mean_error: largest absolute mean difference on the same scale.
        cosine: smallest cosine similarity of two such states.
        token_agreement: smallest share of equal tokens.
        mask_iou: smallest cIoU of the masks.
        reason: justification of the numbers.
    """

    relative_error: float
    mean_error: float
    cosine: float
    token_agreement: float
    mask_iou: float
    reason: str

    def __str__(self) -> str:
        """Return the limits in one line."""
        return (
            f"{self.token_agreement:.0%} of the tokens, cosine {self.cosine}, relative error "
            f"{self.relative_error:.0e}, mask IoU {self.mask_iou}"
        )

    def accepts(self, values: Mapping[str, float]) -> bool:
        """Whether all values, by the names above, are within the limits; nan is not."""
        largest = ("relative_error", "mean_error")
        smallest = ("cosine", "token_agreement", "mask_iou")
        return all(abs(values[name]) <= getattr(self, name) for name in largest) and all(
            values[name] >= getattr(self, name) for name in smallest
        )


POLICY_TOLERANCES: Mapping[str, PolicyTolerance] = {
    "fp32": PolicyTolerance(1e-3, 1e-4, 0.99999, 1.0, 0.999, "float32 sums in another order"),
    "bf16": PolicyTolerance(
        3e-2, 3e-3, 0.9995, 0.95, 0.97, "the demo model measures 4e-3, cosine .999995, IoU 1.0"
    ),
    "int8": PolicyTolerance(
        0.1, 1e-2, 0.995, 0.95, 0.97, "the demo model measures 1.9e-2, cosine .9999, IoU 1.0"
    ),
    "int4": PolicyTolerance(
        0.4, 5e-2, 0.97, 0.9, 0.93, "the demo model measures 9.6e-2, cosine .997, IoU 1.0"
    ),
}
"""Tolerances of a policy's graphs, by precision."""

QUANTIZED_POLICY_TOLERANCES: Mapping[str, PolicyTolerance] = {
    "w4a16": PolicyTolerance(
        0.4, 5e-2, 0.97, 0.9, 0.93, "the demo model measures 9e-2, cosine .996, IoU 1.0"
    ),
    "w8a8": PolicyTolerance(
        0.1, 1e-2, 0.995, 0.95, 0.97, "the demo model measures 1.8e-2, cosine .9999, IoU 1.0"
    ),
    "fp8": PolicyTolerance(
        0.2,
        2e-2,
        0.99,
        0.95,
        0.95,
        "three bits after the point: the demo model measures 6e-2, cosine .998",
    ),
}
"""Tolerances of a quantized policy against the float one, by scheme."""
