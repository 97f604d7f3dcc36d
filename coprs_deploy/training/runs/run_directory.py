"""Run directory: settings, log, resumable states and results of one run.

recipe.json            all settings, resolved
inputs.json            contents of data and checkpoint that the run started from, as hashes
rows.json              id and hash of each example of the data on disk
images.json            size and content of each decoded image, for the next check
environment.json       versions, machine, commit of the last start
log.jsonl              one line per logged step
tensorboard/           the same as curves
scenes/                rendered scenes, unless ``--scenes-dir`` names another folder
stages/NAME/state-N/   weights, optimizers and position after N steps
stages/NAME/result.json, weights.pt
checkpoints/           checkpoints while it runs, with links ``last`` and ``best``
checkpoint/            the finished model
report.md, plots/       metrics so far, curves, examples; rewritten at each evaluation and at a stop
report.json            metrics of the finished run
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from coprs_deploy.artifacts import atomic_write, exclusive, make_directory, write_json, write_text
from coprs_deploy.checkpoint import Checkpoint
from coprs_deploy.machine import environment
from coprs_deploy.training.recipe import RunSettings, changed_keys
from coprs_deploy.training.runs.resume import (
    Change,
    Rows,
    describe_changes,
    describe_content,
    is_allowed,
    schedule_notes,
    sort_changes,
)

RECIPE_FILE = "recipe.json"
LOG_FILE = "log.jsonl"
LOCK_FILE = ".lock"
LOGGED_FILE = "last_logged_step"
REPORT_FILE = "report.json"
CHECKPOINT_FOLDER = "checkpoint"

INPUTS_FILE = "inputs.json"
ROWS_FILE = "rows.json"
IMAGES_FILE = "images.json"
ENVIRONMENT_FILE = "environment.json"


class RunDirectory:
    """Lock, settings and log of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def lock(self) -> AbstractContextManager[None]:
        """Lock the directory against other runs; the lock ends with the process.

        Raises:
            ArtifactError: another process trains in it.
        """
        make_directory(self.path)
        message = (
            f"another process trains in {self.path}; wait for it, stop it, or choose another "
            "directory with --out"
        )
        return exclusive(self.path / LOCK_FILE, message)

    def open(self, recipe: RunSettings, allowed: Sequence[str] = ()) -> list[str]:
        """Start a run, or find the one to resume; changes of settings and code are logged.

        Args:
            recipe: the recipe.
            allowed: keys whose change is accepted though it changes the training.

        Returns:
            Lines about what changed, for people.

        Raises:
            ValueError: the directory holds a run with other settings.
        """
        file = self.path / RECIPE_FILE
        if not (file.is_file() and self.has_progress()):
            make_directory(self.path)
            write_json(self.path / ENVIRONMENT_FILE, environment())
            write_json(file, recipe.to_json())
            return []
        before, changes = _read_json(file), self.changed_settings(recipe, allowed)
        code = changed_keys(_read_json(self.path / ENVIRONMENT_FILE), now := environment())
        found = changes | {f"environment.{key}": each for key, each in code.items()}
        position = self.position(list(recipe.all_stages()))
        notes = self._record(found, position) + schedule_notes(before, recipe, position)
        write_json(self.path / ENVIRONMENT_FILE, now)
        write_json(file, recipe.to_json())
        return notes

    def changed_settings(
        self, recipe: RunSettings, allowed: Sequence[str] = ()
    ) -> dict[str, Change]:
        """Return the settings that a resumed run changes.

        Raises:
            ValueError: one of them must not change.
        """
        file = self.path / RECIPE_FILE
        if not (file.is_file() and self.has_progress()):
            return {}
        changes = sort_changes(_read_json(file), recipe, allowed)
        if changes.refused or changes.fixed:
            raise ValueError(
                f"{self.path} holds a run with other settings: {describe_changes(changes)}"
            )
        return changes.accepted

    def changed_inputs(
        self, inputs: dict[str, Any], rows: Mapping[str, Rows], allowed: Sequence[str] = ()
    ) -> dict[str, str]:
        """Describe the contents of data and checkpoint that differ from those at the start.

        Args:
            inputs: hash of each content by key of the recipe.
            rows: id and hash of each example of the sets on disk.
            allowed: keys whose contents may change.

        Raises:
            ValueError: a content must not change.
        """
        file, rows_file = self.path / INPUTS_FILE, self.path / ROWS_FILE
        if not (file.is_file() and self.has_progress()):
            return {}
        before = _read_json(file)
        known = _read_json(rows_file) if rows_file.is_file() else {}
        changed = {
            key: describe_content(key, before, inputs, known, rows)
            for key in sorted(before.keys() | inputs.keys())
            if before.get(key) != inputs.get(key)
        }
        if refused := [key for key in changed if not is_allowed(key, allowed)]:
            allow = " ".join(f"--allow-change {key}" for key in refused)
            contents = "; ".join(f"{key}: {changed[key]}" for key in refused)
            raise ValueError(
                f"{self.path} holds a run with other contents of {contents}; restore them, add "
                f"{allow} to train on with the new ones, which the log records, or choose another "
                "directory with --out"
            )
        return changed

    def check_inputs(
        self,
        inputs: dict[str, Any],
        rows: Mapping[str, Rows],
        stages: Sequence[str],
        allowed: Sequence[str] = (),
    ) -> list[str]:
        """Record the contents of data and checkpoint at the start; later ones must be equal.

        Args:
            inputs: hash of each content by key of the recipe.
            rows: id and hash of each example of the sets on disk.
            stages: names of the stages in their order.
            allowed: keys whose contents may change.

        Returns:
            Lines about what changed, for people.

        Raises:
            ValueError: the run started from other data or another checkpoint.
        """
        changed = self.changed_inputs(inputs, rows, allowed)
        notes = self._record(changed, self.position(stages))
        write_json(self.path / ROWS_FILE, dict(rows))
        write_json(self.path / INPUTS_FILE, inputs)
        return notes

    def position(self, stages: Sequence[str]) -> tuple[str, int] | None:
        """Return the stage that resumes and the steps of its newest state; None at the end."""
        for name in stages:
            if not (self.stage(name) / "result.json").is_file():
                states = self.stage(name).glob("state-*")
                steps = [int(path.name.removeprefix("state-")) for path in states]
                return name, max(steps, default=0)
        return None

    def _record(
        self, changes: Mapping[str, Change | str], position: tuple[str, int] | None
    ) -> list[str]:
        """Write changes to the log, and return them as lines."""
        if not changes:
            return []
        stage, step = position or ("", 0)
        self.log({"stage": stage, "step": step, "changed": dict(changes)})
        return [
            f"changed: {key} {each if isinstance(each, str) else f'was {each[0]}, is {each[1]}'}"
            for key, each in changes.items()
        ]

    def check_start(self, checkpoint: Checkpoint, key: str = "model.path") -> str:
        """Return the fingerprint of the checkpoint that the run started from.

        ``key`` is the key of the recipe that names it.

        Raises:
            ValueError: it is another one.
        """
        found = checkpoint.fingerprint()
        file = self.path / INPUTS_FILE
        recorded = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if recorded.get(key, found) != found:
            raise ValueError(
                f"{self.path} started from another checkpoint than {checkpoint.path} is now; "
                "restore it"
            )
        return found

    def has_progress(self) -> bool:
        """Return whether a stage has a state or is finished."""
        patterns = ("stages/*/state-*", "stages/*/result.json")
        return any(any(self.path.glob(pattern)) for pattern in patterns)

    def stage(self, name: str) -> Path:
        """Return the folder of a stage."""
        return self.path / "stages" / name

    def log(self, line: dict[str, Any]) -> None:
        """Append a line to the log."""
        with (self.path / LOG_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def read_log(self) -> list[dict[str, Any]]:
        """Read the log without a truncated line."""
        return read_lines(self.path / LOG_FILE)

    def rewind_log(self, stage: str, step: int) -> int:
        """Remove the lines after the step that a stage resumes from; -1 removes all of it.

        Returns:
            The last step that the log ever had of the stage, which resumes may repeat; 0 for none.
        """
        file = self.stage(stage) / LOGGED_FILE
        last = int(file.read_text(encoding="utf-8")) if file.is_file() else 0
        steps = [line["step"] for line in self.read_log() if line["stage"] == stage]
        last = int(max([last, *steps]))
        make_directory(file.parent)
        write_text(file, str(last))
        rewind_lines(
            self.path / LOG_FILE, lambda line: line["stage"] != stage or line["step"] <= step
        )
        return last


def _read_json(file: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return data


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Read JSON lines without a truncated one; none if there is no file."""
    if not file.is_file():
        return []
    # Bytes: a text may contain other characters that split lines, such as U+2028.
    lines = file.read_bytes().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def rewind_lines(file: Path, is_kept: Callable[[dict[str, Any]], bool]) -> None:
    """Remove lines of a file of JSON lines."""
    kept = [line for line in read_lines(file) if is_kept(line)]
    with atomic_write(file) as partial:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept)
        partial.write_text(text, encoding="utf-8")


def threshold_results(
    required: Mapping[str, float], metrics: Mapping[str, float]
) -> dict[str, dict[str, Any]]:
    """Compare metrics with their thresholds; one that was not measured fails."""
    return {
        name: {
            "required": value,
            "value": metrics.get(name),
            "passed": metrics.get(name, float("-inf")) >= value,
        }
        for name, value in required.items()
    }


def all_passed(results: dict[str, Any]) -> bool:
    """Return whether every stage reached all its thresholds."""
    thresholds = (item for result in results.values() for item in result["thresholds"].values())
    return all(threshold["passed"] for threshold in thresholds)


def read_report(path: Path) -> dict[str, Any]:
    """Read the report of a finished run."""
    report: dict[str, Any] = json.loads((path / REPORT_FILE).read_text(encoding="utf-8"))
    return report
