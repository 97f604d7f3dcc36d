"""What an answer is, and how it is written to disk."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from coprs_deploy.images import HasResize, RgbArray, resize_logits
from coprs_deploy.specs import OUTSIDE_IMAGE_LOGIT, Geometry
from coprs_deploy.visualization import draw_heatmap, draw_overlay


@dataclass(frozen=True, eq=False)
class PriorEvent:
    """The prior, streamed as soon as it exists.

    Attributes:
        prior_maps: its logits, one map a target.
    """

    prior_maps: LowResolutionLogits

    @property
    def priors(self) -> NDArray[np.float32]:
        """(N, H, W) float32 logits at the picture's size, computed when first asked for."""
        return self.prior_maps.at_original_size


@dataclass(frozen=True)
class Timings:
    """Wall time of each stage in milliseconds.

    Attributes:
        queue_ms: waiting for the policy's turn.
        image_ms: decoding the picture, and naming it by its content where embeddings are kept.
        policy_image_ms: preparing the picture for the policy; of vLLM only fitting it to the
            policy's size, for its engine does the rest in ``prefill_ms``.
        image_encoder_ms: preparing the picture for the image encoder and encoding it, together
            with those that waited beside it; 0 when the embedding was kept from before.
        image_encoder_hidden_ms: the part of it during which the policy was at work anyway.
        prefill_ms: the policy reading prompt and image.
        decode_ms: the policy writing, the last hidden state included.
        prior_ms: the prior graph, for all targets; 0 where it is one piece with the mask decoder.
        mask_decoder_ms: the mask decoder graph, for all targets.
        resize_ms: bringing the masks to the original size.
        reference_to_mask_ms: from the policy's last hidden state to the masks: what was left of the
            image encoder, the prior, the mask decoder and the way to the original size.
        total_ms: from the call to the answer.
        prompt_tokens: tokens of the prompt, vision tokens included.
        cached_prompt_tokens: those of them that the policy had read for an earlier question.
        response_tokens: tokens that the policy wrote.
        tokens_per_second: of them, while it wrote.
    """

    queue_ms: float = 0.0
    image_ms: float = 0.0
    policy_image_ms: float = 0.0
    image_encoder_ms: float = 0.0
    image_encoder_hidden_ms: float = 0.0
    prefill_ms: float = 0.0
    decode_ms: float = 0.0
    prior_ms: float = 0.0
    mask_decoder_ms: float = 0.0
    resize_ms: float = 0.0
    reference_to_mask_ms: float = 0.0
    total_ms: float = 0.0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    response_tokens: int = 0
    tokens_per_second: float = 0.0


