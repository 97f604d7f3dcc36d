"""COCO run lengths: the compact text form of a mask.

Runs of zeros and ones alternate, column after column; each is written as its difference to the run
two before it, five bits a letter (the format of pycocotools).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from coprs_deploy.specs import Record

_FIRST_LETTER = 48
_MOST_LETTERS = 7
"""Letters of one number: 35 bits hold any run of a picture that may be decoded."""


class Rle(Record, frozen=True):
    """An encoded mask.

    Attributes:
        size: height and width in pixels.
        counts: the run lengths, as pycocotools writes them.
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

    pycocotools is not asked: counts that are too short leave part of its result uninitialized.

    Returns:
        (H, W) bool.

    Raises:
        ValueError: the size has no pixels, a letter is wrong, or the runs do not fill the size.
    """
    height, width = encoded.size
    if height < 1 or width < 1:
        raise ValueError(f"its size is {height} x {width}; it needs at least one pixel")
    runs = _runs(encoded.counts)
    if min(runs, default=0) < 0 or sum(runs) != height * width:
        raise ValueError(
            f"its runs add up to {sum(runs)} pixels, its size to {height * width}: the counts are "
            "broken or belong to another mask"
        )
    is_set = np.arange(len(runs)) % 2 == 1
    return np.repeat(is_set, runs).reshape(width, height).T


def _runs(counts: str) -> list[int]:
    runs: list[int] = []
    value = num_letters = 0
    for letter in counts:
        bits = ord(letter) - _FIRST_LETTER
        if not 0 <= bits < 64 or num_letters == _MOST_LETTERS:
            raise ValueError(f"its counts hold {letter!r} where no run length can have it")
        value |= (bits & 31) << (5 * num_letters)
        num_letters += 1
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << (5 * num_letters)
        # The first three runs stand as they are, by the format.
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value = num_letters = 0
    if num_letters:
        raise ValueError("its counts end in the middle of a run length")
    return runs
