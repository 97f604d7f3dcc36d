"""Positions and attention windows of Qwen2.5-VL, as transformers computes them, in numpy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from coprs_deploy.specs import Record

MASKED = -3.0e38
"""Attention logit of a masked key; with infinity, a row without any key would be NaN."""


class QwenVision(Record, frozen=True):
    """Sizes of Qwen2.5-VL's vision tower that its inputs depend on.

    Attributes:
        patch_size: side of a patch in pixels.
        spatial_merge_size: side, in patches, of the square behind one token.
        window_size: side of an attention window in pixels.
    """

    patch_size: int
    spatial_merge_size: int
    window_size: int

    @property
    def window_side(self) -> int:
        """Side of an attention window in tokens."""
        return self.window_size // self.spatial_merge_size // self.patch_size


def prompt_positions(
    is_image: NDArray[np.bool_], grid: tuple[int, int], merge_size: int
) -> NDArray[np.int64]:
    """Count the positions of a prompt with one image (Qwen2.5-VL's multimodal rotary embedding).

    Args:
        is_image: (L,) whether a token of the prompt is a vision token; they are consecutive.
        grid: patches of the image (rows, columns).
        merge_size: side, in patches, of the square behind one token.

    Returns:
        (3, L): time, row and column. Text counts up alike in all three; the text after the image
        goes on from the image's longer side.
    """
    rows, columns = (side // merge_size for side in grid)
    start, count = int(is_image.argmax()), rows * columns
    image = start + np.stack((np.zeros(count, int), *np.divmod(np.arange(count), columns)))
    rest = start + max(rows, columns) + np.arange(len(is_image) - start - count)
    before = np.arange(start)
    return np.concatenate([np.tile(before, (3, 1)), image, np.tile(rest, (3, 1))], axis=1)


def vision_inputs(
    patches: NDArray[np.float32], grid: tuple[int, int], vision: QwenVision
) -> dict[str, NDArray[np.generic]]:
    """Order patches by attention window, and pad the windows to one size.

    Args:
        patches: (P, C) in the order of the image processor.
        grid: patches of the image (rows, columns).
        vision: sizes of the vision tower.

    Returns:
        Inputs of the vision graph, for W windows of at most S patches:

        - ``patches`` (P, C) in window order, ``positions`` (P, 2) row and column of each;
        - ``slots`` (W * S,): patch of each slot; ``slot_mask`` (W, 1, 1, S): 0, or a large
          negative number for padding; ``unslot`` (P,): slot of each patch;
        - ``image_order`` (P / merged patches,): window order to image order of the tokens.
    """
    merge, side = vision.spatial_merge_size, vision.window_side
    columns_of_tokens = grid[1] // merge
    rows, columns = np.divmod(np.arange(grid[0] * grid[1] // merge**2), columns_of_tokens)
    window = rows // side * columns_of_tokens + columns // side
    order = np.lexsort((columns, rows, window))
    inside = np.stack(np.divmod(np.arange(merge**2), merge), -1)
    positions = merge * np.stack((rows, columns), -1)[:, None] + inside
    lengths = np.unique(window, return_counts=True)[1] * merge**2
    used = np.arange(lengths.max()) < lengths[:, None]
    return {
        "patches": patches.reshape(len(order), merge**2, -1)[order].reshape(patches.shape),
        "positions": positions[order].reshape(-1, 2),
        "slots": np.where(used.ravel(), np.cumsum(used) - 1, 0),
        "slot_mask": np.where(used, np.float32(0), np.float32(MASKED))[:, None, None],
        "unslot": np.flatnonzero(used),
        "image_order": np.argsort(order),
    }


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the number of leading tokens that two prompts share."""
    for index, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return index
    return min(len(first), len(second))
