"""The three runners as one pipeline: an image once, then any number of targets on it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from coprs_deploy.closing import Closeable
from coprs_deploy.engines.cuda import CudaTensor
from coprs_deploy.engines.runner import DeviceTensor, Runner
from coprs_deploy.images import HasResize, PreparedImage, check_valid_region, resize_logits
from coprs_deploy.specs import (
    IMAGE_ENCODER,
    MASK_DECODER,
    PRIOR,
    Geometry,
    OptimizationProfile,
    ValidRegion,
)

if TYPE_CHECKING:
    import torch


class SegmentationGraphs(Closeable):
    """Image encoder, prior and mask decoder of one bundle (or of one model).

    Calls from several threads are safe where the runners' are (ONNX Runtime: yes).
    """

    def __init__(self, runners: Mapping[str, Runner]) -> None:
        self.runners = dict(runners)
        self._joined = self.runners[PRIOR].fused_with(self.runners[MASK_DECODER])

    @property
    def joins_targets(self) -> bool:
        """Whether :meth:`priors_and_masks` is one piece of work."""
        return self._joined is not None

    def encode(self, prepared: PreparedImage) -> DeviceTensor:
        """Encode an image; the embedding stays on the device, (1, C, G, G)."""
        return self.encode_together([prepared])[0]

    @property
    def valid_region(self) -> ValidRegion | None:
        """How far pictures may reach into the padded square; None stands for all of it."""
        return self.runners[IMAGE_ENCODER].spec.valid_region

    @property
    def images(self) -> OptimizationProfile:
        """How many images the encoder takes in one call."""
        return self.runners[IMAGE_ENCODER].spec.images

    def encode_together(self, images: Sequence[PreparedImage]) -> list[DeviceTensor]:
        """Encode images in few calls, of few different sizes; see :meth:`OptimizationProfile.size_for`.

        Returns:
            An embedding for each, (1, C, G, G), on the device.

        Raises:
            ImageSizeError: a picture reaches further than the encoder was made for.
        """
        for prepared in images:
            check_valid_region(prepared, self.valid_region)
        embeddings: list[DeviceTensor] = []
        while len(embeddings) < len(images):
            start = len(embeddings)
            size = self.images.size_for(len(images) - start)
            batch = [prepared.image for prepared in images[start : start + size]]
            stacked = batch[0] if size == 1 else np.concatenate(batch)
            encoded = self.runners[IMAGE_ENCODER](image=stacked)["image_embedding"]
            embeddings += [encoded] if size == 1 else encoded.rows()
        return embeddings

    def priors(
        self, image_embedding: DeviceTensor, concentrations: NDArray[np.float32]
    ) -> list[DeviceTensor]:
        """Score N concentrations against an image.

        Args:
            image_embedding: what :meth:`encode` gave.
            concentrations: (N, D) float32, N at least 1.

        Returns:
            Prior logits in chunks of as many targets as the graph takes; the last chunk may repeat
            its last target to fill the graph's fixed number.
        """
        return [
            self.runners[PRIOR](image_embedding=image_embedding, concentration=chunk)[
                "prior_logits"
            ]
            for chunk in self._chunks(concentrations)
        ]

    def masks(
        self,
        image_embedding: DeviceTensor,
        prior_chunks: list[DeviceTensor],
        unpadded_size: NDArray[np.int64],
    ) -> list[DeviceTensor]:
        """Decode the chunks that :meth:`priors` gave into mask logits, chunk by chunk."""
        return [
            self.runners[MASK_DECODER](
                image_embedding=image_embedding,
                prior_logits=chunk,
                unpadded_size=unpadded_size,
            )["mask_logits"]
            for chunk in prior_chunks
        ]

    def priors_and_masks(
        self,
        image_embedding: DeviceTensor,
        concentrations: NDArray[np.float32],
        unpadded_size: NDArray[np.int64],
    ) -> tuple[list[DeviceTensor], list[DeviceTensor]]:
        """Score and decode N concentrations; nothing comes between the two where they are joined.

        Returns:
            What :meth:`priors` and :meth:`masks` give.
        """
        if self._joined is None:
            priors = self.priors(image_embedding, concentrations)
            return priors, self.masks(image_embedding, priors, unpadded_size)
        outputs = [
            self._joined(
                image_embedding=image_embedding, concentration=chunk, unpadded_size=unpadded_size
            )
            for chunk in self._chunks(concentrations)
        ]
        return [o["prior_logits"] for o in outputs], [o["mask_logits"] for o in outputs]

    def _chunks(self, concentrations: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
        profile = self.runners[PRIOR].spec.targets
        for start in range(0, len(concentrations), profile.max):
            chunk = concentrations[start : start + profile.max]
            lacking = max(0, profile.min - len(chunk))
            yield np.concatenate([chunk, np.repeat(chunk[-1:], lacking, axis=0)])

    def close(self) -> None:
        """Free all three graphs, what joins them first."""
        with ExitStack() as stack:
            for runner in self.runners.values():
                stack.callback(runner.close)
            if self._joined is not None:
                stack.callback(self._joined.close)


def join_chunks(chunks: list[DeviceTensor], num_targets: int) -> NDArray[np.float32]:
    """Bring chunks of logits to the host as one (num_targets, 1, M, M) array."""
    joined: NDArray[np.float32] = np.concatenate([chunk.numpy() for chunk in chunks])
    return joined[:num_targets]


def masks_at_original_size(
    chunks: Sequence[DeviceTensor], num_targets: int, placed: HasResize, geometry: Geometry
) -> NDArray[np.bool_]:
    """Bring mask logits to the picture's size and cut them at 0.

    Logits on a GPU are resized and cut there, target by target, and what is copied to the host is
    one byte a pixel; where the GPU has no room for that, the host does it.

    Args:
        chunks: what the mask decoder gave, (n, 1, M, M) each; the last may hold repeated targets.
        num_targets: N, how many of them are meant.
        placed: the sizes of the picture.
        geometry: sizes of the model.

    Returns:
        (N, H, W) bool.
    """
    on_gpu = [chunk for chunk in chunks if isinstance(chunk, CudaTensor)]
    if on_gpu and len(on_gpu) == len(chunks):
        masks = _cut_on_gpu(on_gpu, num_targets, placed, geometry)
        if masks is not None:
            return masks
    logits = join_chunks(list(chunks), num_targets)
    found: NDArray[np.bool_] = resize_logits(logits, placed, geometry) > 0
    return found


def _cut_on_gpu(
    chunks: Sequence[CudaTensor], num_targets: int, placed: HasResize, geometry: Geometry
) -> NDArray[np.bool_] | None:
    import torch

    stream = _stream_of(chunks[0].tensor.device)
    try:
        with torch.cuda.stream(stream), torch.inference_mode():
            for chunk in chunks:
                stream.wait_event(chunk.ready)
                chunk.tensor.record_stream(stream)
            tensors = [chunk.tensor for chunk in chunks]
            targets = [t[i : i + 1] for t in tensors for i in range(len(t))]
            masks = [cut_at_original_size(t, placed, geometry) for t in targets[:num_targets]]
            array: NDArray[np.bool_] = torch.cat(masks).cpu().numpy()
            return array
    except torch.OutOfMemoryError:
        return None


@lru_cache
def _stream_of(device: torch.device) -> Any:
    """Give the stream that masks are cut on; the engines' own may be in the middle of a capture."""
    import torch

    cuda: Any = torch.cuda  # its streams have no types
    return cuda.Stream(device, priority=-1)


def cut_at_original_size(
    logits: torch.Tensor, placed: HasResize, geometry: Geometry
) -> torch.Tensor:
    """Go SAM's way back: bilinear to the padded image, the crop, bilinear to the picture, the cut.

    Args:
        logits: (n, 1, M, M).
        placed: the sizes of the picture.
        geometry: sizes of the model.

    Returns:
        (n, H, W) bool on the same device.
    """
    from torch.nn import functional as F

    size = (geometry.image_size, geometry.image_size)
    grown = F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)
    height, width = (int(side) for side in placed.unpadded_size)
    cropped = grown[..., :height, :width]
    original = F.interpolate(
        cropped, size=placed.original_size, mode="bilinear", align_corners=False
    )
    return original[:, 0] > 0
