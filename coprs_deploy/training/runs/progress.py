"""Progress of one stage: resume point, clock, log lines, saved states and result.

Shared by :class:`~coprs_deploy.training.trainer.Trainer` and the GRPO stage.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from coprs_deploy.artifacts import atomic_write, write_json
from coprs_deploy.machine import peak_memory_bytes
from coprs_deploy.training.recipe import RunSettings
from coprs_deploy.training.runs.checkpoints import FOLDER, remove_directory, remove_hidden
from coprs_deploy.training.runs.diagnostics import Diagnostics
from coprs_deploy.training.runs.run_directory import RunDirectory, threshold_results
from coprs_deploy.training.runs.step_line import evaluation_text, progress_text, step_text
from coprs_deploy.training.runs.trackers import log_curves, open_trackers
from coprs_deploy.training.settings import StageSettings
from coprs_deploy.training.state import TrainingState

if TYPE_CHECKING:
    from accelerate import Accelerator

RESULT_FILE = "result.json"
WEIGHTS_FILE = "weights.pt"
PROGRESS_FILE = "progress.json"
BEST_FILE = "best.json"

REFERENCE = "reference"
"""Folder of the initial weights of a GRPO stage, from which its frozen reference is loaded."""


class StageProgress:
    """Progress of a stage in its run directory; only the main process writes.

    The steps of earlier stages of the recipe are the offset of the curves.
    ``state`` is the folder of the state to resume from, after ``step`` steps; None starts from the
    first step.
    """

    def __init__(
        self,
        directory: RunDirectory,
        accelerator: Accelerator,
        name: str,
        recipe: RunSettings,
    ) -> None:
        self._directory, self._accelerator, self.name = directory, accelerator, name
        stages = recipe.all_stages()
        self._settings = settings = stages[name]
        self._recipe = recipe
        earlier = takewhile(lambda each: each != name, stages)
        self._steps_before = sum(stages[each].max_steps for each in earlier)
        self.path = directory.stage(name)
        self.state: Path | None = None
        self.step, self.init_metrics, self._seconds_before = 0, dict[str, float](), 0.0
        if states := saved_states(self.path):
            self.state = states[-1]
            saved = json.loads((self.state / PROGRESS_FILE).read_text(encoding="utf-8"))
            self.step, self.init_metrics = saved["step"], saved["init_metrics"]
            self._seconds_before = saved["seconds"]
        self.best: dict[str, float] = {}
        if (best := self.path / BEST_FILE).is_file():
            saved = json.loads(best.read_text(encoding="utf-8"))
            self.best = saved if saved["step"] <= self.step else {}
        if self.step > settings.max_steps:
            raise ValueError(
                f"stages.{name}.max_steps is {settings.max_steps}, and {self.state} has "
                f"{self.step} steps; accepted: {self.step} (ends the stage with it) or more"
            )
        self._diagnostics = Diagnostics(name, settings)
        self._sent_step = 0
        self._started = time.perf_counter()

    @property
    def kept_step(self) -> int:
        """Last step of what a resumed run keeps in its logs; -1 keeps nothing."""
        return self.step if self.state else -1

    def start(self) -> None:
        """Remove incomplete states, rewind the logs to the resume point, and start the clock."""
        accelerator = self._accelerator
        if accelerator.is_main_process:
            self.path.mkdir(parents=True, exist_ok=True)
            for folder in (self.path, self._directory.path / FOLDER):
                remove_hidden(folder)
            for partial in self.path.glob("checkpoint-*"):
                shutil.rmtree(partial)
            self._sent_step = self._directory.rewind_log(self.name, self.kept_step)
            position = f"resumed from step {self.step}" if self.state else "from its first step"
            _print(f"{self.name}: {self._settings.max_steps} steps, {position}")
            if not accelerator.trackers:
                first = self._steps_before + self.step + 1
                open_trackers(accelerator, self._directory.path, self._recipe, first)
        accelerator.wait_for_everyone()
        self._started = time.perf_counter()

    def seconds(self) -> float:
        """Return the seconds of the stage, interrupted runs included."""
        return self._seconds_before + time.perf_counter() - self._started

    def log(self, step: int, line: Mapping[str, float], text: str = "") -> None:
        """Log the metrics of a step: to the log, the trackers, and as one line on stderr.

        Args:
            step: number of steps so far.
            line: metrics by name.
            text: metrics as they are shown; empty for those of a step.
        """
        if not self._accelerator.is_main_process:
            return
        now, memory = self.seconds(), peak_memory()
        position = {"step": step, "seconds": now, "peak_memory_gb": memory / 1e9}
        self._directory.log({"stage": self.name, **position, **line})
        curves = {f"{self.name}/{key}": value for key, value in line.items()}
        at, is_repeated = self._steps_before + step, step <= self._sent_step
        log_curves(self._accelerator, curves, at, is_repeated=is_repeated)
        done, left = step - self.step, self._settings.max_steps - step
        times = progress_text(now - self._seconds_before, done, left, memory)
        head = f"{self.name:<10} {step:>6}/{self._settings.max_steps}"
        _print(f"{head}  {text or step_text(line)}  {times}")
        if not text:
            for warning in self._diagnostics.add(line):
                _print(f"warning: {self.name}, step {step}: {warning}")

    def log_evaluation(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Log the metrics of an evaluation.

        Returns:
            Whether ``best_metric`` has its largest value in several evaluations so far.
        """
        line = {f"eval/{name}": value for name, value in metrics.items()}
        self.log(step, line, evaluation_text(metrics))
        value = metrics.get(self._settings.best_metric, math.nan)
        best = self.best.get("value", -math.inf)
        if not self._settings.eval_steps or not value > best or step == 0:
            return False
        self.best = {"step": step, "value": value}
        return True

    def commit_best(self) -> None:
        """Record the evaluation whose checkpoint was written as the best one."""
        write_json(self.path / BEST_FILE, self.best)

    def partial_state(self, step: int) -> Path:
        """Return the folder in which all processes write a state; the name is TRL's."""
        return self.path / f"checkpoint-{step}"

    def commit(self, step: int) -> None:
        """Make a written state the one to resume from; older states are removed."""
        self._accelerator.wait_for_everyone()
        if self._accelerator.is_main_process:
            partial, final = self.partial_state(step), self.path / f"state-{step:06d}"
            saved = {"step": step, "seconds": self.seconds(), "init_metrics": self.init_metrics}
            write_json(partial / PROGRESS_FILE, saved)
            shutil.rmtree(final, ignore_errors=True)
            with atomic_write(final) as complete:
                partial.rename(complete)
            states = sorted(self.path.glob("state-*"), key=step_of)
            for state in states[: -self._recipe.save_total_limit]:
                remove_directory(state)
        self._accelerator.wait_for_everyone()

    def finish(
        self, state: TrainingState, metrics: dict[str, float], num_parameters: int
    ) -> dict[str, Any]:
        """Write the weights and the result of the stage, remove its states; return the result."""
        result = {
            "steps": self._settings.max_steps,
            "seconds": self.seconds(),
            "metrics": metrics,
            "init_metrics": self.init_metrics,
            "best": self.best,
            "thresholds": threshold_results(self._settings.thresholds, metrics),
            "parameters": num_parameters,
        }
        if self._accelerator.is_main_process:
            torch.save(state.state_dict(), self.path / WEIGHTS_FILE)
            write_json(self.path / RESULT_FILE, result)  # last: it marks a finished stage
            clear_finished(self.path)
        self._accelerator.wait_for_everyone()
        return result


