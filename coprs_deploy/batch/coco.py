"""COCO results of a batch run: one file for all parts."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from coprs_deploy.artifacts import atomic_write
from coprs_deploy.batch.rows import OutputRow
from coprs_deploy.data.coco_results import coco_results


def write_coco(path: Path, rows: Iterable[OutputRow]) -> int:
    """Write the masks of rows as COCO results, as ``COCO.loadRes`` reads them.

    An image id that is a number without leading zeros is written as a number.

    Args:
        path: the file, which is replaced when it is complete.
        rows: rows, consumed one at a time.

    Returns:
        The number of masks.
    """
    count = 0
    with atomic_write(path) as partial, partial.open("w", encoding="utf-8") as file:
        for row in rows:
            masks = [mask.to_json() for mask in row.masks]
            image = image_id(row.image_id)
            for result in coco_results(image, masks, row.boxes, row.areas, row.scores):
                file.write(("[\n" if not count else ",\n") + json.dumps(result))
                count += 1
        file.write("\n]\n" if count else "[]\n")
    return count


def image_id(text: str) -> int | str:
    """Return the id of an image as COCO has it."""
    return int(text) if text.isdecimal() and str(int(text)) == text else text
