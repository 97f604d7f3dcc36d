"""Masks in the run-length encoding of Label Studio's brush regions.

The format is that of the JavaScript package ``@thi.ng/rle-pack`` 2.x. A stream of bits starts with
the number of values (32 bits), their width in bits less one (5 bits), and the widths of four
kinds of run lengths, each less one (4 bits each). Each run then has a bit, 1 for one repeated
value, the kind of its length (2 bits), its length less one, and the value. The values are the four
channels of all pixels, row by row; a channel is 255 in the mask and 0 elsewhere.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LENGTH_BITS = (3, 4, 8, 16)
"""Widths of the four kinds of run lengths."""

VALUE_BITS = 8
CHANNELS = 4


def encode_brush(mask: NDArray[np.bool_]) -> list[int]:
    """Encode a mask of shape (H, W).

    Returns:
        The bytes, as Label Studio has them in JSON.
    """
    values = mask.ravel()
    starts = np.concatenate(([0], np.flatnonzero(values[1:] != values[:-1]) + 1))
    lengths = CHANNELS * np.diff(starts, append=len(values))
    bits = [f"{CHANNELS * len(values):032b}", f"{VALUE_BITS - 1:05b}"]
    bits += [f"{width - 1:04b}" for width in LENGTH_BITS]
    for length, is_set in zip(lengths.tolist(), values[starts].tolist(), strict=True):
        bits.append(_runs(length, 255 if is_set else 0))
    text = "".join(bits)
    text += "0" * (-len(text) % 8)
    return list(int(text, 2).to_bytes(len(text) // 8, "big"))


def _runs(length: int, value: int) -> str:
    """Return the bits of one value repeated; long runs are cut into several."""
    longest = 1 << LENGTH_BITS[-1]
    count, rest = divmod(length, longest)
    bits = _run(longest, value) * count
    return bits + _run(rest, value) if rest else bits


def _run(length: int, value: int) -> str:
    kind = next(kind for kind, width in enumerate(LENGTH_BITS) if length <= 1 << width)
    return f"1{kind:02b}{length - 1:0{LENGTH_BITS[kind]}b}{value:0{VALUE_BITS}b}"
