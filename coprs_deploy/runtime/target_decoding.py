"""Decoding of concentrations to masks: prior, mask decoder and resize, fused where possible."""

from __future__ import annotations

import time
from collections.abc import Generator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from coprs_deploy.engines import DeviceTensor, SegmentationGraphs
from coprs_deploy.engines.graphs import join_chunks, masks_at_original_size
from coprs_deploy.images import ResizeTransform
from coprs_deploy.runtime.result import LowResolutionLogits, PriorEvent, Timings
from coprs_deploy.specs import Geometry


class Clock:
    """Stopwatch for consecutive steps."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap_ms(self) -> float:
        """Return the milliseconds since the previous lap, or since construction."""
        now = time.perf_counter()
        elapsed_ms, self._last = 1e3 * (now - self._last), now
        return elapsed_ms


@dataclass(frozen=True)
class DecodedTargets:
    """Masks of N targets, their logits and timings.

    Attributes:
        masks: (N, H, W) bool.
        mask_logits: low-resolution logits of the masks.
        prior_logits: low-resolution logits of the priors.
        timings: durations of prior, mask decoder and resize.
        finished: ``time.perf_counter()`` when the masks were ready.
        paused_ms: time from the prior's event until the next one was requested.
    """

    masks: NDArray[np.bool_]
    mask_logits: LowResolutionLogits
    prior_logits: LowResolutionLogits
    timings: Timings = field(default_factory=Timings)
    finished: float = 0.0
    paused_ms: float = 0.0

    @classmethod
    def none(cls, resize: ResizeTransform, geometry: Geometry) -> DecodedTargets:
        """Return the arrays of a request without a target, all of length 0."""
        side = geometry.mask_size
        logits = LowResolutionLogits(np.zeros((0, 1, side, side), np.float32), resize, geometry)
        return cls(np.zeros((0, *resize.original_size), np.bool_), logits, logits)


def decode_targets(
    graphs: SegmentationGraphs,
    embedding: DeviceTensor,
    concentrations: NDArray[np.float32],
    resize: ResizeTransform,
    geometry: Geometry,
    *,
    stream_prior: bool = False,
) -> Generator[PriorEvent, None, DecodedTargets]:
    """Decode N concentrations on one image.

    Args:
        graphs: graphs of the bundle.
        embedding: (1, C, G, G) image embedding.
        concentrations: (N, D) float32, N at least 1.
        resize: sizes of the image.
        geometry: sizes of the model.
        stream_prior: yield the prior before the masks are decoded, which prevents a fused launch.

    Yields:
        The prior, if ``stream_prior``.

    Returns:
        Masks and logits; logits are copied to the host after the masks.
    """

    def on_host(chunks: list[DeviceTensor]) -> LowResolutionLogits:
        return LowResolutionLogits(join_chunks(chunks, len(concentrations)), resize, geometry)

    clock = Clock()
    prior_ms = paused_ms = 0.0
    streamed: LowResolutionLogits | None = None
    if graphs.is_fused and not stream_prior:
        priors, masks = graphs.priors_and_masks(embedding, concentrations, resize.unpadded_size)
    else:
        priors = graphs.priors(embedding, concentrations)
        prior_ms = clock.lap_ms()
        if stream_prior:
            streamed = on_host(priors)
            clock.lap_ms()
            yield PriorEvent(streamed)
            paused_ms = clock.lap_ms()
        masks = graphs.masks(embedding, priors, resize.unpadded_size)
    mask_decoder_ms = clock.lap_ms()
    masks_on_host = masks_at_original_size(masks, len(concentrations), resize, geometry)
    resize_ms = clock.lap_ms()
    return DecodedTargets(
        masks=masks_on_host,
        finished=time.perf_counter(),
        mask_logits=on_host(masks),
        prior_logits=streamed or on_host(priors),
        timings=Timings(prior_ms=prior_ms, mask_decoder_ms=mask_decoder_ms, resize_ms=resize_ms),
        paused_ms=paused_ms,
    )
