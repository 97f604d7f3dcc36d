"""COCO run-length encoding (RLE) of masks.

Runs of zeros and ones alternate in column-major order; each length is stored as the difference to
the run two before it, five bits per character (the compressed format of pycocotools).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from coprs_deploy.specs import Record

_FIRST_CHARACTER = 48
_MAX_CHARACTERS = 7
"""Characters of one number: 35 bits hold any run of an accepted image."""


class Rle(Record, frozen=True):
    """Run-length encoding of a mask.

    Attributes:
        size: height and width in pixels.
        counts: compressed run lengths in the format of pycocotools.
    """

    size: tuple[int, int]
    counts: str


def encode_mask(mask: NDArray[np.bool_]) -> Rle:
    """Encode a mask of shape (H, W)."""
    from pycocotools import mask as coco

    encoded = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    return Rle((mask.shape[0], mask.shape[1]), encoded["counts"].decode("ascii"))


def decode_mask(encoded: Rle) -> NDArray[np.bool_]:
    """Decode a mask.

    pycocotools is not used: with counts that are too short, its result is partly uninitialized.

    Returns:
        (H, W) bool.

    Raises:
        ValueError: the size is empty, a character is invalid, or the runs do not fill the size.
    """
    height, width = encoded.size
    if height < 1 or width < 1:
        raise ValueError(f"size is {height} x {width}; it needs at least one pixel")
    runs = _runs(encoded.counts)
    if min(runs, default=0) < 0 or sum(runs) != height * width:
        raise ValueError(
            f"the runs add up to {sum(runs)} pixels and the size to {height * width}; the counts "
            "are corrupt or belong to another mask"
        )
    is_set = np.arange(len(runs)) % 2 == 1
    return np.repeat(is_set, runs).reshape(width, height).T


def _runs(counts: str) -> list[int]:
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
