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
from coprs_deploy.training.checkpoints import remove_directory, remove_hidden
from coprs_deploy.training.run_directory import RunDirectory
from coprs_deploy.training.settings import StageSettings
from coprs_deploy.training.state import TrainingState

if TYPE_CHECKING:
    from accelerate import Accelerator

RESULT_FILE = "result.json"
WEIGHTS_FILE = "weights.pt"
PROGRESS_FILE = "progress.json"
BEST_FILE = "best.json"


class StageProgress:
    """Progress of a stage in its run directory; only the main process writes.

    ``stages`` are those of the recipe; the steps of earlier ones are the offset of the curves.
    ``save_total_limit`` is the number of states that are kept.
    ``state`` is the folder of the state to resume from, after ``step`` steps; None starts from the
    first step.
    """

    def __init__(
        self,
        directory: RunDirectory,
        accelerator: Accelerator,
        name: str,
        stages: Mapping[str, StageSettings],
        save_total_limit: int = 1,
    ) -> None:
        self._directory, self._accelerator, self.name = directory, accelerator, name
        self._settings = settings = stages[name]
        self._save_total_limit = save_total_limit
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
            remove_hidden(self.path)
            for partial in self.path.glob("checkpoint-*"):
                shutil.rmtree(partial)
            self._directory.rewind_log(self.name, self.kept_step)
            position = f"resumed from step {self.step}" if self.state else "from its first step"
            text = f"{self.name}: {self._settings.max_steps} steps, {position}"
            print(text, file=sys.stderr, flush=True)
        if not accelerator.trackers:
            writer = {"purge_step": self._steps_before + self.step + 1}
            accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": writer})
        accelerator.wait_for_everyone()
        self._started = time.perf_counter()

    def seconds(self) -> float:
        """Return the seconds of the stage, interrupted runs included."""
        return self._seconds_before + time.perf_counter() - self._started

    def log(self, step: int, line: Mapping[str, float], shown: str = "", **position: float) -> None:
        """Log the metrics of a step; ``position`` is written to the log and drawn as no curve."""
        if not self._accelerator.is_main_process:
            return
        seconds, max_steps = self.seconds(), self._settings.max_steps
        position = {"step": step, **position, "seconds": seconds}
        self._directory.log({"stage": self.name, **position, **line})
        curves = {f"{self.name}/{key}": value for key, value in line.items()}
        self._accelerator.log(curves, step=self._steps_before + step)
        left = seconds / max(1, step) * (max_steps - step)
        times = f"{seconds / 60:6.1f} min, {left / 60:.1f} left"
        text = f"{self.name:<14} {step:>6}/{max_steps}  {shown}  {times}"
        print(text, file=sys.stderr, flush=True)

    def log_evaluation(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Log the metrics of an evaluation, without those of single question types on stderr.

        Returns:
            Whether ``best_metric`` has its largest value in several evaluations so far.
        """
        shown = "  ".join(
            f"{name} {value:.3f}"
            for name, value in metrics.items()
            if "." not in name and not name.endswith("_stderr")
        )
        self.log(step, {f"eval/{name}": value for name, value in metrics.items()}, f"eval: {shown}")
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
            for state in states[: -self._save_total_limit]:
                remove_directory(state)
        self._accelerator.wait_for_everyone()

    def finish(
        self, state: TrainingState, metrics: dict[str, float], num_parameters: int
    ) -> dict[str, Any]:
        """Write the weights and the result of the stage, remove its states; return the result."""
        thresholds = {
            name: {
                "required": required,
                "value": metrics.get(name),
                "passed": metrics.get(name, float("-inf")) >= required,
            }
            for name, required in self._settings.thresholds.items()
        }
        result = {
            "steps": self._settings.max_steps,
            "seconds": self.seconds(),
            "metrics": metrics,
            "init_metrics": self.init_metrics,
            "best": self.best,
            "thresholds": thresholds,
            "parameters": num_parameters,
        }
        if self._accelerator.is_main_process:
            torch.save(state.state_dict(), self.path / WEIGHTS_FILE)
            write_json(self.path / RESULT_FILE, result)  # last: it marks a finished stage
            for folder in self.path.glob("state-*"):
                remove_directory(folder)
        self._accelerator.wait_for_everyone()
        return result


def saved_states(stage: Path) -> list[Path]:
    """Return the folders of the complete states of a stage, oldest first."""
    return sorted((file.parent for file in stage.glob(f"state-*/{PROGRESS_FILE}")), key=step_of)


def step_of(state: Path) -> int:
    """Return the number of steps of a state from its name."""
    return int(state.name.removeprefix("state-"))


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
