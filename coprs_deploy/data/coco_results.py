"""COCO results: one mask a result, as ``COCO.loadRes`` of pycocotools reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def coco_results(
    image_id: int | str,
    masks: Sequence[Mapping[str, Any]],
    boxes: Sequence[Sequence[int]],
    areas: Sequence[int],
    scores: Sequence[float],
    *,
    category_id: int = 1,
) -> list[dict[str, Any]]:
    """Return the results of the masks of an image.

    Args:
        image_id: id of the image in the COCO data set.
        masks: compressed RLE of each mask, ``size`` and ``counts``.
        boxes: x1, y1, x2, y2 in pixels, x2 and y2 exclusive.
        areas: areas in pixels.
        scores: confidences in [0, 1].
        category_id: category of all masks.

    Returns:
        One result per mask: ``image_id``, ``category_id``, ``segmentation``, ``bbox`` (x, y,
        width, height), ``area`` and ``score``.
    """
    return [
        {
            "image_id": image_id,
            "category_id": category_id,
            "segmentation": dict(mask),
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "area": area,
            "score": score,
        }
        for mask, (x1, y1, x2, y2), area, score in zip(masks, boxes, areas, scores, strict=True)
    ]
