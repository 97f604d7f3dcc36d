"""Judging rows by the masks of their answers: against float32's, and against the true ones.

A row leaves ``0.mask``, ``1.mask`` and so on, bool at the size of the picture, and ``0.truth``
where there is one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coprs_deploy.benchmarks.arrays import OUTPUT_FILE, Values, read_arrays
from coprs_deploy.benchmarks.report import Accuracy
from coprs_deploy.evaluation.metrics import count_pixels, iou


def read_masks(outputs: Mapping[str, Path]) -> dict[str, Values]:
    """Read what rows left, by name; a row that has no answers leaves nothing."""
    files = {name: path / OUTPUT_FILE for name, path in outputs.items()}
    return {name: read_arrays(file) for name, file in files.items() if file.is_file()}


def judge_masks(
    masks: Mapping[str, Values], expected: Values | None, has_truth: bool, note: str = ""
) -> dict[str, Accuracy]:
    """Compare the masks of rows.

    Args:
        masks: what each row left.
        expected: what float32 left for the same questions; None without a checkpoint.
        has_truth: whether IoU with the true masks means something.
        note: what has to be said beside the figures.
    """
    return {name: _judge(found, expected, has_truth, note) for name, found in masks.items()}


def _judge(found: Values, expected: Values | None, has_truth: bool, note: str) -> Accuracy:
    numbers = [key.removesuffix(".mask") for key in found if key.endswith(".mask")]
    same: list[float] = []
    if expected is not None:
        same = [mask_agreement(found[f"{i}.mask"], expected[f"{i}.mask"]) for i in numbers]
    true = [
        iou(count_pixels(found[f"{i}.mask"], found[f"{i}.truth"]), empty=0.0)
        for i in numbers
        if has_truth and f"{i}.truth" in found
    ]
    return summarize_masks(len(numbers), same, true, note=note)


def summarize_masks(
    inputs: int, same: Iterable[float], true: Iterable[float], **figures: Any
) -> Accuracy:
    """Bring IoUs with float32's masks and with the true ones down to an accuracy."""
    agreement, truth = np.array(list(same)), np.array(list(true))
    return Accuracy(
        inputs=inputs,
        mask_iou=float(agreement.mean()) if len(agreement) else None,
        mask_iou_worst=float(agreement.min()) if len(agreement) else None,
        truth_iou=float(truth.mean()) if len(truth) else None,
        precision_at_half=float((truth > 0.5).mean()) if len(truth) else None,
        **figures,
    )


def mask_agreement(found: NDArray[np.bool_], expected: NDArray[np.bool_]) -> float:
    """IoU of two masks; two empty ones agree."""
    return iou(count_pixels(found, expected), empty=1.0)
