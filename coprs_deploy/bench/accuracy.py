"""Accuracy of cases against PyTorch float32 and the ground truth, in the reference process.

Each function takes the folders of outputs by case and returns an :class:`Accuracy` as JSON by case.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coprs_deploy.bench.case import OUTPUT_FILE, Values, read_arrays, read_inputs
from coprs_deploy.bench.reference import open_reference, open_torch_graphs, scenes
from coprs_deploy.bench.report import Accuracy
from coprs_deploy.checkpoint import read_checkpoint
from coprs_deploy.engines import DeviceTensor, SegmentationGraphs
from coprs_deploy.engines.graphs import masks_at_original_size
from coprs_deploy.evaluation.metrics import (
    EMPTY_IOU,
    MaskCounts,
    count_pixels,
    giou,
    iou,
    precision_at,
)
from coprs_deploy.export.equivalence import cosine_similarity, relative_error
from coprs_deploy.images import (
    PreparedImage,
    ResizeTransform,
    mask_cells,
    prepare_image,
    resize_logits,
)
from coprs_deploy.specs import MASK_DECODER, PRIOR, Geometry

Masks = Sequence[NDArray[np.bool_]]


def evaluate_graphs(
    outputs: Mapping[str, str], folder: str, checkpoint: str | None, bundle: str | None
) -> dict[str, Any]:
    """Compare graph outputs with float32: their own output, and the masks that follow from it.

    The reference's graphs carry the outputs of one graph to the mask. ``folder`` holds the inputs
    and float32 outputs; without a checkpoint, the reference is the bundle.
    """
    geometry, _, opener, note = open_reference(checkpoint, bundle)
    found = {}
    with opener(PRIOR) as prior, opener(MASK_DECODER) as decoder:
        for name, place in outputs.items():
            arrays = read_arrays(Path(place) / OUTPUT_FILE)
            compared = [
                _compare(_outputs_of(index, arrays), sample, prior, decoder, geometry)
                for index, sample in enumerate(read_inputs(folder))
            ]
            found[name] = _summarize(compared, note).to_json()
    return found


def evaluate_masks(
    outputs: Mapping[str, str],
    *,
    has_gt: bool,
    reference: str | None = None,
    checkpoint: str | None = None,
    count: int = 0,
    sides: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Compare the masks of requests with float32 and the ground truth.

    Float32 is the case ``reference``, or else PyTorch's results on the first ``count`` scenes, at
    the image side of the case in ``sides``, if any.
    """
    files = {name: Path(place) / OUTPUT_FILE for name, place in outputs.items()}
    masks = {name: read_arrays(file) for name, file in files.items() if file.is_file()}
    found = {}
    for name, arrays in masks.items():
        expected, note = masks.get(reference or ""), ""
        if checkpoint is not None:
            try:
                expected = _float32_masks(checkpoint, count, (sides or {}).get(name))
            except Exception as error:  # the ground truth is still worth comparing with
                note = f"PyTorch float32 failed: {type(error).__name__}: {error}"
        found[name] = compare_masks(arrays, expected, has_gt, note).to_json()
    return found


def evaluate_policies(
    outputs: Mapping[str, str], references: Sequence[str], checkpoint: str, count: int, has_gt: bool
) -> dict[str, Any]:
    """Compare concentrations, and the masks that PyTorch's float32 graphs make of them.

    The first of the cases in float32 (``references``) that was measured is the reference.
    """
    arrays = {name: read_arrays(Path(place) / OUTPUT_FILE) for name, place in outputs.items()}
    reference = next((name for name in references if name in arrays), None)
    geometry = read_checkpoint(checkpoint).config.model.geometry
    masks: dict[str, list[NDArray[np.bool_]]] = {name: [] for name in arrays}
    examples = scenes(count)
    with open_torch_graphs(checkpoint) as graphs:
        for index, scene in enumerate(examples):
            prepared = prepare_image(scene.image, geometry)
            embedding = graphs.encode(prepared)
            for name, values in arrays.items():
                vectors = values[f"{index}.concentration"]
                masks[name].append(last_mask(graphs, embedding, vectors, prepared, geometry))
    gt = [np.any(scene.masks, axis=0) for scene in examples] if has_gt else []
    found = {}
    for name, values in arrays.items():
        extra: dict[str, Any] = {"note": "no case in float32 was measured beside it"}
        if reference is not None:
            extra = {"concentration_cosine": _min_cosine(values, arrays[reference])}
        expected = masks[reference] if reference is not None else None
        found[name] = Accuracy(count, **_mask_metrics(masks[name], expected, gt), **extra).to_json()
    return found


def compare_masks(found: Values, expected: Values | None, has_gt: bool, note: str) -> Accuracy:
    """Compare the masks of one case with float32 and the ground truth."""
    numbers = [key.removesuffix(".mask") for key in found if key.endswith(".mask")]
    masks = [found[f"{i}.mask"] for i in numbers]
    theirs = None if expected is None else [expected[f"{i}.mask"] for i in numbers]
    gt = [found[f"{i}.ground_truth"] for i in numbers if f"{i}.ground_truth" in found]
    return Accuracy(len(numbers), **_mask_metrics(masks, theirs, gt if has_gt else []), note=note)


