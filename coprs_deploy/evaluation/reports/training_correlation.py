"""Correlation of prior and mask during training, from the log of a run (paper, 4.3, fig. 3)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from coprs_deploy.errors import ArtifactError
from coprs_deploy.evaluation.reports.plots import Correlation

LOG_FILE = "log.jsonl"

PRIOR_LOSS, MASK_LOSS = "loss/prior_bce", "loss/mask_dice"
"""Keys of the log; losses are logged without their weights."""


def read_training_correlation(path: Path) -> Correlation:
    """Read 1 - BCE of the prior and 1 - dice loss of the mask, a point for each logged batch.

    Args:
        path: run directory, or its ``log.jsonl``.

    Raises:
        FileNotFoundError: there is no log.
        ArtifactError: a line is not JSON, or no line has both losses.
    """
    log = path / LOG_FILE if path.is_dir() else path
    lines = log.read_text(encoding="utf-8").splitlines()
    points = []
    for number, text in enumerate(lines, start=1):
        try:
            line: Any = json.loads(text)
        except ValueError as error:
            if number == len(lines):  # a run that was killed, or is still writing
                break
            raise ArtifactError(f"{log}, line {number} is not JSON: {error}") from error
        if isinstance(line, dict) and None not in (line.get(PRIOR_LOSS), line.get(MASK_LOSS)):
            points.append((1 - float(line[PRIOR_LOSS]), 1 - float(line[MASK_LOSS])))
    if not points:
        raise ArtifactError(
            f"{log} has no line with {PRIOR_LOSS} and {MASK_LOSS}; the correlation needs a run "
            "that trains with both losses"
        )
    x, y = zip(*points, strict=True)
    return Correlation(x, y, "1 - BCE of the prior", "1 - dice loss of the mask", "batches")