@dataclass(frozen=True, repr=False, eq=False)
class SegmentationResult:
    """Reasoning, prior and mask for one instruction.

    Attributes:
        found: whether the policy named a target; if not, the masks are empty and ``reason`` says
            why.
        masks: (N, H, W) bool, one mask a target, in the order in which they were named.
        mask_maps: the logits that the masks are cut from, at the model's size.
        prior_maps: the logits of the heatmaps, at the model's size.
        reasoning: what the policy thought.
        response: its whole text.
        reason: why nothing was found; empty when something was.
        format_faults: what is wrong with the form of the response, for people.
        instruction: the question.
        timings: milliseconds a stage.
        runtime: what ran the graphs and the policy.
        image: (H, W, 3) uint8, the picture, upright; read-only.
    """

    found: bool
    masks: NDArray[np.bool_]
    mask_maps: LowResolutionLogits
    prior_maps: LowResolutionLogits
    reasoning: str
    response: str
    reason: str
    format_faults: tuple[str, ...]
    instruction: str
    timings: Timings
    runtime: str
    image: RgbArray

    @property
    def mask(self) -> NDArray[np.bool_]:
        """(H, W) bool: the last target's mask, the one that counts; empty when none was found."""
        if self.found:
            last: NDArray[np.bool_] = self.masks[-1]
            return last
        return np.zeros(self.image.shape[:2], dtype=np.bool_)

    @property
    def priors(self) -> NDArray[np.float32]:
        """(N, H, W) float32 logits of the heatmaps, computed when they are first asked for."""
        return self.prior_maps.at_original_size

    @property
    def mask_logits(self) -> NDArray[np.float32]:
        """(N, H, W) float32 logits of the masks, computed when they are first asked for."""
        return self.mask_maps.at_original_size

    @property
    def prior(self) -> NDArray[np.float32]:
        """(H, W) float32 logits: the last target's prior; -50 everywhere when none was found."""
        if self.found:
            last: NDArray[np.float32] = self.priors[-1]
            return last
        return np.full(self.image.shape[:2], OUTSIDE_IMAGE_LOGIT, dtype=np.float32)

    def rle(self) -> list[dict[str, Any]]:
        """Return each mask in COCO's compressed run-length form, counts as text."""
        from pycocotools import mask as coco

        encoded = (coco.encode(np.asfortranarray(mask, dtype=np.uint8)) for mask in self.masks)
        return [{"size": e["size"], "counts": e["counts"].decode("ascii")} for e in encoded]

    def to_json(self) -> dict[str, Any]:
        """Return everything but the arrays; masks are in COCO's run-length form."""
        height, width = self.image.shape[:2]
        return {
            "found": self.found,
            "instruction": self.instruction,
            "reasoning": self.reasoning,
            "response": self.response,
            "reason": self.reason,
            "format_faults": list(self.format_faults),
            "image_size": [height, width],
            "mask_pixels": [int(mask.sum()) for mask in self.masks],
            "masks": self.rle(),
            "timings": asdict(self.timings),
            "runtime": self.runtime,
        }

    def save(self, directory: str | Path) -> dict[str, Path]:
        """Write the answer to a directory.

        Several targets give ``mask-1.png``, ``mask-2.png`` and so on, and likewise for the priors.

        Returns:
            What was written: ``overlay``, ``result`` and, for each target, ``mask`` and ``prior``
            (with the target's number when there are several).
        """
        root = Path(directory)
        root.mkdir(parents=True, exist_ok=True)
        written = {"overlay": root / "overlay.png", "result": root / "result.json"}
        draw_overlay(self.image, self.masks, self.instruction).save(written["overlay"])
        several = len(self.masks) > 1
        masks = self.masks if self.found else self.mask[None]
        priors = self.priors if self.found else self.prior[None]
        for number, (mask, prior) in enumerate(zip(masks, priors, strict=True), start=1):
            suffix = f"-{number}" if several else ""
            written[f"mask{suffix}"] = root / f"mask{suffix}.png"
            written[f"prior{suffix}"] = root / f"prior{suffix}.png"
            Image.fromarray(mask.astype(np.uint8) * 255).save(written[f"mask{suffix}"])
            draw_heatmap(self.image, prior).save(written[f"prior{suffix}"])
        text = json.dumps(self.to_json(), indent=2, ensure_ascii=False) + "\n"
        written["result"].write_text(text, encoding="utf-8")
        return written

    def __repr__(self) -> str:
        height, width = self.image.shape[:2]
        thought = self.reasoning if len(self.reasoning) <= 60 else self.reasoning[:57] + "..."
        if not self.found:
            return f"SegmentationResult(nothing found: {self.reason}; {width}x{height}, reasoning={thought!r})"
        shares = ", ".join(f"{100 * mask.mean():.1f}%" for mask in self.masks)
        noun = "mask" if len(self.masks) == 1 else "masks"
        return (
            f"SegmentationResult({len(self.masks)} {noun} covering {shares} of {width}x{height}, "
            f"{self.timings.total_ms:.0f} ms, reasoning={thought!r})"
        )


@dataclass(frozen=True, eq=False, repr=False)
class LowResolutionLogits:
    """The logits of N targets on one picture.

    Attributes:
        logits: (N, 1, M, M) float32, as the graph gives them.
        unpadded_size: int64 (2,), height and width of the picture in the padded image.
        original_size: height and width of the picture in pixels.
        geometry: sizes of the model.
    """

    logits: NDArray[np.float32]
    unpadded_size: NDArray[np.int64]
    original_size: tuple[int, int]
    geometry: Geometry

    @classmethod
    def of(
        cls, logits: NDArray[np.float32], placed: HasResize, geometry: Geometry
    ) -> LowResolutionLogits:
        """Keep logits with the sizes of their picture, without its pixels."""
        return cls(logits, placed.unpadded_size, placed.original_size, geometry)

    @cached_property
    def at_original_size(self) -> NDArray[np.float32]:
        """(N, H, W) float32 logits, computed when they are first asked for."""
        return resize_logits(self.logits, self, self.geometry)
