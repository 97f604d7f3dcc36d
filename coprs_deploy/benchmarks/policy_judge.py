"""Judging policies by what follows from their concentrations, in the process that holds PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coprs_deploy.benchmarks.arrays import OUTPUT_FILE, Values, read_arrays
from coprs_deploy.benchmarks.inputs import open_torch_stages, scenes
from coprs_deploy.benchmarks.mask_judge import mask_agreement, summarize_masks
from coprs_deploy.checkpoint import read_checkpoint
from coprs_deploy.engines import DeviceTensor, SegmentationGraphs
from coprs_deploy.engines.graphs import masks_at_original_size
from coprs_deploy.evaluation.metrics import count_pixels, iou
from coprs_deploy.images import PreparedImage, prepare_image
from coprs_deploy.specs import Geometry


def judge_policies(
    outputs: Mapping[str, str], reference: str | None, checkpoint: str, count: int, has_truth: bool
) -> dict[str, dict[str, Any]]:
    """Compare concentrations and the masks that the float32 graphs make of them.

    Args:
        outputs: folder of each row, with ``0.concentration`` and so on, (N, D) each.
        reference: the row in float32 that all are compared with; None where none was measured.
        checkpoint: whose graphs are run, by PyTorch in float32.
        count: how many scenes were asked about.
        has_truth: whether the true masks mean something.

    Returns:
        An :class:`Accuracy` as JSON, by row.
    """
    given = {name: read_arrays(Path(path) / OUTPUT_FILE) for name, path in outputs.items()}
    config = read_checkpoint(checkpoint).config.model
    masks: dict[str, list[NDArray[np.bool_]]] = {name: [] for name in given}
    truth = []
    with open_torch_stages(checkpoint) as stages:
        for index, scene in enumerate(scenes(count)):
            prepared = prepare_image(scene.image, config.geometry)
            embedding = stages.encode(prepared)
            truth.append(np.any(scene.masks, axis=0))
            for name, found in given.items():
                concentrations = found[f"{index}.concentration"]
                mask = last_mask(stages, embedding, concentrations, prepared, config.geometry)
                masks[name].append(mask)
    accuracies = {}
    for name, found in given.items():
        same: list[float] = []
        figures: dict[str, Any] = {"note": "no row in float32 was measured beside it"}
        if reference is not None:
            same = [
                mask_agreement(*pair) for pair in zip(masks[name], masks[reference], strict=True)
            ]
            figures = {"concentration_cosine": _smallest_cosine(found, given[reference])}
        true = (
            [iou(count_pixels(m, t), empty=0.0) for m, t in zip(masks[name], truth, strict=True)]
            if has_truth
            else []
        )
        accuracies[name] = summarize_masks(count, same, true, **figures).to_json()
    return accuracies


def last_mask(
    stages: SegmentationGraphs,
    embedding: DeviceTensor,
    concentrations: NDArray[np.float32],
    prepared: PreparedImage,
    geometry: Geometry,
) -> NDArray[np.bool_]:
    """Segment the last target, the one that counts; nothing where none was named.

    Args:
        stages: the graphs, or PyTorch in their place.
        embedding: (1, C, G, G), of the picture.
        concentrations: (N, D) float32, N may be 0.
        prepared: the picture.
        geometry: sizes of the model.

    Returns:
        (H, W) bool.
    """
    if not len(concentrations):
        return np.zeros(prepared.original_size, np.bool_)
    _, chunks = stages.priors_and_masks(embedding, concentrations[-1:], prepared.unpadded_size)
    mask: NDArray[np.bool_] = masks_at_original_size(chunks, 1, prepared, geometry)[0]
    return mask


def _smallest_cosine(found: Values, expected: Values) -> float | None:
    """Compare the vectors of all questions in which both named as many targets."""
    cosines = [
        np.sum(a * b, axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
        for a, b in ((found[key].astype(np.float64), expected[key]) for key in expected)
        if len(a) and a.shape == b.shape
    ]
    return float(np.min(np.concatenate(cosines))) if cosines else None
