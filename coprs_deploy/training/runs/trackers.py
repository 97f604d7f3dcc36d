"""Curves of a run in TensorBoard, Weights & Biases and trackio, by accelerate's trackers.

TensorBoard is rewound when a run resumes. The others cannot be: a line that they have is not sent
again. Their own environment variables apply (``WANDB_MODE=offline``, ``TRACKIO_DIR``).
"""

from __future__ import annotations

import importlib
import sys
import uuid
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

from coprs_deploy.artifacts import write_text
from coprs_deploy.errors import import_failure, install_hint
from coprs_deploy.training.recipe import RunSettings

if TYPE_CHECKING:
    from accelerate import Accelerator

PROJECT = "coprs-deploy"
"""Project in Weights & Biases and trackio."""

ID_FILE = "tracker_id"

REWOUND = "tensorboard"
"""Tracker that forgets the steps after which a run resumes."""

MODULES = {
    "tensorboard": ("torch.utils.tensorboard", install_hint("train")),
    "wandb": ("wandb", install_hint("track")),
    # No extra: trackio 0.43 refuses the Pillow that this package is tested with.
    "trackio": ("trackio", "pip install trackio"),
}
"""Module of each tracker, and the command that installs it."""


def require_trackers(names: Sequence[str]) -> None:
    """Check that the packages of some trackers are installed.

    Raises:
        MissingDependencyError: one is not.
    """
    for name in names:
        module, hint = MODULES[name]
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise import_failure(error, "", hint, needed_by=f"report_to = {name!r}") from error


def open_trackers(
    accelerator: Accelerator, run: Path, recipe: RunSettings, first_step: int
) -> None:
    """Open the trackers of ``report_to``, which continue those of an earlier part of the run.

    Raises:
        ValueError: a tracker does not start.
    """
    from accelerate import tracking

    identity, name = _identity(run), run.resolve().name
    config = recipe.to_json()
    for tracker in recipe.report_to:
        if tracker == "tensorboard":
            built = tracking.TensorBoardTracker(tracker, str(run), purge_step=first_step)
        elif tracker == "wandb":
            built = tracking.WandBTracker(
                PROJECT, id=identity, name=name, dir=str(run), resume="allow", config=config
            )
        else:  # trackio finds a run by its name
            built = tracking.TrackioTracker(
                PROJECT, name=f"{name}-{identity}", resume="allow", config=config, embed=False
            )
        try:
            with redirect_stdout(sys.stderr):  # stdout is for the result of the command
                built.start()
        except Exception as error:
            raise ValueError(
                f"report_to has {tracker!r}, which does not start: {error}; log in to it, set "
                "WANDB_MODE=offline for Weights & Biases, or leave it out"
            ) from error
        accelerator.trackers.append(built)


def close_trackers(accelerator: Accelerator) -> None:
    """Send what is left, and close the trackers."""
    with redirect_stdout(sys.stderr):
        accelerator.end_training()


def log_curves(
    accelerator: Accelerator, values: Mapping[str, float], step: int, *, is_repeated: bool
) -> None:
    """Send values to all trackers; repeated ones only to those that were rewound."""
    for tracker in accelerator.trackers:
        if tracker.name == REWOUND or not is_repeated:
            tracker.log(dict(values), step=step)


def _identity(run: Path) -> str:
    """Return the id of a run, written at its start."""
    file = run / ID_FILE
    if not file.is_file():
        write_text(file, uuid.uuid4().hex[:8])
    return file.read_text(encoding="utf-8")
