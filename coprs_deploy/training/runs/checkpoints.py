"""Checkpoints that a run writes while it trains, for other processes to evaluate and export.

checkpoints/STAGE-N/    checkpoint after N steps of a stage
checkpoints/last        link to the newest one
checkpoints/best        link to the one with the best evaluation

A checkpoint is complete as soon as it has its name, and a link is replaced in one step: a program
that opens ``last`` or ``best`` (:func:`~coprs_deploy.checkpoint.read_checkpoint` resolves the link)
gets one checkpoint, which is kept as long as the program works with it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from coprs_deploy.checkpoint import without_readers

FOLDER = "checkpoints"
LAST, BEST = "last", "best"


class RunCheckpoints:
    """Checkpoints of a run; one process writes.

    ``stages`` are the names of the stages in their order; ``limit`` is the number of checkpoints
    that are kept besides the best one.
    """

    def __init__(self, run: Path, stages: Sequence[str], limit: int) -> None:
        self.path = run / FOLDER
        self._stages, self._limit = list(stages), limit
        self._written = set[Path]()

    def add(self, stage: str, step: int, link: str, write: Callable[[Path], object]) -> None:
        """Write a checkpoint, unless it was written in this step, and let a link point to it.

        Args:
            stage: name of the stage.
            step: number of its steps that the weights have had.
            link: ``last`` or ``best``.
            write: writes a checkpoint at a path that does not exist.
        """
        path = self.path / f"{stage}-{step:06d}"
        if path not in self._written:
            self.path.mkdir(parents=True, exist_ok=True)
            remove_hidden(self.path)
            new = path.with_name(f".{path.name}")
            write(new)
            if path.exists():  # from before a resume
                remove_directory(path)
            new.rename(path)
            self._written.add(path)
        self._point(link, Path(path.name))
        self._remove_old(stage, step)

    def end_with(self, path: Path) -> None:
        """Let ``last`` point to the finished checkpoint, if any was written before."""
        if self.path.is_dir():
            self._point(LAST, Path("..") / path.name)

    def target(self, link: str) -> Path | None:
        """Return the checkpoint that ``last`` or ``best`` points to; None if there is none."""
        found = self.path / link
        return self.path / found.readlink() if found.is_symlink() else None

    def _point(self, link: str, path: Path) -> None:
        """Replace a link; ``path`` is relative to the folder."""
        new = self.path / f".{link}"
        new.unlink(missing_ok=True)
        new.symlink_to(path)
        new.replace(self.path / link)

    def _remove_old(self, stage: str, step: int) -> None:
        """Remove all but the newest; what is later than this step is from before a resume."""
        now = (self._stages.index(stage), step)
        found = {position: path for path in self.path.iterdir() if (position := self._at(path))}
        newest = sorted((position for position in found if position <= now), reverse=True)
        kept = {found[position] for position in newest[: self._limit]}
        for path in set(found.values()) - kept - {self.target(LAST), self.target(BEST)}:
            with without_readers(path) as is_free:
                if is_free:  # else a later call removes it
                    remove_directory(path)

    def _at(self, path: Path) -> tuple[int, int] | None:
        """Return stage and step of a checkpoint; None for other files."""
        stage, _, step = path.name.rpartition("-")
        if stage not in self._stages or not step.isdecimal():
            return None
        return self._stages.index(stage), int(step)


def remove_directory(path: Path) -> None:
    """Remove a directory; it loses its name first, so that no reader finds a part of it."""
    hidden = path.with_name(f".{path.name}.removed")
    shutil.rmtree(hidden, ignore_errors=True)
    path.rename(hidden)
    shutil.rmtree(hidden)


def remove_hidden(folder: Path) -> None:
    """Remove what a killed process was writing or removing in a folder."""
    for path in folder.glob(".*"):
        if path.is_symlink():
            path.unlink()
        else:
            shutil.rmtree(path, ignore_errors=True)
