"""The folder of a run: what it was told to do, what came of it, and where to go on.

recipe.json            every setting, resolved
environment.json       versions, machine, commit
log.jsonl              one line a logged step
tensorboard/           the same as curves
scenes/                pictures, unless they are kept elsewhere
phases/NAME/state-N/   weights, optimizers and position after N steps
phases/NAME/result.json, weights.pt
checkpoint/            the finished model
report.json, report.md, plots/
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from coprs_deploy.artifacts import atomic_write, exclusive, write_json
from coprs_deploy.machine import environment
from coprs_deploy.training.recipe import Recipe, changed_keys

RECIPE_FILE = "recipe.json"
LOG_FILE = "log.jsonl"
LOCK_FILE = ".lock"
RESULT_FILE = "result.json"
WEIGHTS_FILE = "weights.pt"
PROGRESS_FILE = "progress.json"
REPORT_FILE = "report.json"
CHECKPOINT_FOLDER = "checkpoint"

FREE_KEYS = ("description", "logging_steps", "save_steps", "threads", "workers")
"""Settings that a resumed run may change: they move no weight but by rounding."""


class RunDirectory:
    """Paths and small files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other runs out of the folder; a process that dies lets go of it.

        Raises:
            ArtifactError: another process trains in it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        taken = (
            f"another process trains in {self.path}; wait for it, stop it, or choose another "
            "folder with --out"
        )
        with exclusive(self.path / LOCK_FILE, taken):
            yield

    def open(self, recipe: Recipe) -> bool:
        """Start the folder, or find the run in it that goes on.

        Returns:
            Whether there is one.

        Raises:
            ValueError: another recipe's run lies there.
        """
        file = self.path / RECIPE_FILE
        if not file.is_file():
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self.path / "environment.json", environment())
            write_json(file, recipe.to_json())
            return False
        found = Recipe.from_json(json.loads(file.read_text(encoding="utf-8")))
        changed = [key for key in changed_keys(found, recipe) if key not in FREE_KEYS]
        if changed:
            raise ValueError(
                f"{self.path} holds a run with other settings ({', '.join(changed[:5])}); "
                "choose another folder with --out, or remove this one"
            )
        return True

    def phase(self, name: str) -> Path:
        """Return the folder of a phase."""
        return self.path / "phases" / name

    def phase_result(self, name: str) -> dict[str, Any] | None:
        """Read what a finished phase came to."""
        file = self.phase(name) / RESULT_FILE
        if not file.is_file():
            return None
        result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return result

    def latest_state(self, name: str) -> tuple[Path, dict[str, Any]] | None:
        """Find the last complete state of a phase with its progress."""
        found = []
        for state in self.phase(name).glob("state-*"):
            if (state / PROGRESS_FILE).is_file():
                progress = json.loads((state / PROGRESS_FILE).read_text(encoding="utf-8"))
                found.append((progress["step"], state, progress))
        if not found:
            return None
        _, state, progress = max(found, key=lambda item: item[0])
        return state, progress

    def commit_state(self, name: str, partial: Path, progress: dict[str, Any]) -> None:
        """Make a written state the one to go on from; older ones are removed."""
        write_json(partial / PROGRESS_FILE, progress)
        for path in partial.rglob("*"):
            if path.is_file():
                descriptor = os.open(path, os.O_RDONLY)
                os.fsync(descriptor)
                os.close(descriptor)
        final = self.phase(name) / f"state-{progress['step']:06d}"
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for state in self.phase(name).glob("state-*"):
            if state != final:
                shutil.rmtree(state)

    def finish_phase(self, name: str, result: dict[str, Any]) -> None:
        """Record a phase's result, last of all its files, and drop its states."""
        write_json(self.phase(name) / RESULT_FILE, result)
        for state in self.phase(name).glob("*state-*"):
            shutil.rmtree(state)

    def log(self, line: dict[str, Any]) -> None:
        """Append a line to the log."""
        with (self.path / LOG_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def read_log(self) -> list[dict[str, Any]]:
        """Read the log; a last line that was cut short is left out."""
        file = self.path / LOG_FILE
        if not file.is_file():
            return []
        lines = []
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return lines

    def rewind_log(self, phase: str, step: int) -> None:
        """Drop what was logged after the state that a run goes on from."""
        kept = [x for x in self.read_log() if x["phase"] != phase or x["step"] <= step]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        with atomic_write(self.path / LOG_FILE) as partial:
            partial.write_text(text, encoding="utf-8")


def all_passed(results: dict[str, Any]) -> bool:
    """Say whether every gate of every phase was reached."""
    gates = (gate for result in results.values() for gate in result["gates"].values())
    return all(gate["passed"] for gate in gates)


def read_report(path: Path) -> dict[str, Any]:
    """Read the report of a finished run."""
    report: dict[str, Any] = json.loads((path / REPORT_FILE).read_text(encoding="utf-8"))
    return report
