"""Examples written in the layouts of public data sets, which the readers and public code read.

    refer       ROOT/refcoco/refs(unc).p, instances.json; ROOT/images/mscoco/images/train2014/
    grefcoco    ROOT/grefcoco/grefs(unc).json, instances.json; images as above
    reasonseg   ROOT/ReasonSeg/SPLIT/<stem>.jpg, <stem>.json
    parquet     ROOT/data/test-00000-of-00001.parquet, as the evaluation files of Seg-Zero

Nothing is lost of images and masks: the files named .jpg hold PNG, which Pillow and OpenCV
recognize by its first bytes; masks are RLE, polygons that cover exactly their pixels, or rows of
booleans. All layouts but ``grefcoco`` have one mask a sentence: several targets are merged. Ids,
question types and responses are not written.
"""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from coprs_deploy.artifacts import new_directory
from coprs_deploy.data.examples import Example
from coprs_deploy.data.polygon_tracing import trace_mask
from coprs_deploy.data.readers.refer import IMAGE_FOLDERS, NO_TARGET
from coprs_deploy.data.rle import encode_mask
from coprs_deploy.data.rows import import_pyarrow
from coprs_deploy.images import RgbArray

_CATEGORY = {"id": 1, "name": "object", "supercategory": "object"}

_PICKLE_PROTOCOL = 2
"""That of the public files, which were written with Python 2."""

_ROWS_PER_GROUP = 16

_MARKER = "replaceable data set"
"""No such file exists: nothing is replaced."""


