"""Results of a segmentation request, and their export to JSON, COCO, supervision and files."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from coprs_deploy.artifacts import atomic_write, make_directory, write_json
from coprs_deploy.images import ResizeTransform, RgbArray
from coprs_deploy.logits import mask_cells, resize_logits, sigmoid
from coprs_deploy.specs import Geometry
from coprs_deploy.visualization import MAX_LONG_SIDE_PX, draw_heatmap, draw_overlay

if TYPE_CHECKING:
    import supervision as sv

STABILITY_OFFSET = 1.0
"""Logit offset of the stability score (``stability_score_offset`` of segment-anything)."""


@dataclass(frozen=True, eq=False, repr=False)
class LowResolutionLogits:
    """Logits of N targets on the mask grid, resized to the image on first access.

    Attributes:
        logits: (N, 1, M, M) float32, as the graph returns them.
        resize: sizes of the image.
        geometry: sizes of the model.
    """

    logits: NDArray[np.float32]
    resize: ResizeTransform
    geometry: Geometry

    @cached_property
    def at_original_size(self) -> NDArray[np.float32]:
        """(N, H, W) float32 logits."""
        return resize_logits(self.logits, self.resize, self.geometry)

    def reduced(self, max_side_px: int) -> NDArray[np.float32]:
        """(N, H, W) float32 logits at the image size, or at ``max_side_px`` if that is smaller."""
        height, width = self.resize.original_size
        factor = min(1.0, max_side_px / max(height, width))
        size = (max(1, round(factor * height)), max(1, round(factor * width)))
        resize = ResizeTransform(self.resize.unpadded_size, size)
        return resize_logits(self.logits, resize, self.geometry)

    @cached_property
    def stability_scores(self) -> NDArray[np.float64]:
        """(N,) stability scores on the mask cells of the image; 0 for an empty mask.

        ``calculate_stability_score`` of segment-anything with mask threshold 0.0 and offset 1.0:
        area(logits > +1) / area(logits > -1).
        """
        rows, columns = mask_cells(self.resize.unpadded_size, self.geometry)
        inside = self.logits[:, 0, :rows, :columns]
        high = np.count_nonzero(inside > STABILITY_OFFSET, axis=(1, 2))
        low = np.count_nonzero(inside > -STABILITY_OFFSET, axis=(1, 2))
        scores: NDArray[np.float64] = high / np.maximum(low, 1)
        return scores


@dataclass(frozen=True, eq=False, repr=False)
class PriorEvent:
    """Stream event with the prior, sent before the masks are decoded."""

    _prior_logits: LowResolutionLogits

    @property
    def prior_logits(self) -> NDArray[np.float32]:
        """(N, H, W) float32 logits at the original image size, computed on first access."""
        return self._prior_logits.at_original_size

    @property
    def prior(self) -> NDArray[np.float32]:
        """(H, W) float32 heat map of the last target in [0, 1]."""
        return sigmoid(self.prior_logits[-1])

    def reduced_prior(self, max_side_px: int) -> NDArray[np.float32]:
        """(H, W) float32 heat map of all targets in [0, 1], at most ``max_side_px`` long."""
        return sigmoid(self._prior_logits.reduced(max_side_px).max(axis=0))


@dataclass(frozen=True)
class Timings:
    """Wall time of each part of a request in milliseconds, and token counts.

    Attributes:
        queue_ms: wait for vLLM, and of an image that was uploaded for memory and a core; the other
            policies wait within ``prefill_ms`` and ``decode_ms``.
        image_decode_ms: decoding of the image, and its content hash if embeddings are cached.
        policy_preprocess_ms: image preprocessing of the policy; with vLLM only the resize, since
            its engine does the rest within ``prefill_ms``.
        image_encoder_ms: preprocessing and encoding of the image's batch; 0 if the embedding was
            cached.
        image_encoder_overlap_ms: the part of ``image_encoder_ms`` that ran concurrently with the
            policy.
        prefill_ms: prompt and image prefill of the policy.
        decode_ms: decoding of the response, including the last hidden state.
        prior_ms: prior graph, all targets; 0 if it is fused with the mask decoder.
        mask_decoder_ms: mask decoder graph, all targets.
        resize_ms: resizing of the masks to the original image size.
        reference_to_mask_ms: from the last hidden state of the policy to the masks: the rest of
            the image encoder, prior, mask decoder and resize.
        total_ms: whole request.
        prompt_tokens: tokens of the prompt, including vision tokens.
        cached_prompt_tokens: prompt tokens that an earlier request had read.
        response_tokens: tokens of the response.
        tokens_per_second: response tokens per second of ``decode_ms``.
    """

    queue_ms: float = 0.0
    image_decode_ms: float = 0.0
    policy_preprocess_ms: float = 0.0
    image_encoder_ms: float = 0.0
    image_encoder_overlap_ms: float = 0.0
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
    """Reasoning, prior and masks for one instruction.

    Attributes:
        masks: (N, H, W) bool, one mask per target, in the order of the response.
        reasoning: text inside ``<think>``; the whole response if there is none.
        response: whole text of the policy.
        stop_reason: why the response ended: ``targets_reached``, ``end_of_text`` or
            ``token_budget``; or why its answer was forced: ``reasoning_budget`` or ``deadline``.
        format_violations: deviations from the response format, as in ``text_after_reference``; see
            :class:`coprs_deploy.prompts.FormatViolation`.
        instruction: the instruction of the request.
        timings: wall times and token counts.
        runtime: description of graphs and policy.
        image: (H, W, 3) uint8 RGB, upright, read-only.
    """

    masks: NDArray[np.bool_]
    reasoning: str
    response: str
    stop_reason: str
    format_violations: tuple[str, ...]
    instruction: str
    timings: Timings
    runtime: str
    image: RgbArray
    _mask_logits: LowResolutionLogits
    _prior_logits: LowResolutionLogits

    @property
    def found(self) -> bool:
        """Whether the policy named a target; if not, all arrays have length 0."""
        return len(self.masks) > 0

    @property
    def mask(self) -> NDArray[np.bool_]:
        """(H, W) bool mask of the last target, the one that counts; empty if none was found."""
        if self.found:
            last: NDArray[np.bool_] = self.masks[-1]
            return last
        return np.zeros(self.image.shape[:2], dtype=np.bool_)

    @property
    def scores(self) -> NDArray[np.float64]:
        """(N,) confidence of each mask in [0, 1]: SAM's stability score of its logits.

        Computed on first access from the low-resolution mask logits inside the image: the number of
        mask cells with a logit above 1.0, divided by those with a logit above -1.0.
        """
        return self._mask_logits.stability_scores

    @cached_property
    def boxes(self) -> NDArray[np.int64]:
        """(N, 4) bounding boxes x1, y1, x2, y2 in pixels, x2 and y2 exclusive; 0 if empty."""
        return np.array([_bounding_box(mask) for mask in self.masks], np.int64).reshape(-1, 4)

    @cached_property
    def areas(self) -> NDArray[np.int64]:
        """(N,) mask areas in pixels."""
        return np.array([np.count_nonzero(mask) for mask in self.masks], np.int64)

    @property
    def prior_logits(self) -> NDArray[np.float32]:
        """(N, H, W) float32 prior logits at the original image size, computed on first access."""
        return self._prior_logits.at_original_size

    @property
    def prior(self) -> NDArray[np.float32]:
        """(H, W) float32 heat map of the last target in [0, 1]; 0 if none was found."""
        if self.found:
            return sigmoid(self.prior_logits[-1])
        return np.zeros(self.image.shape[:2], dtype=np.float32)

    @property
    def mask_logits(self) -> NDArray[np.float32]:
        """(N, H, W) float32 mask logits at the original image size, computed on first access."""
        return self._mask_logits.at_original_size

    @property
    def low_resolution_mask_logits(self) -> LowResolutionLogits:
        """Mask logits on the mask grid, as the mask decoder returns them."""
        return self._mask_logits

    @property
    def low_resolution_prior_logits(self) -> LowResolutionLogits:
        """Prior logits on the mask grid, as the prior graph returns them."""
        return self._prior_logits

    def to_json(self, *, masks: bool = True) -> dict[str, Any]:
        """Return everything but the arrays as JSON types; masks are compressed COCO RLE.

        Args:
            masks: whether ``masks`` is included.
        """
        height, width = self.image.shape[:2]
        return {
            "found": self.found,
            "instruction": self.instruction,
            "reasoning": self.reasoning,
            "response": self.response,
            "stop_reason": self.stop_reason,
            "format_violations": list(self.format_violations),
            "image_size": [height, width],
            "scores": self.scores.tolist(),
            "boxes": self.boxes.tolist(),
            "areas": self.areas.tolist(),
            **({"masks": self._rle()} if masks else {}),
            "timings": asdict(self.timings),
            "runtime": self.runtime,
        }

    def to_coco(self, image_id: int | str = 0, category_id: int = 1) -> list[dict[str, Any]]:
        """Return the masks as COCO segmentation results, as ``COCO.loadRes`` reads them.

        Args:
            image_id: id of the image in the COCO data set.
            category_id: category of all masks.

        Returns:
            One result per mask: ``image_id``, ``category_id``, ``segmentation`` (compressed RLE),
            ``bbox`` (x, y, width, height), ``area`` in pixels and ``score``.
        """
        from coprs_deploy.data.coco_results import coco_results

        numbers = (each.tolist() for each in (self.boxes, self.areas, self.scores))
        return coco_results(image_id, self._rle(), *numbers, category_id=category_id)

    def to_supervision(self) -> sv.Detections:
        """Return the masks as ``supervision.Detections``, labeled with the instruction.

        Raises:
            MissingDependencyError: supervision is not installed.
        """
        from coprs_deploy.data.detections import detections

        instructions = [self.instruction] * len(self.masks)
        return detections(self.masks, self.boxes, self.scores, instructions, [self.instruction])

    def plot(self) -> Image.Image:
        """Draw the masks over the image, with the instruction as caption."""
        return draw_overlay(self.image, self.masks, self.instruction)

    def save(self, directory: str | Path) -> dict[str, Path]:
        """Write overlay, masks, heat maps and JSON to a directory.

        Several targets are numbered: ``mask-1.png``, ``mask-2.png``, likewise for the priors.

        Returns:
            Paths of the written files: ``overlay``, ``result`` and, per target, ``mask`` and
            ``prior`` (with the target's number if there are several).
        """
        root = Path(directory)
        make_directory(root)
        written = {"overlay": root / "overlay.png", "result": root / "result.json"}
        _save_png(self.plot(), written["overlay"])
        masks = self.masks if self.found else self.mask[None]
        no_prior = np.zeros((1, 1, 1), dtype=np.float32)
        priors = sigmoid(self._prior_logits.reduced(MAX_LONG_SIDE_PX)) if self.found else no_prior
        for number, (mask, prior) in enumerate(zip(masks, priors, strict=True), start=1):
            suffix = f"-{number}" if len(masks) > 1 else ""
            written[f"mask{suffix}"] = root / f"mask{suffix}.png"
            written[f"prior{suffix}"] = root / f"prior{suffix}.png"
            _save_png(Image.fromarray(mask.astype(np.uint8) * 255), written[f"mask{suffix}"])
            _save_png(draw_heatmap(self.image, prior), written[f"prior{suffix}"])
        write_json(written["result"], self.to_json())
        return written

    def _rle(self) -> list[dict[str, Any]]:
        from coprs_deploy.data.rle import encode_mask

        return [{"size": [*rle.size], "counts": rle.counts} for rle in map(encode_mask, self.masks)]

    def __repr__(self) -> str:
        height, width = self.image.shape[:2]
        reasoning = self.reasoning if len(self.reasoning) <= 60 else self.reasoning[:57] + "..."
        if self.found:
            shares = ", ".join(f"{100 * mask.mean():.1f}%" for mask in self.masks)
            noun = "mask" if len(self.masks) == 1 else "masks"
            found = f"{len(self.masks)} {noun} covering {shares} of {width}x{height}"
        else:
            found = f"nothing found in {width}x{height}"
        return (
            f"SegmentationResult({found}, {self.stop_reason}, {self.timings.total_ms:.0f} ms, "
            f"reasoning={reasoning!r})"
        )


def _save_png(image: Image.Image, path: Path) -> None:
    with atomic_write(path) as partial:
        image.save(partial, "PNG")


def _bounding_box(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return 0, 0, 0, 0
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
