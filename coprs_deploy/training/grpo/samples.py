"""Samples of a rollout for people: each response with its picture, prior and mask."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from coprs_deploy.evaluation.metrics import overlap, union
from coprs_deploy.images import prepare_image, resize_logits, sigmoid
from coprs_deploy.visualization import draw_grid, draw_heatmap, draw_overlay

if TYPE_CHECKING:
    from coprs_deploy.training.grpo.trainer import JointTrainer, ScoredRollout

TILE_PX = 160
"""Side of one picture on a sheet."""


def write_samples(trainer: JointTrainer, folder: Path, step: int, count: int) -> None:
    """Write the first responses of the last rollout: one sheet, and one line of JSON each.

    A row of the sheet is one response: picture with the truth, prior, mask.

    Args:
        trainer: holds the rollout.
        folder: where ``step-N.png`` and ``responses.jsonl`` go.
        step: of the run.
        count: responses.
    """
    rollout = trainer.rollout
    if rollout is None or rollout.decoded is None or not count:
        return
    folder.mkdir(parents=True, exist_ok=True)
    forms = trainer.parts.reader.format_scores(
        rollout.responses[:count], rollout.truth.num_targets[:count].tolist()
    )
    rows, lines = [], []
    for number, form in enumerate(forms):
        example = rollout.questions[number].example
        prior, mask = _logits(trainer, rollout, number)
        truth = union(example.masks)
        rows.append(
            [
                draw_overlay(example.image, truth[None]),
                draw_heatmap(example.image, sigmoid(prior)),
                draw_overlay(example.image, mask[None] > 0),
            ]
        )
        lines.append(
            {
                "step": step,
                "id": example.id,
                "instruction": example.instruction,
                "response": trainer.parts.reader.read(rollout.responses[number]).text,
                "format": form,
                "mask_iou": overlap(mask > 0, truth).iou,
            }
        )
    draw_grid(rows, TILE_PX).save(folder / f"step-{step:06d}.png")
    with (folder / "responses.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def _logits(
    trainer: JointTrainer, rollout: ScoredRollout, number: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Bring prior and mask of one response to the picture's size; the largest of its targets."""
    assert rollout.decoded is not None
    example = rollout.questions[number].example
    geometry = trainer.parts.collector.geometry
    source = prepare_image(example.image, geometry)
    found = rollout.decoded.is_found[number]
    grown = []
    for logits in (rollout.decoded.prior_logits, rollout.decoded.mask_logits):
        chosen = logits[number][found].float().cpu()
        if not len(chosen):
            chosen = torch.full((1, *logits.shape[-2:]), -1.0)
        largest = chosen.amax(0)[None, None].numpy()
        grown.append(resize_logits(largest, source, geometry)[0])
    return grown[0], grown[1]