def write_layout(out: Path, layout: str, examples: Iterable[Example], split: str) -> str:
    """Write examples in the layout of a public data set.

    Args:
        out: folder that becomes the root of the data set; it must not exist, or be empty.
        layout: a key of ``LAYOUTS``.
        examples: the examples, consumed one at a time.
        split: name of the split; ``parquet`` always has the split ``test``.

    Returns:
        The source to open: ``refcoco:val`` below the root ``out``, or the folder itself.

    Raises:
        ValueError: the layout is unknown, or an example has an ignore mask.
        ArtifactError: ``out`` exists.
        MissingDependencyError: the layout is ``parquet`` and pyarrow is not installed.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}; accepted: {', '.join(LAYOUTS)}")
    write, source = LAYOUTS[layout]
    with new_directory(out, _MARKER) as root:
        write(root, _checked(examples), split)
    return source.format(out=out, split=split)


def _checked(examples: Iterable[Example]) -> Iterator[Example]:
    for example in examples:
        if example.ignore_mask is not None:
            raise ValueError(f"{example.id} has an ignore mask, which these layouts do not keep")
        yield example


class _Instances:
    """An instance file that grows, and the images that belong to it."""

    def __init__(self, root: Path) -> None:
        self._folder = root / IMAGE_FOLDERS[0]
        self._folder.mkdir(parents=True)
        self._images: list[dict[str, Any]] = []
        self._annotations: list[dict[str, Any]] = []

    def add_image(self, image: RgbArray) -> tuple[int, str]:
        """Write an image; return its id and its name."""
        image_id = len(self._images) + 1
        name = f"COCO_train2014_{image_id:012d}.jpg"
        (self._folder / name).write_bytes(_png(image))
        height, width = image.shape[:2]
        record = {"id": image_id, "file_name": name, "height": height, "width": width}
        self._images.append(record)
        return image_id, name

    def add_annotation(self, image_id: int, mask: NDArray[np.bool_]) -> int:
        """Add a mask, which may be empty; return the id of its annotation."""
        annotation_id = len(self._annotations) + 1
        box, segmentation = [0, 0, 0, 0], list[dict[str, Any]]()
        if mask.any():
            rows, columns = (np.flatnonzero(mask.any(axis)).tolist() for axis in (1, 0))
            box = [columns[0], rows[0], columns[-1] + 1 - columns[0], rows[-1] + 1 - rows[0]]
            segmentation = [encode_mask(mask).to_json()]
        self._annotations.append(
            {
                "id": annotation_id,
                "image_id": image_id,
                "category_id": _CATEGORY["id"],
                "iscrowd": 0,
                "area": int(mask.sum()),
                "bbox": box,
                "segmentation": segmentation,
            }
        )
        return annotation_id

    def write(self, path: Path) -> None:
        """Write the instance file."""
        content = {
            "info": {"description": "synthetic scenes"},
            "licenses": [],
            "images": self._images,
            "annotations": self._annotations,
            "categories": [_CATEGORY],
        }
        path.write_text(json.dumps(content), encoding="utf-8")


def _reference(
    number: int, image_id: int, file_name: str, text: str, split: str, **annotations: Any
) -> dict[str, Any]:
    """Return a reference of one sentence."""
    sentence = {"sent_id": number, "sent": text, "raw": text, "tokens": text.split()}
    return {
        "ref_id": number,
        "image_id": image_id,
        "file_name": file_name,
        "split": split,
        "sent_ids": [number],
        "sentences": [sentence],
        **annotations,
    }


def _write_refer(root: Path, examples: Iterator[Example], split: str) -> None:
    instances, references = _Instances(root), []
    for number, example in enumerate(examples):
        image_id, name = instances.add_image(example.image)
        annotation = instances.add_annotation(image_id, _merged(example))
        owned = {"ann_id": annotation, "category_id": _CATEGORY["id"]}
        name = name.replace(".jpg", f"_{number}.jpg")  # in REFER it is not the name of the image
        references.append(_reference(number, image_id, name, example.instruction, split, **owned))
    folder = root / "refcoco"
    folder.mkdir()
    content = pickle.dumps(references, protocol=_PICKLE_PROTOCOL)
    (folder / "refs(unc).p").write_bytes(content)
    instances.write(folder / "instances.json")


def _write_grefcoco(root: Path, examples: Iterator[Example], split: str) -> None:
    instances, references = _Instances(root), []
    for number, example in enumerate(examples):
        image_id, name = instances.add_image(example.image)
        ids = [instances.add_annotation(image_id, mask) for mask in example.masks]
        categories = [_CATEGORY["id"]] * len(ids)
        owned = {
            "ann_id": ids or [NO_TARGET],
            "category_id": categories or [NO_TARGET],
            "no_target": not ids,
        }
        references.append(_reference(number, image_id, name, example.instruction, split, **owned))
    folder = root / "grefcoco"
    folder.mkdir()
    (folder / "grefs(unc).json").write_text(json.dumps(references), encoding="utf-8")
    instances.write(folder / "instances.json")


def _write_reasonseg(root: Path, examples: Iterator[Example], split: str) -> None:
    folder = root / "ReasonSeg" / split
    folder.mkdir(parents=True)
    for number, example in enumerate(examples):
        stem = f"{number:012d}"
        (folder / f"{stem}.jpg").write_bytes(_png(example.image))
        polygons = trace_mask(_merged(example))
        shapes = [_shape(polygon) for polygon in polygons]
        annotation = {"text": [example.instruction], "is_sentence": False, "shapes": shapes}
        (folder / f"{stem}.json").write_text(json.dumps(annotation), encoding="utf-8")


def _shape(polygon: Sequence[tuple[int, int]]) -> dict[str, Any]:
    return {
        "label": "target",
        "labels": ["target"],
        "shape_type": "polygon",
        "image_name": "",
        "points": polygon,
        "group_id": None,
        "group_ids": [None],
        "flags": {},
    }


def _write_parquet(root: Path, examples: Iterator[Example], split: str) -> None:
    pyarrow = import_pyarrow()
    text, size = pyarrow.string(), pyarrow.int64()
    schema = pyarrow.schema(
        {
            "image": pyarrow.struct([("bytes", pyarrow.binary()), ("path", text)]),
            "mask": pyarrow.list_(pyarrow.list_(pyarrow.bool_())),
            "text": text,
            "image_id": text,
            "ann_id": text,
            "img_height": size,
            "img_width": size,
        }
    )
    folder = root / "data"
    folder.mkdir()
    rows: list[dict[str, Any]] = []
    with pyarrow.parquet.ParquetWriter(folder / "test-00000-of-00001.parquet", schema) as file:

        def flush() -> None:
            file.write_table(pyarrow.Table.from_pylist(rows, schema=schema))
            rows.clear()

        for number, example in enumerate(examples):
            height, width = example.image.shape[:2]
            row = {
                "image": {"bytes": _png(example.image), "path": f"{number:012d}.png"},
                "mask": _merged(example).tolist(),
                "text": example.instruction,
                "image_id": f"{number:012d}",
                "ann_id": str(number),
                "img_height": height,
                "img_width": width,
            }
            rows.append(row)
            if len(rows) == _ROWS_PER_GROUP:
                flush()
        if rows:
            flush()


def _merged(example: Example) -> NDArray[np.bool_]:
    """Merge the targets into one mask (H, W), which is empty for a no-match example."""
    merged: NDArray[np.bool_] = np.any(example.masks, axis=0)
    return merged


def _png(image: RgbArray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG", compress_level=3)
    return file.getvalue()


Write = Callable[[Path, Iterator[Example], str], None]

LAYOUTS: dict[str, tuple[Write, str]] = {
    "refer": (_write_refer, "refcoco:{split}"),
    "grefcoco": (_write_grefcoco, "grefcoco:{split}"),
    "reasonseg": (_write_reasonseg, "reasonseg:{split}"),
    "parquet": (_write_parquet, "{out}"),
}
"""Layout to the function that writes it, and the source to open."""
