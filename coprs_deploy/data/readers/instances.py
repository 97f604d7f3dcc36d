"""Instance files of COCO: an index of images and annotations, with masks decoded on access.

The file is mapped, not loaded: of each annotation, the index keeps a few numbers and the position
of its segmentation, which is read when a mask is needed.
"""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from coprs_deploy.data.rle import decode_segmentation
from coprs_deploy.data.rows import FieldError
from coprs_deploy.errors import ArtifactError
from coprs_deploy.images import RgbArray

NO_CATEGORY = -1
"""Category of an annotation that names none."""

_EMPTY = 2
"""Bytes of ``[]``, the segmentation of an annotation without a mask."""


class ImageRecord(msgspec.Struct, gc=False):
    """An image of an instance file."""

    id: int
    file_name: str
    height: int
    width: int


class Category(msgspec.Struct, gc=False):
    """A category of an instance file."""

    id: int
    name: str


class _Annotation(msgspec.Struct, gc=False):
    id: int
    image_id: int
    segmentation: msgspec.Raw = msgspec.Raw(b"")
    category_id: int = NO_CATEGORY
    iscrowd: int = 0
    caption: str | None = None


class _Instances(msgspec.Struct):
    images: list[ImageRecord]
    annotations: list[_Annotation]
    categories: list[Category] = []


class InstanceFile:
    """Images and annotations of an instance file of COCO.

    Annotations have a position, from 0, in the order of the file.

    Attributes:
        path: the file.
        images: images by id.
        category_names: names of the categories by id.
        ids: (N,) int64 id of each annotation.
        image_ids: (N,) int64.
        category_ids: (N,) int64.
        is_crowd: (N,) bool, whether the annotation is a region of many objects.
        is_empty: (N,) bool, whether the segmentation is an empty list.
        captions: captions by position.
    """

    def __init__(self, path: Path) -> None:
        """Index a file.

        Raises:
            FileNotFoundError: the file does not exist.
            ArtifactError: the file is not an instance file, or an id is used twice.
        """
        self.path = path
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist")
        if not path.stat().st_size:
            raise ArtifactError(f"{path} is empty; download it again")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            self._index(data)
        order = np.argsort(self.ids, kind="stable")
        self._sorted_ids, self._order = self.ids[order], order
        if len(repeated := self._sorted_ids[1:][np.diff(self._sorted_ids) == 0]):
            raise ArtifactError(f"{path} has two annotations with the id {repeated[0]}")

    def _index(self, data: mmap.mmap) -> None:
        try:
            content = msgspec.json.decode(data, type=_Instances)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ArtifactError(
                f"{self.path} is not an instance file of COCO, or the download is incomplete: "
                f"{error}"
            ) from error
        annotations = content.annotations
        whole = np.frombuffer(data, np.uint8)
        base = whole.__array_interface__["data"][0]
        spans = [_span(annotation.segmentation, base) for annotation in annotations]
        del whole
        self._spans = np.array(spans, dtype=np.int64).reshape(-1, 2)
        self.images = {image.id: image for image in content.images}
        self.category_names = {category.id: category.name for category in content.categories}
        self.ids = _column(annotations, "id")
        self.image_ids = _column(annotations, "image_id")
        self.category_ids = _column(annotations, "category_id")
        self.is_crowd = _column(annotations, "iscrowd").astype(np.bool_)
        self.is_empty = self._spans[:, 1] - self._spans[:, 0] <= _EMPTY
        self.captions = {
            position: annotation.caption
            for position, annotation in enumerate(annotations)
            if annotation.caption is not None
        }

    def __len__(self) -> int:
        return len(self.ids)

    def num_same_class(self, positions: Sequence[int]) -> int | None:
        """Return the number of other objects of the categories of annotations in their image.

        Crowd annotations are no objects. None without annotations, or if they have no category.
        """
        categories = {int(self.category_ids[position]) for position in positions}
        if not positions or NO_CATEGORY in categories:
            return None
        image_id = int(self.image_ids[positions[0]])
        total = sum(self._num_objects[image_id, category] for category in categories)
        return total - sum(not self.is_crowd[position] for position in positions)

    @cached_property
    def _num_objects(self) -> Counter[tuple[int, int]]:
        """Number of objects by image and category."""
        is_object = ~self.is_crowd
        pairs = zip(
            self.image_ids[is_object].tolist(), self.category_ids[is_object].tolist(), strict=True
        )
        return Counter(pairs)

    def positions(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the position of each annotation id; -1 for an id that the file does not have."""
        if not len(self.ids):
            return np.full(len(ids), -1, dtype=np.int64)
        at = np.minimum(np.searchsorted(self._sorted_ids, ids), len(self.ids) - 1)
        return np.where(self._sorted_ids[at] == ids, self._order[at], -1)

    def has_segmentation(self, position: int) -> bool:
        """Whether an annotation has a segmentation, be it an empty one."""
        return bool(self._spans[position, 1])

    def segmentation(self, position: int) -> Any:
        """Read the segmentation of an annotation as JSON has it."""
        start, end = self._spans[position].tolist()
        try:
            with self.path.open("rb") as file:
                file.seek(start)
                return msgspec.json.decode(file.read(end - start))
        except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
            raise FieldError(
                "masks", f"{self.path} changed after it was opened, or cannot be read: {error}"
            ) from error

    def mask(self, position: int) -> NDArray[np.bool_]:
        """Decode the mask of an annotation: (H, W) bool, which may be empty.

        Raises:
            FieldError: the segmentation is invalid.
        """
        image = self.images[int(self.image_ids[position])]
        segmentation = self.segmentation(position)
        try:
            return decode_segmentation(segmentation, image.height, image.width)
        except ValueError as error:
            raise FieldError("masks", f"annotation {self.ids[position]}: {error}") from error


def check_size(record: ImageRecord, image: RgbArray, path: Path) -> None:
    """Refuse an image file whose size is not that of its record.

    Raises:
        FieldError: the sizes differ.
    """
    height, width = image.shape[:2]
    if (height, width) != (record.height, record.width):
        raise FieldError(
            "image",
            f"{path} is {width} x {height} and the annotations are for "
            f"{record.width} x {record.height} (width x height); use the original image",
        )


def stack_masks(masks: Sequence[NDArray[np.bool_]], size: tuple[int, ...]) -> NDArray[np.bool_]:
    """Stack the masks that are not empty to (N, H, W)."""
    filled = [mask for mask in masks if mask.any()]
    return np.stack(filled) if filled else np.zeros((0, *size), dtype=np.bool_)


def _span(segmentation: msgspec.Raw, base: int) -> tuple[int, int]:
    """Return the first and last byte of a segmentation in the mapped file; zeros without one."""
    if not memoryview(segmentation):
        return 0, 0
    view = np.frombuffer(segmentation, np.uint8)
    start = view.__array_interface__["data"][0] - base
    return start, start + len(view)


def _column(annotations: Sequence[_Annotation], name: str) -> NDArray[np.int64]:
    count = len(annotations)
    return np.fromiter((getattr(each, name) for each in annotations), np.int64, count=count)