def _mask_metrics(masks: Masks, expected: Masks | None, ground_truth: Masks) -> dict[str, Any]:
    metrics: dict[str, Any] = {}
    if expected:
        ious = [mask_agreement(*pair) for pair in zip(masks, expected, strict=True)]
        metrics = {"mask_iou_mean": float(np.mean(ious)), "mask_iou_min": float(np.min(ious))}
    return metrics | gt_metrics([count_pixels(*p) for p in zip(masks, ground_truth, strict=False)])


def gt_metrics(counts: Sequence[MaskCounts]) -> dict[str, float]:
    """Return ``giou`` and ``precision_at_50``, if any; the IoU of two empty masks is 0."""
    if not counts:
        return {}
    return {
        "giou": giou(counts, empty=EMPTY_IOU),
        "precision_at_50": precision_at(counts, 0.5, empty=EMPTY_IOU),
    }


def mask_agreement(found: NDArray[np.bool_], expected: NDArray[np.bool_]) -> float:
    """Return the IoU of two masks; two empty masks agree (1.0)."""
    return iou(count_pixels(found, expected), empty=1.0)


def last_mask(
    graphs: SegmentationGraphs,
    embedding: DeviceTensor,
    concentrations: NDArray[np.float32],
    prepared: PreparedImage,
    geometry: Geometry,
) -> NDArray[np.bool_]:
    """Segment the last target of (N, D) concentrations: (H, W) bool, empty without a target."""
    if not len(concentrations):
        return np.zeros(prepared.original_size, np.bool_)
    _, chunks = graphs.priors_and_masks(embedding, concentrations[-1:], prepared.unpadded_size)
    mask: NDArray[np.bool_] = masks_at_original_size(chunks, 1, prepared, geometry)[0]
    return mask


@lru_cache(maxsize=8)
def _float32_masks(checkpoint: str, count: int, side: int | None) -> Values:
    from coprs_deploy.bench.answer_workloads import open_torch_requests

    with open_torch_requests(checkpoint, count, side) as workload:
        return workload.masks()


def _outputs_of(index: int, arrays: Values) -> Values:
    names = ("image_embedding", "prior_logits", "mask_logits")
    keys = {name: f"{index}.{name}" for name in names if f"{index}.{name}" in arrays}
    return {name: arrays[key].astype(np.float32) for name, key in keys.items()}


def _compare(
    found: Values, sample: Values, prior: Any, decoder: Any, geometry: Geometry
) -> dict[str, Any]:
    values, metrics = {**sample, **found}, dict[str, Any]()
    if "mask_logits" not in found:
        for runner in (decoder,) if "prior_logits" in found else (prior, decoder):
            outputs = runner(**{spec.name: values[spec.name] for spec in runner.spec.inputs})
            values |= {name: value.numpy() for name, value in outputs.items()}
    if "image_embedding" in found:
        pair = found["image_embedding"], sample["image_embedding"]
        metrics["embedding_cosine"] = cosine_similarity(*pair)
    if "prior_logits" in found or "image_embedding" in found:
        pair = values["prior_logits"], sample["prior_logits"]
        metrics["prior_relative_error"] = relative_error(*pair)
    ours, theirs = values["mask_logits"], sample["mask_logits"]
    metrics["mask_relative_error"] = relative_error(ours, theirs)
    height, width = mask_cells(sample["unpadded_size"], geometry)
    valid = (..., slice(height), slice(width))
    metrics["mask_iou"] = mask_agreement(ours[valid] > 0, theirs[valid] > 0)
    if "ground_truth" in sample:
        size = (int(sample["original_size"][0]), int(sample["original_size"][1]))
        prepared = ResizeTransform(sample["unpadded_size"], size)
        mask = np.any(resize_logits(ours, prepared, geometry) > 0, axis=0)
        metrics["gt"] = count_pixels(mask, sample["ground_truth"].astype(np.bool_))
    return metrics


def _summarize(compared: Sequence[Mapping[str, Any]], note: str) -> Accuracy:
    found: dict[str, float] = gt_metrics([each["gt"] for each in compared if "gt" in each])
    for name, metric, choose in (  # np.min and np.max keep a NaN; min and max may lose it
        ("embedding_cosine", "embedding_cosine", np.min),
        ("prior_relative_error", "prior_relative_error", np.max),
        ("mask_relative_error", "mask_relative_error", np.max),
        ("mask_iou_mean", "mask_iou", np.mean),
        ("mask_iou_min", "mask_iou", np.min),
    ):
        if values := [each[metric] for each in compared if metric in each]:
            found[name] = float(choose(values))
    digits = {name: float(f"{v:.9g}") if np.isfinite(v) else None for name, v in found.items()}
    return Accuracy(len(compared), note=note, **digits)


def _min_cosine(found: Values, expected: Values) -> float | None:
    """Return the smallest cosine over the questions with equally many targets in both."""
    pairs = [(found[key], expected[key]) for key in expected]
    vectors = [pair for a, b in pairs if a.shape == b.shape for pair in zip(a, b, strict=True)]
    return float(np.min([cosine_similarity(*pair) for pair in vectors])) if vectors else None