def peak_memory() -> int:
    """Return the peak memory of this process in bytes: on its GPU, or resident without one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return peak_memory_bytes()


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def saved_states(stage: Path) -> list[Path]:
    """Return the folders of the complete states of a stage, oldest first."""
    return sorted((file.parent for file in stage.glob(f"state-*/{PROGRESS_FILE}")), key=step_of)


def step_of(state: Path) -> int:
    """Return the number of steps of a state from its name."""
    return int(state.name.removeprefix("state-"))


def clear_finished(stage: Path) -> None:
    """Remove what a stage needs before its end only; a run killed meanwhile leaves some of it."""
    remove_hidden(stage)
    for folder in (*stage.glob("state-*"), *stage.glob("checkpoint-*"), *stage.glob(REFERENCE)):
        remove_directory(folder)


def load_finished_stage(
    directory: RunDirectory, name: str, settings: StageSettings, state: TrainingState
) -> dict[str, Any] | None:
    """Load the weights of a finished stage; return its result, or None before its end.

    Raises:
        ValueError: it ended after another number of steps than ``max_steps``.
    """
    file = directory.stage(name) / RESULT_FILE
    if not file.is_file():
        return None
    result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if result["steps"] != settings.max_steps:
        raise ValueError(
            f"stages.{name}.max_steps is {settings.max_steps}, and the stage ended after "
            f"{result['steps']} steps; accepted: {result['steps']}; to train on, start a run in "
            f"another directory with model.path={directory.path / 'checkpoint'}"
        )
    state.load_state_dict(torch.load(file.with_name(WEIGHTS_FILE), weights_only=True))
    return result
