"""Sampled completions of a rollout with image, prior and mask."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from coprs_deploy.evaluation.metrics import count_pixels, iou, union
from coprs_deploy.images import prepare_image, resize_logits

if TYPE_CHECKING:
    from coprs_deploy.training.grpo.trainer import JointTrainer, ScoredRollout

TILE_PX = 160
"""Side of one image on a sheet, in pixels."""

DIMMED = 0.35
"""Brightness of what a mask leaves out."""

PRIOR_COLOR = np.array([255.0, 80.0, 0.0])


def write_samples(trainer: JointTrainer, directory: Path, step: int, count: int) -> None:
    """Write the first completions of the last rollout: one sheet, and one JSON line each.

    A row of the sheet is one completion: image with the ground truth, prior, mask.

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
        rows.append([_cut(example.image, gt), _heat(example.image, prior)])
        rows[-1].append(_cut(example.image, mask > 0))
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
    sheet = np.concatenate([np.concatenate(row, axis=1) for row in rows])
    Image.fromarray(sheet).save(directory / f"step-{step:06d}.png")
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


def _cut(image: NDArray[np.uint8], mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    shown = np.where(mask[..., None], image, (image * DIMMED).astype(np.uint8))
    return _tile(shown.astype(np.uint8))


def _heat(image: NDArray[np.uint8], logits: NDArray[np.float32]) -> NDArray[np.uint8]:
    share = (0.5 + 0.5 * np.tanh(logits / 2))[..., None]  # the sigmoid, without an overflow
    shown: NDArray[Any] = (1 - 0.8 * share) * image + 0.8 * share * PRIOR_COLOR
    return _tile(shown.astype(np.uint8))


def _tile(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    picture = Image.fromarray(image)
    picture.thumbnail((TILE_PX, TILE_PX))
    tile = Image.new("RGB", (TILE_PX, TILE_PX))
    tile.paste(picture)
    return np.asarray(tile)
