"""The loop of a phase, carried by accelerate: any number of processes, resumable at any step."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from coprs_deploy.training.batches import step_batches
from coprs_deploy.training.losses import Mean
from coprs_deploy.training.optim import build_optimizers, relative_rate, set_rate
from coprs_deploy.training.recipe import Recipe
from coprs_deploy.training.run_directory import WEIGHTS_FILE, RunDirectory
from coprs_deploy.training.stage import StageOutput, TrainingStage, reduce_means
from coprs_deploy.training.state import TrainingState

if TYPE_CHECKING:
    from accelerate import Accelerator


class Trainer:
    """Runs phases one after the other on one workbench.

    Args:
        accelerator: processes, device and precision.
        recipe: how often to log and to save.
        folder: where logs and states go.
        workbench: what is trained.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        recipe: Recipe,
        folder: RunDirectory,
        workbench: TrainingState,
    ) -> None:
        self._accelerator = accelerator
        self._recipe = recipe
        self._folder = folder
        self._workbench = workbench
        self._steps_before = 0

    def run(self, phase: TrainingStage[Any]) -> dict[str, Any]:
        """Run a phase to its end, from its last state if there is one.

        Returns:
            Its result: metrics at the end, gates, seconds.
        """
        result = self._folder.phase_result(phase.name)
        weights = self._folder.phase(phase.name) / WEIGHTS_FILE
        if result is not None:
            self._workbench.load_state_dict(torch.load(weights, weights_only=True))
        else:
            result = self._train(phase)
        self._steps_before += phase.settings.steps
        return result

    def _train(self, phase: TrainingStage[Any]) -> dict[str, Any]:
        accelerator, settings = self._accelerator, phase.settings
        torch.manual_seed(self._recipe.seed)
        state = self._folder.latest_state(phase.name)
        facts = phase.prepare(accelerator) if state is None else state[1]["facts"]
        objective, *optimizers = accelerator.prepare(
            phase.objective, *build_optimizers(phase.objective, settings.optimizer)
        )
        first, seconds = 0, 0.0
        if state is not None:
            accelerator.load_state(str(state[0]))
            first, seconds = state[1]["step"], state[1]["seconds"]
        if accelerator.is_main_process:
            self._folder.phase(phase.name).mkdir(parents=True, exist_ok=True)
            self._folder.rewind_log(phase.name, first)
        clock = _Clock(seconds)
        objective.train()
        ranks = (accelerator.process_index, accelerator.num_processes)
        batches = step_batches(phase, first, *ranks, self._recipe.workers)
        for step, batch in enumerate(batches, start=first):
            relative = relative_rate(settings.optimizer, step, settings.steps)
            line = self._step(phase, objective, optimizers, batch, relative)
            done = step + 1
            is_last = done == settings.steps
            if done % self._recipe.logging_steps == 0 or is_last:
                self._log(phase, done, relative, line, clock)
            if settings.eval_steps and done % settings.eval_steps == 0 and not is_last:
                metrics = phase.evaluate(accelerator, settings.num_eval_examples)
                objective.train()
                self._log_evaluation(phase, done, metrics, clock)
            if done % self._recipe.save_steps == 0 and not is_last:
                self._save(phase.name, done, clock.seconds(), facts)
        metrics = phase.evaluate(accelerator, settings.num_eval_examples)
        self._log_evaluation(phase, settings.steps, metrics, clock)
        result = _result(phase, metrics, facts, clock.seconds())
        self._finish(phase.name, result)
        return result

    def _step(
        self,
        phase: TrainingStage[Any],
        objective: torch.nn.Module,
        optimizers: list[Any],
        batch: Any,
        relative: float,
    ) -> StageOutput:
        """Move the weights once."""
        from accelerate.utils import send_to_device

        accelerator = self._accelerator
        set_rate(optimizers, relative)
        outcome: StageOutput = objective(send_to_device(batch, accelerator.device))
        loss = self._total(outcome.losses, phase.coefficients(relative))
        accelerator.backward(loss)
        moved = [p for o in optimizers for group in o.param_groups for p in group["params"]]
        accelerator.clip_grad_norm_(moved, phase.settings.optimizer.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return outcome

    def _total(self, losses: dict[str, Mean], coefficients: dict[str, float]) -> Tensor:
        """Add up the losses as means over the batch of all processes.

        The gradient is averaged over the processes, hence the factor ``num_processes``.
        """
        names = sorted(losses)
        weights = torch.stack([losses[name].weight for name in names])
        weights = self._accelerator.reduce(weights, "sum").clamp(min=1e-12)
        factors = torch.tensor(
            [_coefficient(name, coefficients) for name in names], device=weights.device
        )
        totals = torch.stack([losses[name].total for name in names])
        total: Tensor = (factors * totals / weights).sum() * self._accelerator.num_processes
        return total

    def _log(
        self,
        phase: TrainingStage[Any],
        step: int,
        relative: float,
        outcome: StageOutput,
        clock: _Clock,
    ) -> None:
        losses = reduce_means(self._accelerator, _detached(outcome.losses))
        metrics = reduce_means(self._accelerator, _detached(outcome.metrics))
        coefficients = phase.coefficients(relative)
        total = sum(_coefficient(name, coefficients) * value for name, value in losses.items())
        if not self._accelerator.is_main_process:
            return
        line = {"loss": total, **{f"loss.{k}": v for k, v in losses.items()}, **metrics}
        seconds = clock.seconds()
        position = {"phase": phase.name, "step": step, "rate": relative, "seconds": seconds}
        self._folder.log({**position, **line})
        self._accelerator.log(
            {f"{phase.name}/{k}": v for k, v in line.items()}, step=self._steps_before + step
        )
        left = clock.seconds_a_step(step) * (phase.settings.steps - step)
        print(
            f"{phase.name:<14} {step:>6}/{phase.settings.steps}  loss {total:8.4f}  "
            f"{seconds / 60:6.1f} min, {left / 60:.1f} left",
            file=sys.stderr,
            flush=True,
        )

    def _log_evaluation(
        self, phase: TrainingStage[Any], step: int, metrics: dict[str, float], clock: _Clock
    ) -> None:
        if not self._accelerator.is_main_process:
            return
        held_out = {f"held_out.{k}": v for k, v in metrics.items()}
        self._folder.log(
            {"phase": phase.name, "step": step, "seconds": clock.seconds(), **held_out}
        )
        self._accelerator.log(
            {f"{phase.name}/{k}": v for k, v in held_out.items()}, step=self._steps_before + step
        )
        shown = "  ".join(f"{k} {v:.3f}" for k, v in metrics.items() if "." not in k)
        print(f"{phase.name:<14} {step:>6} held out: {shown}", file=sys.stderr, flush=True)

    def _save(self, phase: str, step: int, seconds: float, facts: dict[str, float]) -> None:
        """Write a state beside its place, then move it there in one go."""
        accelerator = self._accelerator
        partial = self._folder.phase(phase) / f".state-{step:06d}"
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(partial), safe_serialization=False)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            progress = {"step": step, "seconds": seconds, "facts": facts}
            self._folder.commit_state(phase, partial, progress)
        accelerator.wait_for_everyone()

    def _finish(self, phase: str, result: dict[str, Any]) -> None:
        accelerator = self._accelerator
        if accelerator.is_main_process:
            torch.save(self._workbench.state_dict(), self._folder.phase(phase) / WEIGHTS_FILE)
            self._folder.finish_phase(phase, result)
        accelerator.wait_for_everyone()
        accelerator.free_memory()


