"""Rows of generated scenes, with known masks and responses, and their report."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
from msgspec import structs

from coprs_deploy.data.rle import encode_mask
from coprs_deploy.data.sources import open_examples
from coprs_deploy.evaluation.evaluator import Prediction, score_example
from coprs_deploy.evaluation.protocols import TARGETS
from coprs_deploy.evaluation.reports.report import EvaluatedDataset
from coprs_deploy.evaluation.runner import EvaluationTask
from coprs_deploy.evaluation.summary import summarize_dataset


def shrunk(masks, number):
    """Remove the first ``number`` rows of pixels of each mask."""
    kept = masks.copy()
    for mask in kept:
        rows = np.flatnonzero(mask.any(axis=1))
        mask[rows[: min(number, len(rows) - 1)]] = False
    return kept


def segment(image, instruction, max_targets):
    """Segment a square in the middle."""
    logits = np.full((1, *image.shape[:2]), -9, np.float32)
    logits[:, 20:60, 20:60] = 9
    return SimpleNamespace(
        masks=logits > 0,
        prior_logits=logits,
        response="",
        scores=np.ones(1),
        stop_reason="",
    )


def make_dataset(tmp_path, num_examples=9, num_no_match=1, name="synthetic:full"):
    """Evaluate scenes with masks that lose more rows of pixels from example to example."""
    found = open_examples("synthetic:full", num_examples, num_no_match)
    rows = []
    for index, example in enumerate(found.examples):
        masks = shrunk(example.masks, 2 * index)
        response = f"<think>It is *object* {index} <left>.</think><REF_POS>"
        prediction = Prediction(masks, shrunk(masks, 3), response, scores=[0.5] * len(masks))
        row = score_example(index, example, prediction)
        encoded = tuple(map(encode_mask, masks))
        rows.append(structs.replace(row, masks=encoded, num_same_class=index % 5))
    task = EvaluationTask(name, found.examples, found.max_targets, TARGETS)
    folder = tmp_path / "scenes"
    folder.mkdir(exist_ok=True)
    summary = summarize_dataset(rows, TARGETS)
    return EvaluatedDataset(task, found.description, folder, rows, summary)
