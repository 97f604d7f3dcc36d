"""Mask logits to masks at the picture's size, where the logits lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

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

    Logits on a GPU are resized and cut there, on the stream that made them, and what is copied to
    the host is one byte a pixel in one piece.

    Args:
        chunks: what the mask decoder gave, (n, 1, M, M) each; the last may hold repeated targets.
        num_targets: N, how many of them are meant.
        placed: the sizes of the picture.
        geometry: sizes of the model.

    Returns:
        (N, H, W) bool.
    """
    on_gpu = [chunk for chunk in chunks if isinstance(chunk, CudaTensor)]
    if not on_gpu or len(on_gpu) < len(chunks):
        masks: NDArray[np.bool_] = (
            resize_logits(join_chunks(list(chunks), num_targets), placed, geometry) > 0
        )
        return masks
    return _on_gpu(on_gpu, num_targets, placed, geometry)


def _on_gpu(
    chunks: Sequence[CudaTensor], num_targets: int, placed: Placed, geometry: Geometry
) -> NDArray[np.bool_]:
    import torch

    stream = chunks[0].stream
    host = torch.empty(num_targets, *placed.original_size, dtype=torch.bool, pin_memory=True)
    with torch.cuda.stream(stream), torch.inference_mode():
        start = 0
        for chunk in chunks:
            stream.wait_event(chunk.ready)
            chunk.tensor.record_stream(stream)
            logits = chunk.tensor[: num_targets - start]
            masks = cut_at_original_size(logits, placed, geometry)
            host[start : start + len(masks)].copy_(masks, non_blocking=True)
            start += len(masks)
        stream.synchronize()
    array: NDArray[np.bool_] = host.numpy()
    return array


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
