"""Mask logits to masks at the picture's size, where the logits lie."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from coprs_deploy.engines.cuda_device import CudaTensor
from coprs_deploy.engines.runner import DeviceTensor
from coprs_deploy.engines.stages import join_chunks
from coprs_deploy.images import Placed, resize_logits
from coprs_deploy.specs import Geometry

if TYPE_CHECKING:
    import torch


def masks_at_original_size(
    chunks: Sequence[DeviceTensor], num_targets: int, placed: Placed, geometry: Geometry
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
    chunks: Sequence[CudaTensor], num_targets: int, placed: Placed, geometry: Geometry
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


def cut_at_original_size(logits: torch.Tensor, placed: Placed, geometry: Geometry) -> torch.Tensor:
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
