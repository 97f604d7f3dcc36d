"""Forms in which the masks of a result are sent: the field ``return`` of a request.

rle         masks           compressed COCO RLE
png         mask_pngs       PNG files of one bit per pixel, in base64
polygons    mask_polygons   COCO polygons, which are filled to exactly the mask
logits      mask_logits, prior_logits   on the mask grid, before they are resized to the image
"""

from __future__ import annotations

import base64
import io
from collections.abc import Collection
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from coprs_deploy.data.mask_outlines import polygons_from_mask
from coprs_deploy.runtime import SegmentationResult
from coprs_deploy.runtime.result import LowResolutionLogits

MaskFormat: TypeAlias = Literal["rle", "png", "polygons", "logits"]

MASK_FORMATS: tuple[str, ...] = get_args(MaskFormat)


def result_json(result: SegmentationResult, formats: Collection[MaskFormat]) -> dict[str, Any]:
    """Return a result as JSON with its masks in the given forms."""
    content = result.to_json(masks="rle" in formats)
    if "png" in formats:
        content["mask_pngs"] = [_png(mask) for mask in result.masks]
    if "polygons" in formats:
        content["mask_polygons"] = [polygons_from_mask(mask) for mask in result.masks]
    if "logits" in formats:
        content["mask_logits"] = _tensor(result.low_resolution_mask_logits)
        content["prior_logits"] = _tensor(result.low_resolution_prior_logits)
    return content


def _png(mask: NDArray[np.bool_]) -> str:
    file = io.BytesIO()
    Image.fromarray(mask).save(file, "PNG", compress_level=1)
    return base64.b64encode(file.getvalue()).decode("ascii")


def _tensor(logits: LowResolutionLogits) -> dict[str, Any]:
    values = np.ascontiguousarray(logits.logits[:, 0], dtype="<f4")
    return {
        "dtype": "float32",
        "shape": list(values.shape),
        "data": base64.b64encode(values.tobytes()).decode("ascii"),
        "image_size": logits.geometry.image_size,
        "unpadded_size": logits.resize.unpadded_size.tolist(),
    }
