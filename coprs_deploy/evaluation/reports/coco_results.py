"""Predictions of an evaluation as COCO results, which ``pycocotools`` reads.

Each instruction is an image of its own, because COCO has no instructions: ``images.coco.json`` says
which. ``COCO("images.coco.json").loadRes("predictions.coco.json")`` opens both.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coprs_deploy.artifacts import write_text
from coprs_deploy.evaluation.rows import EvaluationRow

RESULTS_FILE = "predictions.coco.json"
IMAGES_FILE = "images.coco.json"
CATEGORY = {"id": 1, "name": "target"}


def write_coco_results(folder: Path, rows: Sequence[EvaluationRow]) -> None:
    """Write the predicted masks, and the list of images, one entry a line.

    A row whose image could not be decoded has no size, and is left out of both.
    """
    known = [row for row in rows if row.image_size is not None]
    results = [result for row in known for result in row_results(row)]
    _write(folder / RESULTS_FILE, "[\n", results, "\n]\n")
    head = json.dumps({"categories": [CATEGORY], "annotations": []})[:-1]
    _write(folder / IMAGES_FILE, f'{head}, "images": [\n', map(_image, known), "\n]}\n")


def row_results(row: EvaluationRow) -> list[dict[str, Any]]:
    """Return the COCO results of a row: one for each mask; a mask without a score has 1."""
    scores = row.scores or (1.0,) * len(row.masks)
    return [
        {
            "image_id": row.index,
            "category_id": CATEGORY["id"],
            "segmentation": mask.to_json(),
            "score": score,
        }
        for mask, score in zip(row.masks, scores, strict=True)
    ]


def _image(row: EvaluationRow) -> dict[str, Any]:
    assert row.image_size is not None, "rows without a size were left out"
    height, width = row.image_size
    names = {"id": row.index, "file_name": row.image or row.id, "example": row.id}
    return {**names, "instruction": row.instruction, "height": height, "width": width}


def _write(path: Path, head: str, entries: Any, tail: str) -> None:
    lines = (json.dumps(entry, ensure_ascii=False) for entry in entries)
    write_text(path, head + ",\n".join(lines) + tail)
