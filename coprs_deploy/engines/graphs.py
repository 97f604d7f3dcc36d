"""The three graphs of a bundle as one pipeline, and masks at the original image size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from coprs_deploy.closing import Closeable
from coprs_deploy.engines.cuda import CudaTensor
from coprs_deploy.engines.runner import DeviceTensor, Runner
from coprs_deploy.images import PreparedImage, ResizeTransform, check_valid_region
from coprs_deploy.logits import threshold_logits
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
    """Image encoder, prior and mask decoder of one bundle or model.

    Calls from several threads are safe if the runners' are (ONNX Runtime: yes).

    Args:
        runners: one runner a graph, by graph name.
    """

    def __init__(self, runners: Mapping[str, Runner]) -> None:
        self.runners = dict(runners)
        self._fused = self.runners[PRIOR].fused_with(self.runners[MASK_DECODER])

    @property
    def is_fused(self) -> bool:
        """Whether :meth:`priors_and_masks` is one launch."""
        return self._fused is not None

    @property
    def valid_region(self) -> ValidRegion | None:
        """Region of the padded square that images may fill; None stands for all of it."""
        return self.runners[IMAGE_ENCODER].spec.valid_region

    @property
    def images(self) -> OptimizationProfile:
        """Optimization profile of the image encoder: images in one call."""
        return self.runners[IMAGE_ENCODER].spec.images

    def encode(self, prepared: PreparedImage) -> DeviceTensor:
        """Encode an image; the (1, C, G, G) float32 embedding stays on the device."""
        return self.encode_batch([prepared])[0]

    def encode_batch(self, images: Sequence[PreparedImage]) -> list[DeviceTensor]:
        """Encode images in as few calls as :meth:`OptimizationProfile.size_for` allows.

        Returns:
            A (1, C, G, G) float32 embedding for each image, on the device.

        Raises:
            ImageSizeError: an image extends beyond the encoder's valid region.
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
        """Compute the positional priors of (N, D) concentrations on a (1, C, G, G) embedding.

        Returns:
            (n, 1, M, M) prior logits in chunks of as many targets as the graph takes. The last
            chunk may repeat its last target to fill the graph's fixed number.
        """
        prior = self.runners[PRIOR]
        return [
            prior(image_embedding=image_embedding, concentration=chunk)["prior_logits"]
            for chunk in self._chunks(concentrations)
        ]

    def masks(
        self,
        image_embedding: DeviceTensor,
        prior_chunks: list[DeviceTensor],
        unpadded_size: NDArray[np.int64],
    ) -> list[DeviceTensor]:
        """Decode the chunks of :meth:`priors` into (n, 1, M, M) mask logits, chunk by chunk."""
        decode = partial(
            self.runners[MASK_DECODER], image_embedding=image_embedding, unpadded_size=unpadded_size
        )
        return [decode(prior_logits=chunk)["mask_logits"] for chunk in prior_chunks]

    def priors_and_masks(
        self,
        image_embedding: DeviceTensor,
        concentrations: NDArray[np.float32],
        unpadded_size: NDArray[np.int64],
    ) -> tuple[list[DeviceTensor], list[DeviceTensor]]:
        """Compute :meth:`priors` and :meth:`masks`, in one launch a chunk if they are fused."""
        if self._fused is None:
            priors = self.priors(image_embedding, concentrations)
            return priors, self.masks(image_embedding, priors, unpadded_size)
        decode = partial(self._fused, image_embedding=image_embedding, unpadded_size=unpadded_size)
        outputs = [decode(concentration=chunk) for chunk in self._chunks(concentrations)]
        return [o["prior_logits"] for o in outputs], [o["mask_logits"] for o in outputs]

    def _chunks(self, concentrations: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
        profile = self.runners[PRIOR].spec.targets
        for start in range(0, len(concentrations), profile.max):
            chunk = concentrations[start : start + profile.max]
            missing = max(0, profile.min - len(chunk))
            yield np.concatenate([chunk, np.repeat(chunk[-1:], missing, axis=0)])

    def close(self) -> None:
        """Free all graphs, the fused one first."""
        with ExitStack() as stack:
            for runner in self.runners.values():
                stack.callback(runner.close)
            if self._fused is not None:
                stack.callback(self._fused.close)


def join_chunks(chunks: Sequence[DeviceTensor], num_targets: int) -> NDArray[np.float32]:
    """Copy chunks of logits to the host as one (num_targets, 1, M, M) array."""
    logits: NDArray[np.float32] = np.concatenate([chunk.numpy() for chunk in chunks])
    return logits[:num_targets]


def masks_at_original_size(
    chunks: Sequence[DeviceTensor], num_targets: int, image: ResizeTransform, geometry: Geometry
) -> NDArray[np.bool_]:
    """Resize mask logits to the original image size and threshold them at 0.

    Logits on a GPU are resized and thresholded there, target by target, so that one byte a pixel is
    copied to the host. The host does the work if the GPU runs out of memory.

    Args:
        chunks: (n, 1, M, M) mask logits each; the last chunk may end with repeated targets.
        num_targets: N, the number of targets without repetitions.
        image: original size H x W and unpadded size of the image.
        geometry: sizes of the model.

    Returns:
        (N, H, W) bool masks.
    """
    on_gpu = [chunk for chunk in chunks if isinstance(chunk, CudaTensor)]
    if on_gpu and len(on_gpu) == len(chunks):
        masks = _masks_on_gpu(on_gpu, num_targets, image, geometry)
        if masks is not None:
            return masks
    return threshold_logits(join_chunks(chunks, num_targets), image, geometry)


def _masks_on_gpu(
    chunks: Sequence[CudaTensor], num_targets: int, image: ResizeTransform, geometry: Geometry
) -> NDArray[np.bool_] | None:
    """Compute the masks on the GPU; None if it runs out of memory."""
    import torch

    stream = _mask_stream(chunks[0].tensor.device)
    try:
        with torch.cuda.stream(stream), torch.inference_mode():
            for chunk in chunks:
                stream.wait_event(chunk.ready)
                chunk.tensor.record_stream(stream)
            targets = [row.tensor for chunk in chunks for row in chunk.rows()]
            masks = [threshold_at_original_size(t, image, geometry) for t in targets[:num_targets]]
            array: NDArray[np.bool_] = torch.cat(masks).cpu().numpy()
            return array
    except torch.OutOfMemoryError:
        return None


@lru_cache
def _mask_stream(device: torch.device) -> Any:
    """Return a stream for mask resizing; the runners' own streams may be capturing."""
    import torch

    cuda: Any = torch.cuda  # its streams have no types
    return cuda.Stream(device, priority=-1)


def threshold_at_original_size(
    logits: torch.Tensor, image: ResizeTransform, geometry: Geometry
) -> torch.Tensor:
    """Resize (n, 1, M, M) logits as SAM does and threshold them at 0: (n, H, W) bool.

    Bilinear to the padded image, crop of the padding, bilinear to the original size.
    """
    from torch.nn import functional as F

    resize = partial(F.interpolate, mode="bilinear", align_corners=False)
    padded = resize(logits.float(), size=(geometry.image_size, geometry.image_size))
    height, width = (int(side) for side in image.unpadded_size)
    return resize(padded[..., :height, :width], size=image.original_size)[:, 0] > 0
