"""From concentrations to masks: one uninterrupted piece, unless somebody wants the prior first."""

from __future__ import annotations

import time
from collections.abc import Generator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coprs_deploy.engines import DeviceTensor, SegmentationGraphs
from coprs_deploy.engines.graphs import join_chunks, masks_at_original_size
from coprs_deploy.images import HasResize
from coprs_deploy.runtime.result import LowResolutionLogits, PriorEvent
from coprs_deploy.specs import Geometry


class Clock:
    """Times consecutive stages."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap_ms(self) -> float:
        """Milliseconds since the last lap, or since the clock was made."""
        now = time.perf_counter()
        elapsed_ms, self._last = 1e3 * (now - self._last), now
        return elapsed_ms


@dataclass(frozen=True)
class DecodedTargets:
    """The masks of N targets and what led to them.

    Attributes:
        masks: (N, H, W) bool.
        mask_maps: their logits.
        prior_maps: the logits of their priors.
        prior_ms: the prior graph; 0 where it is one piece with the mask decoder.
        mask_decoder_ms: the mask decoder graph.
        resize_ms: bringing the masks to the picture's size.
        finished: when the masks were there, by ``time.perf_counter``.
    """

    masks: NDArray[np.bool_]
    mask_maps: LowResolutionLogits
    prior_maps: LowResolutionLogits
    prior_ms: float = 0.0
    mask_decoder_ms: float = 0.0
    resize_ms: float = 0.0
    finished: float = 0.0

    @classmethod
    def none(cls, placed: HasResize, geometry: Geometry) -> DecodedTargets:
        """What an answer without a target has."""
        side = geometry.mask_size
        nothing = LowResolutionLogits.of(np.zeros((0, 1, side, side), np.float32), placed, geometry)
        return cls(np.zeros((0, *placed.original_size), np.bool_), nothing, nothing)


def decode_targets(
    stages: SegmentationGraphs,
    embedding: DeviceTensor,
    concentrations: NDArray[np.float32],
    placed: HasResize,
    geometry: Geometry,
    *,
    announces_prior: bool = False,
) -> Generator[PriorEvent, None, DecodedTargets]:
    """Decode N concentrations on an image.

    Args:
        stages: the graphs.
        embedding: of the image.
        concentrations: (N, D) float32, N at least 1.
        placed: the sizes of the picture.
        geometry: sizes of the model.
        announces_prior: whether the prior is wanted before the mask is decoded.

    Yields:
        The prior, if it is wanted.

    Returns:
        Everything together; the logits come to the host after the masks.
    """

    def maps(chunks: list[DeviceTensor]) -> LowResolutionLogits:
        return LowResolutionLogits.of(join_chunks(chunks, len(concentrations)), placed, geometry)

    clock = Clock()
    prior_ms = 0.0
    announced: LowResolutionLogits | None = None
    if stages.is_fused and not announces_prior:
        priors, masks = stages.priors_and_masks(embedding, concentrations, placed.unpadded_size)
    else:
        priors = stages.priors(embedding, concentrations)
        prior_ms = clock.lap_ms()
        if announces_prior:
            announced = maps(priors)
            yield PriorEvent(announced)
            clock.lap_ms()
        masks = stages.masks(embedding, priors, placed.unpadded_size)
    mask_decoder_ms = clock.lap_ms()
    bits = masks_at_original_size(masks, len(concentrations), placed, geometry)
    resize_ms = clock.lap_ms()
    return DecodedTargets(
        masks=bits,
        finished=time.perf_counter(),
        mask_maps=maps(masks),
        prior_maps=announced or maps(priors),
        prior_ms=prior_ms,
        mask_decoder_ms=mask_decoder_ms,
        resize_ms=resize_ms,
    )
