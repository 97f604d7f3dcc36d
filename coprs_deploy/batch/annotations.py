"""Rows of a batch run as annotations: supervision, FiftyOne, and pre-annotations of Label Studio.

Rows on one image that follow each other become one entry, with the instruction as label of each
mask. A row with an error and an empty mask have no annotation; an image of which every row failed
is left out. The files are written without the packages that read them.
"""

from __future__ import annotations

import base64
import io
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

import numpy as np
from numpy.typing import NDArray

from coprs_deploy.artifacts import atomic_write, make_directory, write_text
from coprs_deploy.batch.brush_rle import encode_brush
from coprs_deploy.batch.files import is_url
from coprs_deploy.batch.rows import OutputRow
from coprs_deploy.data.detections import detections
from coprs_deploy.data.rle import decode_mask

if TYPE_CHECKING:
    import supervision as sv

SAMPLES_FILE = "samples.json"

LOCAL_FILES = "/data/local-files/?d="
"""How Label Studio refers to a file below its LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT."""


def to_supervision(rows: OutputRow | Sequence[OutputRow]) -> sv.Detections:
    """Return the masks of one image as ``supervision.Detections``.

    Args:
        rows: a row, or rows on one image; ``class_id`` counts their instructions from 0, and
            ``data["class_name"]`` has the instruction.

    Raises:
        MissingDependencyError: supervision is not installed.
        ValueError: the rows are on several images.
    """
    rows = [rows] if isinstance(rows, OutputRow) else rows
    if len(images := sorted({row.image for row in rows})) > 1:
        raise ValueError(f"the rows are on {len(images)} images ({images[0]}, ...); accepted: one")
    found = [row for row in rows if row.masks]
    masks = [mask for row in found for mask in _decoded_masks(row)]
    return detections(
        np.array(masks, np.bool_) if masks else np.zeros((0, *_size_of(rows)), np.bool_),
        np.array([box for row in found for box in row.boxes], np.int64),
        np.array([score for row in found for score in row.scores], np.float64),
        [row.instruction for row in found for _ in row.masks],
        list(dict.fromkeys(row.instruction for row in rows)),
    )


def _size_of(rows: Sequence[OutputRow]) -> list[int]:
    """Return height and width of the image of rows; 0 if none of them has a result."""
    return next((row.image_size for row in rows if row.image_size), [0, 0])


def write_fiftyone(directory: Path, rows: Iterable[OutputRow], image_root: str = "") -> int:
    """Write rows as a FiftyOne dataset, one sample an image, without copying the images.

    ``fiftyone.Dataset.from_dir(DIR, fiftyone.types.FiftyOneDataset)`` reads it: the field
    ``predictions`` has a ``Detection`` with a mask for each target, labeled with the instruction.

    Args:
        directory: folder of ``samples.json``, which is replaced when it is complete.
        rows: rows, consumed one image at a time.
        image_root: what precedes the name of each image; relative to ``directory`` if it is not
            absolute.

    Returns:
        The number of samples.
    """
    make_directory(directory)
    count = 0
    with _json_list(directory / SAMPLES_FILE, '{"samples": ', "}") as write:
        for image, done in _images(rows):
            height, width = done[0].image_size
            detections = [each for row in done for each in _detections(row)]
            metadata = {"_cls": "ImageMetadata", "width": width, "height": height}
            predictions = {"_cls": "Detections", "detections": detections}
            path = _image_reference(image_root, image)
            sample = {"filepath": path, "tags": [], "metadata": metadata}
            write({**sample, "predictions": predictions})
            count += 1
    return count


