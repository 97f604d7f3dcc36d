"""Sampled completions of a rollout with image, prior and mask."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from coprs_deploy.evaluation.metrics import count_pixels, iou, union
from coprs_deploy.images import prepare_image, resize_logits, sigmoid
from coprs_deploy.visualization import draw_grid, draw_heatmap, draw_overlay

if TYPE_CHECKING:
    from coprs_deploy.training.grpo.trainer import JointTrainer, ScoredRollout

TILE_PX = 160
"""Side of one image on a sheet, in pixels."""


def write_samples(trainer: JointTrainer, directory: Path, step: int, count: int) -> None:
    """Write the first completions of the last rollout: one sheet, and one JSON line each.

    A row of the sheet is one completion: image with the ground gt, prior, mask.

    Args:
        trainer: trainer with the rollout.
        directory: directory of ``step-N.png`` and ``completions.jsonl``.
        step: step of the stage.
        count: number of completions.
    """
    rollout = trainer.rollout
    if rollout is None or rollout.decoded is None or not count:
        return
    directory.mkdir(parents=True, exist_ok=True)
    format_scores = trainer.parts.reader.format_scores(
        rollout.completions[:count], rollout.ground_truth.num_targets[:count].tolist()
    )
    rows, lines = [], []
    for number, format_score in enumerate(format_scores):
        example = rollout.items[number].example
        prior, mask = _logits(trainer, rollout, number)
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


def _logits(
    trainer: JointTrainer, rollout: ScoredRollout, number: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return prior and mask logits of one completion at the image size, maxima over its targets."""
    assert rollout.decoded is not None
    example = rollout.items[number].example
    geometry = trainer.parts.collator.geometry
    source = prepare_image(example.image, geometry)
    is_found = rollout.decoded.is_found[number]
    resized = []
    for logits in (rollout.decoded.prior_logits, rollout.decoded.mask_logits):
        chosen = logits[number][is_found].float().cpu()
        if not len(chosen):
            chosen = torch.full((1, *logits.shape[-2:]), -1.0)
        largest = chosen.amax(0)[None, None].numpy()
        resized.append(resize_logits(largest, source, geometry)[0])
    return resized[0], resized[1]
