"""Masks as ``supervision.Detections``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from coprs_deploy.errors import import_failure, install_hint

if TYPE_CHECKING:
    import supervision as sv


def detections(
    masks: NDArray[np.bool_],
    boxes: NDArray[np.int64],
    scores: NDArray[np.float64],
    instructions: Sequence[str],
    classes: Sequence[str],
) -> sv.Detections:
    """Return masks as ``supervision.Detections``, labeled with their instructions.

    Args:
        masks: (N, H, W).
        boxes: (N, 4) x1, y1, x2, y2 in pixels.
        scores: (N,) in [0, 1].
        instructions: instruction of each mask, which is its ``class_name``.
        classes: all instructions; the place of an instruction is its ``class_id``.

    Raises:
        MissingDependencyError: supervision is not installed.
    """
    try:
        import supervision
    except ImportError as error:
        hint = install_hint("supervision")
        raise import_failure(error, "supervision", hint, needed_by="to_supervision") from error
    found: Any = supervision.Detections(
        xyxy=boxes.astype(np.float32).reshape(-1, 4),
        mask=masks,
        confidence=scores.astype(np.float32),
        class_id=np.array([classes.index(each) for each in instructions], np.int64),
        data={"class_name": np.array(instructions, dtype=np.str_)},
    )
    return found