def write_label_studio(path: Path, rows: Iterable[OutputRow], image_root: str = LOCAL_FILES) -> int:
    """Write rows as tasks of Label Studio with predictions, and the labeling setup beside them.

    A task has the image, the reasoning of its rows, and a brush region for each target, labeled
    with the instruction. The setup, ``NAME.xml`` for ``NAME.json``, names all instructions.

    Args:
        path: JSON file, which is replaced when it is complete.
        rows: rows, consumed one image at a time.
        image_root: what precedes the name of each image, such as a URL.

    Returns:
        The number of tasks.
    """
    count = 0
    labels: dict[str, None] = {}
    with _json_list(path) as write:
        for image, done in _images(rows):
            labels |= dict.fromkeys(row.instruction for row in done)
            reference = _image_reference(image_root, image)
            reasoning = "\n".join(f"{row.instruction}: {row.reasoning}" for row in done)
            regions = [each for row in done for each in _regions(row)]
            prediction = {
                "model_version": f"coprs-deploy {done[0].version}, {done[0].bundle[:12]}",
                "result": regions,
            }
            if regions:
                prediction["score"] = min(region["score"] for region in regions)
            data = {"image": reference, "reasoning": reasoning}
            write({"data": data, "predictions": [prediction]})
            count += 1
    write_text(path.with_suffix(".xml"), labeling_setup(list(labels)))
    return count


def labeling_setup(labels: Sequence[str]) -> str:
    """Return the labeling interface of Label Studio for the tasks that are written."""
    lines = [f"    <Label value={quoteattr(label)}/>" for label in labels]
    return "\n".join(
        [
            "<View>",
            '  <Image name="image" value="$image" zoom="true"/>',
            '  <BrushLabels name="label" toName="image">',
            *lines,
            "  </BrushLabels>",
            '  <Text name="reasoning" value="$reasoning"/>',
            "</View>",
            "",
        ]
    )


def _images(rows: Iterable[OutputRow]) -> Iterator[tuple[str, list[OutputRow]]]:
    """Yield the rows without an error by image, in the order of the rows."""
    for image, group in groupby(rows, key=lambda row: row.image):
        if done := [row for row in group if not row.error]:
            yield image, done


def _decoded_masks(row: OutputRow) -> Iterator[NDArray[np.bool_]]:
    return (decode_mask(mask, *row.image_size) for mask in row.masks)


def _detections(row: OutputRow) -> Iterator[dict[str, Any]]:
    height, width = row.image_size
    for mask, (x1, y1, x2, y2), score in zip(
        _decoded_masks(row), row.boxes, row.scores, strict=True
    ):
        if x2 > x1 and y2 > y1:
            yield {
                "_cls": "Detection",
                "label": row.instruction,
                "bounding_box": [x1 / width, y1 / height, (x2 - x1) / width, (y2 - y1) / height],
                "confidence": score,
                "mask": _pack_array(mask[y1:y2, x1:x2]),
                "reasoning": row.reasoning,
            }


def _regions(row: OutputRow) -> Iterator[dict[str, Any]]:
    height, width = row.image_size
    for number, (mask, score) in enumerate(zip(_decoded_masks(row), row.scores, strict=True)):
        if mask.any():
            yield {
                "id": f"{row.row}-{number}",
                "type": "brushlabels",
                "from_name": "label",
                "to_name": "image",
                "original_width": width,
                "original_height": height,
                "image_rotation": 0,
                "score": score,
                "value": {
                    "format": "rle",
                    "rle": encode_brush(mask),
                    "brushlabels": [row.instruction],
                },
            }


def _pack_array(array: NDArray[np.bool_]) -> str:
    """Return an array as FiftyOne stores it: zlib of ``numpy.save``, in base64."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return base64.b64encode(zlib.compress(file.getvalue())).decode("ascii")


def _image_reference(root: str, image: str) -> str:
    """Return path or URL of an image; in a URL, its name is quoted."""
    if not root or is_url(image) or image.startswith("/"):
        return image
    if root == LOCAL_FILES or is_url(root):
        return root + quote(image) if root.endswith(("/", "=")) else f"{root}/{quote(image)}"
    return str(Path(root) / image)


@contextmanager
def _json_list(path: Path, start: str = "", end: str = "") -> Iterator[Any]:
    """Yield a function that writes an item of a list in a JSON file, one a line."""
    with atomic_write(path) as partial, partial.open("w", encoding="utf-8") as file:
        file.write(f"{start}[")
        separator = "\n"

        def write(item: dict[str, Any]) -> None:
            nonlocal separator
            file.write(separator + json.dumps(item))
            separator = ",\n"

        yield write
        file.write(f"\n]{end}\n")