class _Clock:
    """Seconds of a phase over all its runs, and of a step in this run."""

    def __init__(self, seconds_before: float) -> None:
        self._before = seconds_before
        self._start = time.perf_counter()

    def seconds(self) -> float:
        return self._before + time.perf_counter() - self._start

    def seconds_a_step(self, step: int) -> float:
        return self.seconds() / max(1, step)


def _coefficient(name: str, coefficients: dict[str, float]) -> float:
    """Look a loss up by its name, then by its first part with a star; it counts fully if absent."""
    if name in coefficients:
        return coefficients[name]
    return coefficients.get(f"{name.split('.', maxsplit=1)[0]}.*", 1.0)


def _detached(means: dict[str, Mean]) -> dict[str, Mean]:
    return {name: Mean(mean.total.detach(), mean.weight.detach()) for name, mean in means.items()}


def _result(
    phase: TrainingStage[Any], metrics: dict[str, float], facts: dict[str, float], seconds: float
) -> dict[str, Any]:
    return {
        "steps": phase.settings.steps,
        "seconds": seconds,
        "metrics": metrics,
        "facts": facts,
        "gates": gate_results(phase.settings.gates, metrics),
        "parameters": sum(p.numel() for p in phase.objective.parameters() if p.requires_grad),
    }


def gate_results(gates: Mapping[str, float], metrics: Mapping[str, float]) -> dict[str, Any]:
    """Compare what a phase reached with what its recipe wants."""
    return {
        name: {
            "wanted": wanted,
            "found": metrics.get(name),
            "passed": metrics.get(name, float("-inf")) >= wanted,
        }
        for name, wanted in gates.items()
    }
