"""Sampled completions of a rollout with image, prior and mask."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coprs_deploy.evaluation.metrics import count_pixels, iou, union
from coprs_deploy.images import sigmoid
from coprs_deploy.training.grpo.evaluation import at_image_size
from coprs_deploy.visualization import draw_grid, draw_heatmap, draw_overlay

if TYPE_CHECKING:
    from coprs_deploy.data.examples import Example
    from coprs_deploy.training.grpo.trainer import JointTrainer

TILE_PX = 160
"""Side of one image on a sheet, in pixels."""


def write_samples(trainer: JointTrainer, directory: Path, step: int, count: int) -> None:
    """Write the first completions of the last rollout: one sheet, and one JSON line each.

    A row of the sheet is one completion: image with the ground truth, prior, mask. The directory
    gets ``step-N.png`` and ``completions.jsonl``.
    """
    rollout = trainer.rollout
    decoded = rollout.decoded if rollout else None
    if rollout is None or decoded is None or not count:
        return
    directory.mkdir(parents=True, exist_ok=True)
    format_scores = trainer.parts.reader.format_scores(
        rollout.completions[:count], rollout.ground_truth.num_targets[:count].tolist()
    )
    rows, lines = [], []
    for number, format_score in enumerate(format_scores):
        example = rollout.items[number].example
        is_found = decoded.is_found[number]
        prior = _largest(trainer, example, decoded.prior_logits[number], is_found)
        mask = _largest(trainer, example, decoded.mask_logits[number], is_found)
        gt = union(example.masks)
        rows.append(
            [
                draw_overlay(example.image, gt[None]),
                draw_heatmap(example.image, sigmoid(prior)),
                draw_overlay(example.image, mask[None] > 0),
            ]
        )
        lines.append(
            {
                "step": step,
                "id": example.id,
                "instruction": example.instruction,
                "response": trainer.parts.reader.read(rollout.completions[number]).text,
                "format_score": format_score,
                "mask_iou": iou(count_pixels(mask > 0, gt), empty=0.0),
            }
        )
    draw_grid(rows, TILE_PX).save(directory / f"step-{step:06d}.png")
    with (directory / "completions.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def _largest(
    trainer: JointTrainer, example: Example, logits: Tensor, is_found: Tensor
) -> NDArray[np.float32]:
    """Return the maximum of (K, M, M) logits over the found targets at the image size, (H, W)."""
    found = logits[is_found] if is_found.any() else torch.full_like(logits[:1], -1.0)
    largest: NDArray[np.float32] = at_image_size(trainer, example, found.float().amax(0)[None])[0]
    return largest
