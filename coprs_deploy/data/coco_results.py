"""COCO results: one mask a result, as ``COCO.loadRes`` of pycocotools reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def coco_result(
    image_id: int | str,
    segmentation: Mapping[str, Any],
    box: Sequence[int],
    area: int,
    score: float,
    *,
    category_id: int = 1,
) -> dict[str, Any]:
    """Return the result of one mask.

    Args:
        image_id: id of the image in the COCO data set.
        segmentation: compressed RLE of the mask, ``size`` and ``counts``.
        box: x1, y1, x2, y2 in pixels, x2 and y2 exclusive.
        area: area in pixels.
        score: confidence in [0, 1].
        category_id: category of the mask.

    Returns:
        ``image_id``, ``category_id``, ``segmentation``, ``bbox`` (x, y, width, height), ``area``
        and ``score``.
    """
    x1, y1, x2, y2 = box
    return {
        "image_id": image_id,
        "category_id": category_id,
        "segmentation": dict(segmentation),
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "area": area,
        "score": score,
    }
