"""Training loop of a stage, run by accelerate: any number of processes, resumable at any step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from coprs_deploy.training.losses import Mean
from coprs_deploy.training.lr_schedule import lr_factor
from coprs_deploy.training.optim import (
    build_optimizers,
    group_settings,
    set_group_settings,
    set_lr_factor,
)
from coprs_deploy.training.runs.gallery import write_gallery
from coprs_deploy.training.runs.progress import StageProgress, load_finished_stage
from coprs_deploy.training.stage import StageOutput, TrainingStage, reduce_means
from coprs_deploy.training.state import TrainingState

if TYPE_CHECKING:
    from coprs_deploy.training.runs.run import Run


class Trainer:
    """Runs stages one after the other on one training state."""

    def __init__(self, run: Run[Any], state: TrainingState) -> None:
        self._run, self._state = run, state
        self._accelerator = run.accelerator

    def run(self, stage: TrainingStage[Any]) -> dict[str, Any]:
        """Run a stage to its end, from its last saved state if there is one; return its result."""
        directory = self._run.directory
        result = load_finished_stage(directory, stage.name, stage.settings, self._state)
        if result is None:
            result = self._train(stage)
        return result

    def _train(self, stage: TrainingStage[Any]) -> dict[str, Any]:
        accelerator, settings, recipe = self._accelerator, stage.settings, self._run.recipe
        torch.manual_seed(recipe.seed)
        progress, stop = self._run.progress(stage.name), self._run.stop
        if progress.state is None:
            progress.init_metrics = stage.prepare(accelerator)
        objective, *optimizers = accelerator.prepare(
            stage.objective, *build_optimizers(stage.objective, settings.optimizer)
        )
        if progress.state is not None:
            kept = group_settings(optimizers)
            accelerator.load_state(str(progress.state))
            set_group_settings(optimizers, kept)
        progress.start()
        objective.train()
        ranks = (accelerator.process_index, accelerator.num_processes)
        batches = step_batches(stage, progress.step, *ranks, recipe.num_workers)
        with stop.while_steps_run():
            for step, batch in enumerate(batches, start=progress.step):
                factor = lr_factor(settings.optimizer, step, settings.max_steps)
                update = self._step(stage, objective, optimizers, batch, factor)
                done = step + 1
                is_last = done == settings.max_steps
                if done % recipe.logging_steps == 0 or is_last:
                    self._log(stage, progress, done, factor, update)
                if settings.eval_steps and done % settings.eval_steps == 0 and not is_last:
                    self._evaluate(stage, progress, done)
                    objective.train()
                is_stopped = not is_last and stop.is_agreed(accelerator)
                if is_stopped or (done % recipe.save_steps == 0 and not is_last):
                    partial = str(progress.partial_state(done))
                    accelerator.save_state(partial, safe_serialization=False)
                    if not is_stopped:  # before the state: a resume from it would not write it
                        self._run.save_last(self._state, progress, done)
                    progress.commit(done)
                    if is_stopped:
                        self._run.write_report()
                        stop.exit()
        metrics = self._evaluate(stage, progress, settings.max_steps)
        num_parameters = sum(p.numel() for p in stage.objective.parameters() if p.requires_grad)
        result = progress.finish(self._state, metrics, num_parameters)
        accelerator.free_memory()
        return result

    def _evaluate(
        self, stage: TrainingStage[Any], progress: StageProgress, step: int
    ) -> dict[str, float]:
        """Evaluate, and write the checkpoint of the best weights so far."""
        metrics = stage.evaluate(self._accelerator, stage.settings.num_eval_examples)
        if progress.log_evaluation(step, metrics):
            self._run.save_best(self._state, progress)
        accelerator = self._accelerator
        if accelerator.is_main_process and accelerator.distributed_type != "FSDP":
            self._state.policy.model.eval()  # a sharded policy cannot be called by one process
            with accelerator.autocast():
                samples = stage.held_out_samples()
            self._state.policy.model.train()
            write_gallery(self._run.directory.path, stage.name, step, samples)
        if step < stage.settings.max_steps:
            self._run.write_report()
        accelerator.wait_for_everyone()
        return metrics

    def _step(
        self,
        stage: TrainingStage[Any],
        objective: torch.nn.Module,
        optimizers: list[Any],
        batch: Any,
        factor: float,
    ) -> tuple[StageOutput, Any]:
        """Update the weights once; return the output and the norm of the gradient."""
        from accelerate.utils import send_to_device

        accelerator = self._accelerator
        set_lr_factor(optimizers, factor)
        output: StageOutput = objective(send_to_device(batch, accelerator.device))
        loss = self._total_loss(output.losses, stage.loss_coefficients(factor))
        accelerator.backward(loss)
        trained = [p for o in optimizers for group in o.param_groups for p in group["params"]]
        norm = accelerator.clip_grad_norm_(
            trained, stage.settings.optimizer.max_grad_norm or math.inf
        )
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return output, norm

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
        progress: StageProgress,
        step: int,
        factor: float,
        update: tuple[StageOutput, Any],
    ) -> None:
        output, norm = update
        losses = reduce_means(self._accelerator, output.losses)
        metrics = reduce_means(self._accelerator, output.metrics)
        coefficients = stage.loss_coefficients(factor)
        total = sum(loss_coefficient(name, coefficients) * value for name, value in losses.items())
        progress.log(
            step,
            {
                "loss": total,
                **{f"loss/{k}": v for k, v in losses.items()},
                **metrics,
                "grad_norm": float(norm),
                "learning_rate": factor * stage.settings.optimizer.learning_rate,
            },
        )


def loss_coefficient(name: str, coefficients: Mapping[str, float]) -> float:
    """Look up a loss by its name, then by its first part with a star (``auxiliary.*``)."""
    group = f"{name.partition('.')[0]}.*"
    assert name in coefficients or group in coefficients, f"the loss {name} has no coefficient"
    return coefficients[name] if name in coefficients else coefficients[group]


def step_batches(
    stage: TrainingStage[Any], first_step: int, rank: int, num_ranks: int, num_workers: int
) -> Iterator[Any]:
    """Prepare the batches of the remaining steps, in order.

    A batch depends on its step alone, so the number of worker processes changes no value.
    """
    steps = range(stage.settings.max_steps)
    loader: DataLoader[Any] = DataLoader(
        steps,  # type: ignore[arg-type]
        batch_size=None,
        sampler=steps[first_step:],
        num_workers=num_workers,
        collate_fn=lambda step: stage.batch(step, rank, num_ranks),  # type: ignore[arg-type]
        # A stage holds the model: forking avoids a copy of it, which no batch needs.
        multiprocessing_context="fork" if num_workers else None,
        # Otherwise the loader's seed would be drawn from the random stream of the training.
        generator=torch.Generator(),
    )
    return iter(loader)
