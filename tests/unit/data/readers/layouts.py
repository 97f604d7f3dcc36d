"""Miniature data sets in the layouts of the public ones, with masks computed a second way.

Masks are painted with slices of an array, never decoded from the annotations that are written.
"""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco

HEIGHT, WIDTH = 24, 32


def rectangle(x0, y0, x1, y1):
    """Return the polygon of the pixels x0..x1-1, y0..y1-1."""
    return [x0, y0, x1, y0, x1, y1, x0, y1]


def painted(*boxes, height=HEIGHT, width=WIDTH):
    """Return the union of boxes (x0, y0, x1, y1) as a mask, clipped to the image."""
    mask = np.zeros((height, width), dtype=bool)
    for x0, y0, x1, y1 in boxes:
        mask[max(y0, 0) : max(y1, 0), max(x0, 0) : max(x1, 0)] = True
    return mask


def run_lengths(mask):
    """Return the uncompressed counts of an RLE, one pixel after the other."""
    counts, value = [0], False
    for pixel in mask.T.ravel().tolist():
        if pixel != value:
            counts.append(0)
            value = pixel
        counts[-1] += 1
    return counts


def compressed(mask):
    encoded = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(mask.shape), "counts": encoded["counts"].decode()}


def uncompressed(mask):
    return {"size": list(mask.shape), "counts": run_lengths(mask)}


BOXES = {
    "polygon": [(4, 3, 12, 9)],
    "overlapping polygons": [(2, 2, 14, 10), (8, 5, 20, 18)],
    "polygon that leaves the image": [(-6, 12, 9, 40)],
    "list of RLE": [(0, 0, 5, 5), (3, 3, 9, 7)],
    "uncompressed RLE": [(20, 4, 31, 20)],
    "compressed RLE": [(10, 10, 32, 24)],
    "empty list": [],
}
"""Form of a segmentation to the boxes that it covers."""


def segmentation(form):
    boxes = BOXES[form]
    if "polygon" in form:
        return [rectangle(*box) for box in boxes]
    if form == "list of RLE":
        return [compressed(painted(boxes[0])), uncompressed(painted(boxes[1]))]
    if form == "uncompressed RLE":
        return uncompressed(painted(*boxes))
    return compressed(painted(*boxes)) if form == "compressed RLE" else []


def write_image(path, seed, size=(HEIGHT, WIDTH)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, quality=95)


def coco_name(image_id):
    return f"COCO_train2014_{image_id:012d}.jpg"


@dataclass
class Refer:
    """A data set in the layout of REFER that is being assembled."""

    root: Path
    dataset: str = "refcoco"
    image_folder: str = "images/mscoco/images/train2014"
    images: dict = field(default_factory=dict)
    annotations: list = field(default_factory=list)
    refs: list = field(default_factory=list)

    def annotate(self, image_id, form, *, is_crowd=False):
        """Add an annotation, and its image if it is new; return the annotation's id."""
        if image_id not in self.images:
            self.images[image_id] = {
                "id": image_id,
                "file_name": coco_name(image_id),
                "height": HEIGHT,
                "width": WIDTH,
                "license": 3,
            }
            write_image(self.root / self.image_folder / coco_name(image_id), image_id)
        ann_id = 100 + 7 * len(self.annotations)
        self.annotations.append(
            {
                "id": ann_id,
                "image_id": image_id,
                "category_id": 1,
                "iscrowd": int(is_crowd),
                "bbox": [0, 0, 1, 1],
                "area": 1.0,
                "segmentation": segmentation(form),
            }
        )
        return ann_id

    def refer(self, image_id, ann_id, split, *sentences):
        """Add a reference with its sentences."""
        first = sum(len(ref["sentences"]) for ref in self.refs)
        self.refs.append(
            {
                "ref_id": len(self.refs) + 1,
                "ann_id": ann_id,
                "image_id": image_id,
                "category_id": 1,
                "split": split,
                # The trap of REFER: the name of a reference is not the name of its image.
                "file_name": coco_name(image_id).replace(".jpg", f"_{len(self.refs)}.jpg"),
                "sent_ids": list(range(first, first + len(sentences))),
                "sentences": [
                    {"sent_id": first + i, "sent": text, "raw": text, "tokens": text.split()}
                    for i, text in enumerate(sentences)
                ],
            }
        )

    def write(self, split_by="unc", suffix=".p"):
        """Write the files; return the root."""
        folder = self.root / self.dataset
        folder.mkdir(parents=True, exist_ok=True)
        stem = "grefs" if self.dataset == "grefcoco" else "refs"
        path = folder / f"{stem}({split_by}){suffix}"
        if suffix == ".json":
            path.write_text(json.dumps(self.refs))
        else:
            path.write_bytes(pickle.dumps(self.refs, protocol=0))
        instances = {
            "info": {},
            "images": list(self.images.values()),
            "annotations": self.annotations,
            "categories": [{"id": 1, "name": "cup", "supercategory": "kitchen"}],
        }
        (folder / "instances.json").write_text(json.dumps(instances))
        return self.root
