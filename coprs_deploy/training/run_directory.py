"""Run directory: settings, log, resumable states and results of one run.

recipe.json            all settings, resolved
environment.json       versions, machine, commit
log.jsonl              one line per logged step
tensorboard/           the same as curves
scenes/                rendered scenes, unless ``--scenes-dir`` names another folder
stages/NAME/state-N/   weights, optimizers and position after N steps
stages/NAME/result.json, weights.pt
checkpoint/            the finished model
report.json, report.md, plots/
"""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from coprs_deploy.artifacts import atomic_write, exclusive, write_json
from coprs_deploy.machine import environment
from coprs_deploy.training.recipe import RunSettings, changed_keys

RECIPE_FILE = "recipe.json"
LOG_FILE = "log.jsonl"
LOCK_FILE = ".lock"
REPORT_FILE = "report.json"
CHECKPOINT_FOLDER = "checkpoint"

FREE_KEYS = ("description", "logging_steps", "save_steps", "num_threads", "num_workers")
"""Settings that a resumed run may change: they change weights by rounding only."""


class RunDirectory:
    """Lock, settings and log of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def lock(self) -> AbstractContextManager[None]:
        """Lock the directory against other runs; the lock ends with the process.

        Raises:
            ArtifactError: another process trains in it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        message = (
            f"another process trains in {self.path}; wait for it, stop it, or choose another "
            "directory with --out"
        )
        return exclusive(self.path / LOCK_FILE, message)

    def open(self, recipe: RunSettings) -> bool:
        """Start a run, or find the one to resume; return whether there is one.

        Raises:
            ValueError: the directory holds a run with other settings.
        """
        file = self.path / RECIPE_FILE
        if not file.is_file():
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self.path / "environment.json", environment())
            write_json(file, recipe.to_json())
            return False
        before = json.loads(file.read_text(encoding="utf-8"))
        changed = [k for k in changed_keys(before, recipe.to_json()) if k not in FREE_KEYS]
        if changed:
            raise ValueError(
                f"{self.path} holds a run with other settings ({', '.join(changed[:5])}); "
                "choose another directory with --out, or remove this one"
            )
        return True

    def stage(self, name: str) -> Path:
        """Return the folder of a stage."""
        return self.path / "stages" / name

    def log(self, line: dict[str, Any]) -> None:
        """Append a line to the log."""
        with (self.path / LOG_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def read_log(self) -> list[dict[str, Any]]:
        """Read the log without a truncated line."""
        file = self.path / LOG_FILE
        if not file.is_file():
            return []
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def rewind_log(self, stage: str, step: int) -> None:
        """Remove the lines after the step that a stage resumes from."""
        kept = [x for x in self.read_log() if x["stage"] != stage or x["step"] <= step]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        with atomic_write(self.path / LOG_FILE) as partial:
            partial.write_text(text, encoding="utf-8")


def all_passed(results: dict[str, Any]) -> bool:
    """Return whether every stage reached all its thresholds."""
    thresholds = (item for result in results.values() for item in result["thresholds"].values())
    return all(threshold["passed"] for threshold in thresholds)


def read_report(path: Path) -> dict[str, Any]:
    """Read the report of a finished run."""
    report: dict[str, Any] = json.loads((path / REPORT_FILE).read_text(encoding="utf-8"))
    return report
