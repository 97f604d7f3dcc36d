"""COCO segmentations of masks: run-length encoding (RLE) and polygons.

RLE counts runs of zeros and ones that alternate in column-major order. Uncompressed, the counts are
a list of lengths; compressed (the format of pycocotools), each length is stored as the difference
to the run two before it, five bits per character.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coprs_deploy.specs import Record

_FIRST_CHARACTER = 48
_MAX_CHARACTERS = 7
"""Characters of one number: 35 bits hold any run of an accepted image."""

_MIN_NUMBERS = 6
"""Numbers of a polygon: x and y of three points."""

_FORMS = 'accepted: RLE {"size": [height, width], "counts": ...} or polygons [[x1, y1, ...], ...]'


class Rle(Record, frozen=True):
    """Compressed run-length encoding of a mask.

    Attributes:
        size: height and width in pixels.
        counts: compressed run lengths in the format of pycocotools.
    """

    size: tuple[int, int]
    counts: str


def encode_mask(mask: NDArray[np.bool_]) -> Rle:
    """Encode a mask of shape (H, W).

    pycocotools only compresses the runs: its ``encode`` holds the interpreter for all pixels, and
    takes ten times as long on a mask with few runs.
    """
    from pycocotools import mask as coco

    height, width = mask.shape
    rows, columns = np.divmod(np.flatnonzero(mask[1:] != mask[:-1]), width)
    seams = np.flatnonzero(mask[0, 1:] != mask[-1, :-1])  # from one column to the next
    changes = np.concatenate((columns * height + rows + 1, (seams + 1) * height))
    changes.sort()
    runs = np.diff(changes, prepend=0, append=height * width).tolist()
    counts = [0, *runs] if mask[0, 0] else runs
    encoded = coco.frPyObjects({"size": [height, width], "counts": counts}, height, width)
    return Rle((height, width), encoded["counts"].decode("ascii"))


def decode_mask(segmentation: object, height: int, width: int) -> NDArray[np.bool_]:
    """Decode the COCO segmentation of one target.

    Args:
        segmentation: RLE as :class:`Rle` or a mapping with its two keys, where ``counts`` is
            compressed (text or bytes) or a list of run lengths; or a list of polygons
            ``[x1, y1, x2, y2, ...]`` in pixels, which together are the target.
        height: height of the image in pixels.
        width: width of the image in pixels.

    Returns:
        (height, width) bool.

    Raises:
        ValueError: the form is not accepted, the size is not that of the image, the runs do not
            fill the size, or a polygon has fewer than three points or lies far outside.
    """
    if isinstance(segmentation, Rle):
        segmentation = segmentation.to_json()
    if isinstance(segmentation, list):
        return _decode_polygons(segmentation, height, width)
    if not isinstance(segmentation, Mapping) or not {"size", "counts"} <= set(segmentation):
        found = json_type(segmentation)
        if isinstance(segmentation, Mapping):
            found += f" with the keys {', '.join(map(str, segmentation)) or '(none)'}"
        raise ValueError(f"it is {found}; {_FORMS}")
    size, counts = segmentation["size"], segmentation["counts"]
    if not isinstance(size, (list, tuple)) or [*map(type, size)] != [int, int]:
        raise ValueError(f"size is {_shortened(size)}; accepted: [height, width], two integers")
    if tuple(size) != (height, width):
        raise ValueError(
            f"size is {_shortened(size)}, but the image is [{height}, {width}] (height, width)"
        )
    runs = counts if isinstance(counts, list) else _decompress(counts)
    if others := [run for run in runs if type(run) is not int]:
        raise ValueError(f"counts has {json_type(others[0])} in its list; accepted: integers")
    if min(runs, default=0) < 0 or sum(runs) != height * width:
        raise ValueError(
            f"the runs add up to {sum(runs)} pixels and the size to {height * width}; the counts "
            "are corrupt or belong to another mask"
        )
    # pycocotools is not used: with counts that are too short, its result is uninitialized in part.
    is_set = np.arange(len(runs)) % 2 == 1
    return np.repeat(is_set, runs).reshape(width, height).T


def decode_segmentation(segmentation: object, height: int, width: int) -> NDArray[np.bool_]:
    """Decode the segmentation of an annotation as public data sets have it.

    More is accepted than by :func:`decode_mask`: a list of RLE, an empty list (an empty mask), and
    polygons of fewer than three points, which cover nothing. Parts that overlap are merged.

    Args:
        segmentation: RLE, a list of RLE, or a list of polygons in pixels.
        height: height of the image in pixels.
        width: width of the image in pixels.

    Returns:
        (height, width) bool, which may be empty.

    Raises:
        ValueError: the form is not accepted, an RLE does not fit the image, or a polygon lies far
            outside of it.
    """
    if not isinstance(segmentation, list):
        return decode_mask(segmentation, height, width)
    merged = np.zeros((height, width), dtype=np.bool_)
    polygons = []
    for part in segmentation:
        if isinstance(part, list):
            polygons += [part] if len(part) >= _MIN_NUMBERS else []
        else:
            merged |= decode_mask(part, height, width)
    if polygons:
        merged |= _merge_polygons(polygons, height, width)
    return merged


def json_type(value: object) -> str:
    """Name the type of a value as JSON does, for error messages."""
    names = {str: "text", dict: "an object", list: "a list", type(None): "null", int: "an integer"}
    names |= {float: "a number", bool: "true or false", bytes: "bytes"}
    return names.get(type(value), f"a {type(value).__name__}")


def _decompress(counts: object) -> list[int]:
    if isinstance(counts, bytes):
        counts = counts.decode("latin-1")
    if not isinstance(counts, str):
        raise ValueError(f"counts is {json_type(counts)}; accepted: text, bytes or integers")
    if counts.startswith(("b'", 'b"')):
        raise ValueError("counts is the repr of Python bytes; write counts.decode() instead")
    runs: list[int] = []
    value = num_characters = 0
    for character in counts:
        bits = ord(character) - _FIRST_CHARACTER
        if not 0 <= bits < 64 or num_characters == _MAX_CHARACTERS:
            raise ValueError(f"the counts have {character!r} at an invalid position")
        value |= (bits & 31) << (5 * num_characters)
        num_characters += 1
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << (5 * num_characters)
        # The first three runs are absolute.
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value = num_characters = 0
    if num_characters:
        raise ValueError("the counts end in the middle of a run length")
    return runs


def _decode_polygons(polygons: list[Any], height: int, width: int) -> NDArray[np.bool_]:
    if not polygons:
        raise ValueError(f"it is an empty list; {_FORMS}")
    mask = _merge_polygons(polygons, height, width)
    if not mask.any():
        raise ValueError("its polygons cover no pixel; coordinates are pixels, not shares")
    return mask


def _merge_polygons(polygons: list[Any], height: int, width: int) -> NDArray[np.bool_]:
    from pycocotools import mask as coco

    for number, polygon in enumerate(polygons, start=1):
        if not isinstance(polygon, list):
            raise ValueError(f"polygon {number} is {json_type(polygon)}; {_FORMS}")
        if len(polygon) < _MIN_NUMBERS or len(polygon) % 2:
            raise ValueError(
                f"polygon {number} has {len(polygon)} numbers; accepted: x and y of at least three "
                "points"
            )
        for index, value in enumerate(polygon):
            side = (width, height)[index % 2]
            if type(value) not in (int, float) or not -side <= value <= 2 * side:
                raise ValueError(
                    f"polygon {number} has the {'xy'[index % 2]} {_shortened(value)} in an image "
                    f"of {width} x {height} pixels (width x height); coordinates are pixels"
                )
    return decode_mask(coco.merge(coco.frPyObjects(polygons, height, width)), height, width)


def _shortened(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
