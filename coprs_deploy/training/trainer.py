"""Training loop of a stage, run by accelerate: any number of processes, resumable at any step."""

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
from coprs_deploy.training.optim import build_optimizers, lr_factor, set_lr_factor
from coprs_deploy.training.recipe import RunSettings
from coprs_deploy.training.run_directory import WEIGHTS_FILE, RunDirectory
from coprs_deploy.training.stage import StageOutput, TrainingStage, reduce_means
from coprs_deploy.training.state import TrainingState

if TYPE_CHECKING:
    from accelerate import Accelerator


class Trainer:
    """Runs stages one after the other on one training state.

    Args:
        accelerator: processes, device and precision.
        recipe: intervals of logging and saving, seed and workers.
        directory: run directory.
        state: the model.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        recipe: RunSettings,
        directory: RunDirectory,
        state: TrainingState,
    ) -> None:
        self._accelerator = accelerator
        self._recipe = recipe
        self._directory = directory
        self._state = state
        self._steps_before = 0

    def run(self, stage: TrainingStage[Any]) -> dict[str, Any]:
        """Run a stage to its end, from its last saved state if there is one.

        Returns:
            Its result: final metrics, thresholds, seconds.
        """
        result = self._directory.stage_result(stage.name)
        weights = self._directory.stage(stage.name) / WEIGHTS_FILE
        if result is not None:
            self._state.load_state_dict(torch.load(weights, weights_only=True))
        else:
            result = self._train(stage)
        self._steps_before += stage.settings.max_steps
        return result

    def _train(self, stage: TrainingStage[Any]) -> dict[str, Any]:
        accelerator, settings = self._accelerator, stage.settings
        torch.manual_seed(self._recipe.seed)
        saved = self._directory.latest_state(stage.name)
        init_metrics = stage.prepare(accelerator) if saved is None else saved[1]["init_metrics"]
        objective, *optimizers = accelerator.prepare(
            stage.objective, *build_optimizers(stage.objective, settings.optimizer)
        )
        first_step, seconds = 0, 0.0
        if saved is not None:
            accelerator.load_state(str(saved[0]))
            first_step, seconds = saved[1]["step"], saved[1]["seconds"]
        if accelerator.is_main_process:
            self._directory.stage(stage.name).mkdir(parents=True, exist_ok=True)
            self._directory.rewind_log(stage.name, first_step)
        clock = _Clock(seconds)
        objective.train()
        ranks = (accelerator.process_index, accelerator.num_processes)
        batches = step_batches(stage, first_step, *ranks, self._recipe.num_workers)
        for step, batch in enumerate(batches, start=first_step):
            factor = lr_factor(settings.optimizer, step, settings.max_steps)
            output = self._step(stage, objective, optimizers, batch, factor)
            done = step + 1
            is_last = done == settings.max_steps
            if done % self._recipe.logging_steps == 0 or is_last:
                self._log(stage, done, factor, output, clock)
            if settings.eval_steps and done % settings.eval_steps == 0 and not is_last:
                self._evaluate(stage, done, clock)
                objective.train()
            if done % self._recipe.save_steps == 0 and not is_last:
                self._save(stage.name, done, clock.seconds(), init_metrics)
        metrics = self._evaluate(stage, settings.max_steps, clock)
        result = _result(stage, metrics, init_metrics, clock.seconds())
        self._finish(stage.name, result)
        return result

    def _step(
        self,
        stage: TrainingStage[Any],
        objective: torch.nn.Module,
        optimizers: list[Any],
        batch: Any,
        factor: float,
    ) -> StageOutput:
        """Update the weights once."""
        from accelerate.utils import send_to_device

        accelerator = self._accelerator
        set_lr_factor(optimizers, factor)
        output: StageOutput = objective(send_to_device(batch, accelerator.device))
        loss = self._total_loss(output.losses, stage.loss_coefficients(factor))
        accelerator.backward(loss)
        trained = [p for o in optimizers for group in o.param_groups for p in group["params"]]
        accelerator.clip_grad_norm_(trained, stage.settings.optimizer.max_grad_norm)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return output

    def _total_loss(self, losses: dict[str, Mean], coefficients: dict[str, float]) -> Tensor:
        """Add the losses as means over the batch of all processes, in the order of their names.

        Gradients are averaged over the processes, hence the factor ``num_processes``.
        """
        names = sorted(losses)
        weights = torch.stack([losses[name].weight for name in names])
        weights = self._accelerator.reduce(weights, "sum").clamp(min=1e-12)
        factors = torch.tensor(
            [loss_coefficient(name, coefficients) for name in names], device=weights.device
        )
        totals = torch.stack([losses[name].total for name in names])
        total: Tensor = (factors * totals / weights).sum() * self._accelerator.num_processes
        return total

    def _log(
        self,
        stage: TrainingStage[Any],
        step: int,
        factor: float,
        output: StageOutput,
        clock: _Clock,
    ) -> None:
        losses = reduce_means(self._accelerator, _detached(output.losses))
        metrics = reduce_means(self._accelerator, _detached(output.metrics))
        coefficients = stage.loss_coefficients(factor)
        total = sum(loss_coefficient(name, coefficients) * value for name, value in losses.items())
        if not self._accelerator.is_main_process:
            return
        line = {"loss": total, **{f"loss/{k}": v for k, v in losses.items()}, **metrics}
        seconds = clock.seconds()
        self._write(stage.name, step, seconds, line, lr_factor=factor)
        max_steps = stage.settings.max_steps
        left = seconds / max(1, step) * (max_steps - step)
        _print(
            f"{stage.name:<14} {step:>6}/{max_steps}  loss {total:8.4f}  "
            f"{seconds / 60:6.1f} min, {left / 60:.1f} left"
        )

    def _evaluate(self, stage: TrainingStage[Any], step: int, clock: _Clock) -> dict[str, float]:
        """Evaluate the current weights and log the metrics."""
        metrics = stage.evaluate(self._accelerator, stage.settings.num_eval_examples)
        if self._accelerator.is_main_process:
            line = {f"eval/{k}": v for k, v in metrics.items()}
            self._write(stage.name, step, clock.seconds(), line)
            shown = "  ".join(f"{k} {v:.3f}" for k, v in metrics.items() if "." not in k)
            _print(f"{stage.name:<14} {step:>6} eval: {shown}")
        return metrics

    def _write(
        self, stage: str, step: int, seconds: float, line: Mapping[str, float], **position: float
    ) -> None:
        """Write a line to the log of the run and to TensorBoard."""
        position = {"step": step, **position, "seconds": seconds}
        self._directory.log({"stage": stage, **position, **line})
        self._accelerator.log(
            {f"{stage}/{k}": v for k, v in line.items()}, step=self._steps_before + step
        )

    def _save(self, stage: str, step: int, seconds: float, init_metrics: dict[str, float]) -> None:
        """Write a state under a temporary name, then rename it."""
        accelerator = self._accelerator
        partial = self._directory.stage(stage) / f".state-{step:06d}"
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(partial), safe_serialization=False)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            progress = {"step": step, "seconds": seconds, "init_metrics": init_metrics}
            self._directory.commit_state(stage, partial, progress)
        accelerator.wait_for_everyone()

    def _finish(self, stage: str, result: dict[str, Any]) -> None:
        accelerator = self._accelerator
        if accelerator.is_main_process:
            torch.save(self._state.state_dict(), self._directory.stage(stage) / WEIGHTS_FILE)
            self._directory.finish_stage(stage, result)
        accelerator.wait_for_everyone()
        accelerator.free_memory()


class _Clock:
    """Seconds of a stage over all its runs."""

    def __init__(self, seconds_before: float) -> None:
        self._before = seconds_before
        self._start = time.perf_counter()

    def seconds(self) -> float:
        return self._before + time.perf_counter() - self._start


def loss_coefficient(name: str, coefficients: Mapping[str, float]) -> float:
    """Look up a loss by its name, then by its first part with a star (``auxiliary.*``)."""
    group = f"{name.partition('.')[0]}.*"
    assert name in coefficients or group in coefficients, f"the loss {name} has no coefficient"
    return coefficients[name] if name in coefficients else coefficients[group]


def threshold_results(
    thresholds: Mapping[str, float], metrics: Mapping[str, float]
) -> dict[str, Any]:
    """Compare the metrics of a stage with its acceptance thresholds."""
    return {
        name: {
            "required": required,
            "value": metrics.get(name),
            "passed": metrics.get(name, float("-inf")) >= required,
        }
        for name, required in thresholds.items()
    }


def _detached(means: dict[str, Mean]) -> dict[str, Mean]:
    return {name: Mean(mean.total.detach(), mean.weight.detach()) for name, mean in means.items()}


def _result(
    stage: TrainingStage[Any],
    metrics: dict[str, float],
    init_metrics: dict[str, float],
    seconds: float,
) -> dict[str, Any]:
    return {
        "steps": stage.settings.max_steps,
        "seconds": seconds,
        "metrics": metrics,
        "init_metrics": init_metrics,
        "thresholds": threshold_results(stage.settings.thresholds, metrics),
        "parameters": sum(p.numel() for p in stage.objective.parameters() if p.requires_grad),
    }


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
