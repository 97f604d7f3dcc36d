"""Run directory: settings, log, resumable states and results of one run.

recipe.json            all settings, resolved
inputs.json            contents of data and checkpoint that the run started from, as hashes
environment.json       versions, machine, commit
log.jsonl              one line per logged step
tensorboard/           the same as curves
scenes/                rendered scenes, unless ``--scenes-dir`` names another folder
stages/NAME/state-N/   weights, optimizers and position after N steps
stages/NAME/result.json, weights.pt
checkpoints/           checkpoints while it runs, with links ``last`` and ``best``
checkpoint/            the finished model
report.json, report.md, plots/
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from coprs_deploy.artifacts import atomic_write, exclusive, make_directory, write_json, write_text
from coprs_deploy.checkpoint import Checkpoint
from coprs_deploy.machine import environment
from coprs_deploy.training.recipe import RunSettings, changed_keys

RECIPE_FILE = "recipe.json"
LOG_FILE = "log.jsonl"
LOCK_FILE = ".lock"
LOGGED_FILE = "last_logged_step"
REPORT_FILE = "report.json"
CHECKPOINT_FOLDER = "checkpoint"

INPUTS_FILE = "inputs.json"

FREE_KEYS = (
    *("description", "logging_steps", "save_steps", "save_dtype"),
    *("save_total_limit", "report_to"),
    *("num_threads", "num_workers", "model.gradient_checkpointing", "model.policy", "model.sam"),
    # Compared by content: see RunDirectory.check_inputs.
    *("model.path", "model.init_from", "data.training", "data.held_out", "data.features"),
)
"""Settings that a resumed run may change."""

FREE_STAGE_KEYS = (
    *("max_steps", "eval_steps", "num_eval_examples", "thresholds", "num_completions_to_print"),
    *("best_metric", "per_device_train_batch_size", "max_targets", "allow_missing_responses"),
    *("vllm_gpu_memory_utilization", "vllm_enable_sleep_mode"),
    *("vllm_server_host", "vllm_server_port"),
)
"""Settings of a stage that a resumed run may change."""

SETTINGS_SHOWN = 5
"""Number of changed settings that an error shows with their values."""


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

    def open(self, recipe: RunSettings) -> bool:
        """Start a run, or find the one to resume; return whether there is one.

        Raises:
            ValueError: the directory holds a run with other settings.
        """
        file = self.path / RECIPE_FILE
        if not file.is_file():
            make_directory(self.path)
            write_json(self.path / "environment.json", environment())
            write_json(file, recipe.to_json())
            return False
        before, now = json.loads(file.read_text(encoding="utf-8")), recipe.to_json()
        changed = changed_keys(before, now)
        refused = {key: values for key, values in changed.items() if not _is_free(key)}
        if refused and self.has_progress():
            raise ValueError(_describe_refused(self.path, refused))
        if changed:
            write_json(file, now)
        return True

    def check_inputs(self, inputs: dict[str, Any]) -> None:
        """Record the contents of data and checkpoint at the start; later ones must be equal.

        Raises:
            ValueError: the run started from other data or another checkpoint.
        """
        file = self.path / INPUTS_FILE
        if not (file.is_file() and self.has_progress()):
            write_json(file, inputs)
            return
        before = json.loads(file.read_text(encoding="utf-8"))
        if changed := [
            f"{name} (was: {before.get(name)}; now: {inputs.get(name)})"
            for name in sorted(before.keys() | inputs.keys())
            if before.get(name) != inputs.get(name)
        ]:
            raise ValueError(
                f"{self.path} holds a run with other contents of {', '.join(changed)}; restore "
                "them, or choose another directory with --out"
            )

    def check_start(self, checkpoint: Checkpoint) -> str:
        """Return the fingerprint of the checkpoint that the run started from.

        Raises:
            ValueError: it is another one.
        """
        found = checkpoint.fingerprint()
        file = self.path / INPUTS_FILE
        recorded = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if recorded.get("model.path", found) != found:
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


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Read JSON lines without a truncated one; none if there is no file."""
    if not file.is_file():
        return []
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def rewind_lines(file: Path, is_kept: Callable[[dict[str, Any]], bool]) -> None:
    """Remove lines of a file of JSON lines."""
    kept = [line for line in read_lines(file) if is_kept(line)]
    with atomic_write(file) as partial:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept)
        partial.write_text(text, encoding="utf-8")


def _describe_refused(path: Path, refused: Mapping[str, tuple[object, object]]) -> str:
    """Name settings of a run that a resumed run may not change, and how to keep them."""
    shown = [f"{key} (was: {old}; now: {new})" for key, (old, new) in refused.items()]
    hidden = len(shown) - SETTINGS_SHOWN
    names = ", ".join(shown[:SETTINGS_SHOWN]) + (f" and {hidden} more" if hidden > 0 else "")
    advice = "choose another directory with --out, or remove this one"
    if hidden <= 0 and all(value is not None for values in refused.values() for value in values):
        texts = (
            f"{key}={old if isinstance(old, str) else json.dumps(old)}"
            for key, (old, _) in refused.items()
        )
        keep = " ".join(f"--set {shlex.quote(text)}" for text in texts)
        advice = f"to resume it, add {keep}; to start another run, {advice}"
    return f"{path} holds a run with other settings: {names}; {advice}"


def _is_free(key: str) -> bool:
    """Whether a resumed run may change a dotted key."""
    parts = key.split(".")
    is_of_stage = parts[0] == "stages" and len(parts) > 2
    return key in FREE_KEYS or (is_of_stage and parts[2] in FREE_STAGE_KEYS)


def all_passed(results: dict[str, Any]) -> bool:
    """Return whether every stage reached all its thresholds."""
    thresholds = (item for result in results.values() for item in result["thresholds"].values())
    return all(threshold["passed"] for threshold in thresholds)


def read_report(path: Path) -> dict[str, Any]:
    """Read the report of a finished run."""
    report: dict[str, Any] = json.loads((path / REPORT_FILE).read_text(encoding="utf-8"))
    return report
