"""Gallery of a stage: greedy responses on held-out examples with their masks, for the report.

gallery/STAGE/NN.png          image, ground truth, prior and mask of an example
gallery/STAGE/gallery.json    step, texts and scores

The examples are spread evenly over the held-out data and stay the same throughout a run.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from coprs_deploy.artifacts import write_json
from coprs_deploy.data.examples import Example
from coprs_deploy.evaluation.evaluator import Prediction, score_example
from coprs_deploy.evaluation.protocols import TARGETS
from coprs_deploy.evaluation.summary import row_iou
from coprs_deploy.visualization import draw_grid, draw_heatmap, draw_overlay

FOLDER, FILE = "gallery", "gallery.json"

TILE_PX = 240
"""Side of one image, in pixels."""

TILES = "image | ground truth | prior | mask"

_MARKUP = re.compile(r"([\\`*_{}\[\]#|~])")


@dataclass(frozen=True, eq=False)
class Sample:
    """A response to an example, with what was decoded from it.

    Attributes:
        example: the example.
        response: the whole response.
        reasoning: its reasoning.
        prior: (H, W) float32 in [0, 1], the largest of all targets; None if it names none.
        masks: (N, H, W) bool, one per target that it names.
        reward: its reward.
        format_score: its format score.
    """

    example: Example
    response: str
    reasoning: str
    prior: NDArray[np.float32] | None
    masks: NDArray[np.bool_]
    reward: float
    format_score: float

    @property
    def mask_iou(self) -> float | None:
        """IoU of the union of the masks with the ground truth; None without a target.

        Ignored pixels are not counted.
        """
        if not len(self.example.masks):
            return None
        prediction = Prediction(self.masks, self.masks[:0], self.response)
        return row_iou(score_example(0, self.example, prediction), TARGETS)

    def to_json(self) -> dict[str, Any]:
        """Return texts and scores."""
        return {
            "id": self.example.id,
            "instruction": self.example.instruction,
            "response": self.response,
            "reasoning": self.reasoning,
            "mask_iou": self.mask_iou,
            "reward": self.reward,
            "format_score": self.format_score,
            "num_targets": len(self.example.masks),
            "num_found": len(self.masks),
        }

    def draw(self) -> Image.Image:
        """Draw image, ground truth, prior and mask in a row; grey where nothing was named."""
        image, empty = self.example.image, Image.new("RGB", (TILE_PX, TILE_PX), "gray")
        named = len(self.masks) > 0 and self.prior is not None
        tiles = [draw_overlay(image, each) for each in (self.example.masks[:0], self.example.masks)]
        tiles.append(draw_heatmap(image, self.prior) if self.prior is not None else empty)
        tiles.append(draw_overlay(image, self.masks) if named else empty)
        return draw_grid([tiles], TILE_PX)


def spread_indices(total: int, count: int) -> list[int]:
    """Choose at most ``count`` of ``total`` indices, evenly spaced."""
    count = min(count, total)
    return sorted({round(float(x)) for x in np.linspace(0, total - 1, count)}) if count else []


def write_gallery(run: Path, stage: str, step: int, samples: Sequence[Sample]) -> None:
    """Write the gallery of a stage, which replaces that of an earlier step."""
    if not samples:
        return
    folder = run / FOLDER / stage
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rows = []
    for number, sample in enumerate(samples):
        name = f"{number:02}.png"
        sample.draw().save(folder / name)
        rows.append({"file": name, **sample.to_json()})
    write_json(folder / FILE, {"step": step, "samples": rows})


def gallery_lines(run: Path, stage: str) -> Iterator[str]:
    """Yield the gallery of a stage as Markdown; nothing if it has none."""
    file = run / FOLDER / stage / FILE
    if not file.is_file():
        return
    gallery = json.loads(file.read_text(encoding="utf-8"))
    yield from (
        "",
        f"### Held-out examples after step {gallery['step']} of {stage}",
        "",
        f"Greedy responses: {TILES}. Grey: the response named no target.",
    )
    for row in gallery["samples"]:
        yield from (
            "",
            f"**{plain(row['instruction'])}** ({plain(row['id'])}): {quality_text(row)}",
            "",
            f"![{TILES}]({FOLDER}/{stage}/{row['file']})",
            "",
            f"> {plain(row['reasoning']) or '(no reasoning)'}",
        )


def quality_text(row: dict[str, Any]) -> str:
    """Return IoU, reward and targets of a sample."""
    quality = "no-match" if row["mask_iou"] is None else f"IoU {row['mask_iou']:.2f}"
    return (
        f"{quality}, reward {row['reward']:.2f}, format {row['format_score']:.2f}, "
        f"{row['num_found']} of {row['num_targets']} targets named"
    )


def plain(text: str) -> str:
    """Escape a text for Markdown, on one line."""
    text = _MARKUP.sub(r"\\\1", " ".join(text.split()))
    return text.replace("&", "&amp;").replace("<", "&lt;")
