"""Galleries of an evaluation: which examples are shown, and their panels (paper, fig. 5, 7 and 8).

Examples are chosen from the rows alone. A row has no prior, so that the chosen examples are
segmented again; masks are those of the row. Panels are files that a later report uses again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from coprs_deploy.artifacts import atomic_write, make_directory
from coprs_deploy.data.examples import Example
from coprs_deploy.data.rle import decode_mask
from coprs_deploy.evaluation.evaluator import Segment
from coprs_deploy.evaluation.protocols import EvaluationProtocol
from coprs_deploy.evaluation.rows import EvaluationRow, encode_row
from coprs_deploy.evaluation.runner import EvaluationTask
from coprs_deploy.evaluation.summary import MAX_SAME_CLASS, object_size, row_iou
from coprs_deploy.logits import sigmoid
from coprs_deploy.visualization import draw_heatmap, draw_overlay

GALLERIES: Mapping[str, str] = {
    "best": "Best masks",
    "median": "Median masks",
    "worst": "Worst masks",
    "small": "Worst masks of small objects",
    "crowd": f"Worst masks among {MAX_SAME_CLASS} or more objects of the same class",
}
"""Name to title, in the order of the report."""

PANELS: Mapping[str, str] = {
    "image": "image",
    "prior": "prior",
    "mask": "predicted mask",
    "ground_truth": "ground truth",
}
"""Name to caption of the panels of an example."""

PER_GALLERY = 3
"""Examples of a gallery."""

PANEL_PX = 280
"""Longer side of a panel."""

FOLDER = "gallery"


@dataclass(frozen=True)
class GalleryExample:
    """An example with the files of its panels.

    Attributes:
        row: the row.
        mask_iou: IoU of its masks.
        prior_iou: IoU of its priors.
        panels: name of each panel, as in ``PANELS``, to its file; without a model no prior.
    """

    row: EvaluationRow
    mask_iou: float
    prior_iou: float
    panels: Mapping[str, Path]


def choose_examples(
    rows: Sequence[EvaluationRow], protocol: EvaluationProtocol
) -> dict[str, list[EvaluationRow]]:
    """Choose the examples of each gallery among those with a visible target that did not fail.

    Each gallery prefers different images, and no example is chosen twice. Ties go to the first row.
    A gallery without examples is left out.
    """
    counted = [
        row for row in rows if row.error is None and row.mask is not None and row.mask.ground_truth
    ]
    ranked = sorted(counted, key=lambda row: (row_iou(row, protocol), row.index))
    middle = len(ranked) // 2
    by_distance = sorted(range(len(ranked)), key=lambda i: (abs(i - middle), i))
    small = [row for row in ranked if row.mask and object_size(row.mask.ground_truth) == "small"]
    crowd = [row for row in ranked if (row.num_same_class or 0) >= MAX_SAME_CLASS]
    candidates = {
        "best": sorted(counted, key=lambda row: (-row_iou(row, protocol), row.index)),
        "median": [ranked[i] for i in by_distance],
        "worst": ranked,
        "small": small,
        "crowd": crowd,
    }
    taken: set[int] = set()
    chosen = {}
    for name in GALLERIES:
        if found := _distinct(candidates[name], taken):
            chosen[name] = found
            taken |= {row.index for row in found}
    return chosen


def _distinct(rows: Iterable[EvaluationRow], taken: set[int]) -> list[EvaluationRow]:
    """Return the first rows that are not taken, each on another image if there are enough."""
    left = [row for row in rows if row.index not in taken]
    seen: set[str] = set()
    first = []
    for row in left:
        image = row.image or f"row {row.index}"
        if image not in seen:
            seen.add(image)
            first.append(row)
    others = [row for row in left if all(row is not each for each in first[:PER_GALLERY])]
    return (first[:PER_GALLERY] + others)[:PER_GALLERY]


def draw_gallery(
    folder: Path,
    rows: Sequence[EvaluationRow],
    task: EvaluationTask,
    segment: Callable[[], Segment] | None,
) -> list[GalleryExample]:
    """Draw the panels of examples that ``folder`` does not have yet.

    Args:
        folder: folder of the panels; created if it does not exist.
        rows: rows of the chosen examples.
        task: the data set.
        segment: opens the model, when a prior is missing; None draws no priors.
    """
    make_directory(folder)
    drawn = []
    for row in rows:
        stem = f"{row.index}-{hashlib.sha256(encode_row(row)).hexdigest()[:8]}"
        files = {name: folder / f"{stem}-{name}.webp" for name in PANELS}
        missing = {name for name, file in files.items() if not file.is_file()}
        if segment is None:
            missing.discard("prior")
        if missing:
            example, prior = task.examples[row.index], None
            if "prior" in missing:
                assert segment is not None, "without a model no prior is missing"
                result = segment()(example.image, row.instruction, task.max_targets)
                prior = prior_map(result.prior_logits, example.image.shape[:2])
            for name, panel in draw_panels(example, row, prior).items():
                if name in missing:
                    with atomic_write(files[name]) as partial:
                        panel.save(partial, "WEBP", quality=82, method=6)
        found = {name: file for name, file in files.items() if file.is_file()}
        mask_iou = row_iou(row, task.protocol)
        drawn.append(GalleryExample(row, mask_iou, row_iou(row, task.protocol, "prior"), found))
    return drawn


def draw_panels(
    example: Example, row: EvaluationRow, prior: NDArray[np.float32] | None
) -> dict[str, Image.Image]:
    """Draw image, prior, predicted mask and ground truth; ``prior`` (H, W) is in [0, 1]."""
    height, width = example.image.shape[:2]
    masks = [decode_mask(mask, height, width) for mask in row.masks]
    predicted = np.stack(masks) if masks else np.zeros((0, height, width), dtype=np.bool_)
    panels = {"image": Image.fromarray(example.image)}
    if prior is not None:
        panels["prior"] = draw_heatmap(example.image, prior)
    panels["mask"] = draw_overlay(example.image, predicted)
    panels["ground_truth"] = draw_overlay(example.image, example.masks)
    return {name: _reduce(panel) for name, panel in panels.items()}


def prior_map(prior_logits: NDArray[np.float32], size: tuple[int, ...]) -> NDArray[np.float32]:
    """Return the largest prior of all targets, (H, W) in [0, 1]; 0 without a target."""
    if not len(prior_logits):
        return np.zeros(size, dtype=np.float32)
    return sigmoid(np.max(prior_logits, axis=0))


def _reduce(panel: Image.Image) -> Image.Image:
    """Resize a panel to a longer side of ``PANEL_PX``."""
    factor = PANEL_PX / max(panel.size)
    size = (max(1, round(panel.width * factor)), max(1, round(panel.height * factor)))
    return panel.convert("RGB").resize(size, Image.Resampling.LANCZOS)
