"""A GRPO stage of a run: training, evaluation, logging and resumable states."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PrinterCallback, TrainerCallback

from coprs_deploy.artifacts import atomic_write, write_json
from coprs_deploy.data.examples import Example
from coprs_deploy.policy.progress_bars import without_progress_bars
from coprs_deploy.prompts import REFERENCE_TOKEN
from coprs_deploy.training.batches import EpochOrder
from coprs_deploy.training.grpo.arguments import grpo_arguments, lora_config
from coprs_deploy.training.grpo.attachment import Attachment, SegmentationHead
from coprs_deploy.training.grpo.batch import PromptCollator
from coprs_deploy.training.grpo.distribution import gather_policy
from coprs_deploy.training.grpo.evaluation import evaluate_policy, summarize
from coprs_deploy.training.grpo.processor import PolicyProcessor
from coprs_deploy.training.grpo.samples import write_samples
from coprs_deploy.training.grpo.scores import ResponseReader
from coprs_deploy.training.grpo.trainer import GrpoParts, JointTrainer
from coprs_deploy.training.recipe import Recipe
from coprs_deploy.training.run_directory import WEIGHTS_FILE, RunDirectory
from coprs_deploy.training.settings import GrpoSettings
from coprs_deploy.training.state import TrainingState
from coprs_deploy.training.supervised_stage import ExampleSets
from coprs_deploy.training.trainer import threshold_results

if TYPE_CHECKING:
    from accelerate import Accelerator

REFERENCE_FOLDER = "reference"
SAMPLES_FOLDER = "samples"
HELD_OUT_FOLDER = "held_out"


@dataclass(frozen=True)
class GrpoContext:
    """Parts of a run that a GRPO stage works with.

    Attributes:
        recipe: recipe of the run.
        accelerator: accelerator of the run, with its TensorBoard tracker.
        directory: directory of the run.
        state: model with the weights that the stage starts from.
        examples: training and held-out examples.
        steps_before: steps of earlier stages, the offset of the curves.
        policy_path: transformers directory with the policy's current weights, from which the frozen
            reference is loaded; None writes one.
    """

    recipe: Recipe
    accelerator: Accelerator
    directory: RunDirectory
    state: TrainingState
    examples: ExampleSets
    steps_before: int
    policy_path: Path | None


def run_grpo_stage(name: str, settings: GrpoSettings, context: GrpoContext) -> dict[str, Any]:
    """Run a GRPO stage to its end, from its last state if there is one.

    Returns:
        Result of the stage: metrics before and after, thresholds, seconds.

    Raises:
        ValueError: settings and data do not fit together.
    """
    result = context.directory.stage_result(name)
    if result is None:
        return _GrpoStage(name, settings, context).run()
    file = context.directory.stage(name) / WEIGHTS_FILE
    context.state.load_state_dict(torch.load(file, weights_only=True))
    return result


class _GrpoStage:
    """One stage in progress."""

    def __init__(self, name: str, settings: GrpoSettings, context: GrpoContext) -> None:
        self.name = name
        self.settings = settings
        self.recipe = context.recipe
        self.accelerator = context.accelerator
        self.directory = context.directory
        self.state = context.state
        self.examples = context.examples
        self.init_metrics: dict[str, float] = {}
        held_out = context.examples.held_out
        self.held_out: list[Example] = list(
            held_out[: min(settings.num_eval_examples, len(held_out))]
        )
        self._context = context
        self._path = context.directory.stage(name)
        self._seconds_before = 0.0
        self._start = time.perf_counter()

    def run(self) -> dict[str, Any]:
        """Train, evaluate, and leave the trained weights in the training state."""
        latest = self._prepare()
        policy, tokenizer = self.state.policy.model, self.state.policy.tokenizer
        policy.config.name_or_path = str(self._context.policy_path or self._reference())
        head = SegmentationHead(self.state.segmentation)
        head.requires_grad_(self.settings.mode != "rl")
        reference_id = tokenizer.convert_tokens_to_ids(REFERENCE_TOKEN)
        attachment = Attachment(policy, head, reference_id)
        trainer = self._trainer(policy, reference_id)
        trainer.train(resume_from_checkpoint=str(latest) if latest else None)
        metrics = self.evaluate(trainer, self.settings.max_steps)
        seconds = self.seconds()
        num_trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        self._take_weights(trainer, attachment)
        result = {
            "steps": self.settings.max_steps,
            "seconds": seconds,
            "metrics": metrics,
            "init_metrics": self.init_metrics,
            "thresholds": threshold_results(self.settings.thresholds, metrics),
            "parameters": num_trainable,
        }
        if self.accelerator.is_main_process:
            torch.save(self.state.state_dict(), self._path / WEIGHTS_FILE)
            self.directory.finish_stage(self.name, result)
            shutil.rmtree(self._path / REFERENCE_FOLDER, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        return result

    def seconds(self) -> float:
        """Return the seconds of this stage, interrupted runs included."""
        return self._seconds_before + time.perf_counter() - self._start

    def evaluate(self, trainer: JointTrainer, step: int) -> dict[str, float]:
        """Evaluate the current weights on the held-out examples, and write samples."""
        evaluated = evaluate_policy(trainer, self.held_out)
        metrics = summarize(evaluated)
        if self.accelerator.is_main_process:
            directory = self.directory.path / HELD_OUT_FOLDER / self.name
            directory.mkdir(parents=True, exist_ok=True)
            rows = [each.to_json() for each in evaluated]
            write_json(directory / f"step-{step:06d}.json", {"examples": rows})
            self._write(step, {f"eval/{key}": value for key, value in metrics.items()})
            text = "  ".join(
                f"{k} {v:.3f}" for k, v in metrics.items() if not k.endswith("_stderr")
            )
            print(f"{self.name:<14} {step:>6} held out: {text}", file=sys.stderr, flush=True)
            samples = self.directory.path / SAMPLES_FOLDER / self.name
            write_samples(trainer, samples, step, self.settings.num_completions_to_print)
        return metrics

    def log(self, step: int, line: dict[str, float]) -> None:
        """Write the metrics of a step, under TRL's names and ours."""
        self._write(step, {name: value for name, value in line.items() if value is not None})
        seconds_left = self.seconds() / max(1, step) * (self.settings.max_steps - step)
        print(
            f"{self.name:<14} {step:>6}/{self.settings.max_steps}  reward {line['reward']:7.4f}  "
            f"loss {line['loss']:8.4f}  {self.seconds() / 60:6.1f} min, "
            f"{seconds_left / 60:.1f} left",
            file=sys.stderr,
            flush=True,
        )

    def commit(self, step: int) -> None:
        """Turn the checkpoint that transformers wrote into the state to resume from."""
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            progress = {"step": step, "seconds": self.seconds(), "init_metrics": self.init_metrics}
            self.directory.commit_state(self.name, self._path / f"checkpoint-{step}", progress)
        self.accelerator.wait_for_everyone()

    def _prepare(self) -> Path | None:
        """Rewind the run directory to the last state; return its path."""
        latest = self.directory.latest_state(self.name)
        step = 0
        if latest is not None:
            progress = latest[1]
            step = progress["step"]
            self._seconds_before, self.init_metrics = progress["seconds"], progress["init_metrics"]
        if self.accelerator.is_main_process:
            self._path.mkdir(parents=True, exist_ok=True)
            self.directory.rewind_log(self.name, step)
            for unfinished in self._path.glob("checkpoint-*"):
                shutil.rmtree(unfinished)
        self.accelerator.wait_for_everyone()
        return latest[0] if latest else None

    def _write(self, step: int, metrics: dict[str, float]) -> None:
        position = {"stage": self.name, "step": step, "seconds": self.seconds()}
        self.directory.log({**position, **metrics})
        self.accelerator.log(
            {f"{self.name}/{key}": value for key, value in metrics.items()},
            step=self._context.steps_before + step,
        )

    def _trainer(self, policy: Any, reference_id: int) -> JointTrainer:
        settings, state = self.settings, self.state
        tokenizer = state.policy.tokenizer
        parts = GrpoParts(
            policy=policy,
            processor=PolicyProcessor(tokenizer, self.examples.vision, state.policy.prompt),
            collator=PromptCollator(state, self.examples.features, settings.max_targets),
            reader=ResponseReader(
                reference_id,
                lambda ids: tokenizer.decode(list(ids), skip_special_tokens=True),
                settings.response_format,
            ),
            examples=self.examples.training,
            settings=settings,
        )
        callback = _StageCallback(self)
        trainer = JointTrainer(
            parts,
            grpo_arguments(settings, self.recipe, self.accelerator, self._path, state),
            order=prompt_order(self.examples.training, settings, self.examples.seed),
            peft_config=lora_config(settings.lora),
            on_log=lambda line: self.log(trainer.state.global_step, line),
            callbacks=[callback],
        )
        callback.trainer = trainer
        trainer.remove_callback(PrinterCallback)
        return trainer

    def _reference(self) -> Path:
        """Write the initial weights of the stage, from which the frozen reference is loaded."""
        path = self._path / REFERENCE_FOLDER
        if self.accelerator.is_main_process and not path.is_dir():
            with atomic_write(path) as partial, without_progress_bars():
                partial.mkdir(parents=True)
                self.state.policy.model.save_pretrained(partial)
        self.accelerator.wait_for_everyone()
        return path

    def _take_weights(self, trainer: JointTrainer, attachment: Attachment) -> None:
        """Merge adapters and detach the policy from the trainer."""
        if trainer.is_fsdp_enabled:
            self._take_sharded_weights(trainer)
            attachment.detach()
            trainer.accelerator.free_memory()
            return
        if self.settings.lora.r:
            merged = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
            assert merged is self.state.policy.model, "merging replaced the policy"
        attachment.detach()
        vars(self.state.policy.model).pop("forward", None)
        trainer.accelerator.free_memory()

    def _take_sharded_weights(self, trainer: JointTrainer) -> None:
        """Gather a sharded policy into the training state of the main process."""
        from transformers import AutoModelForImageTextToText

        weights = gather_policy(trainer.model, trainer.accelerator)
        if self.accelerator.is_main_process:
            parts = self.state.policy
            copy = AutoModelForImageTextToText.from_pretrained(
                parts.model.config.name_or_path, dtype=torch.float32, local_files_only=True
            )
            copy.load_state_dict(weights)
            self.state.policy = replace(parts, model=copy)


class _StageCallback(TrainerCallback):  # type: ignore[misc]
    """Evaluate on held-out examples and commit states at the steps of the recipe."""

    def __init__(self, stage: _GrpoStage) -> None:
        self._stage = stage
        self.trainer: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 0:
            metrics = self._stage.evaluate(self.trainer, 0)
            self._stage.init_metrics = {f"before/{key}": value for key, value in metrics.items()}

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        stage = self._stage
        eval_steps = stage.settings.eval_steps
        if state.global_step == stage.settings.max_steps:
            control.should_log = True
        elif eval_steps and state.global_step % eval_steps == 0:
            stage.evaluate(self.trainer, state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._stage.commit(state.global_step)


def prompt_order(examples: Sequence[Example], settings: GrpoSettings, seed: int) -> Any:
    """Return the prompts of all steps as a data set of indices, shuffled in each epoch."""
    from datasets import Dataset

    order = EpochOrder(len(examples), seed)
    rollouts = -(-settings.max_steps // settings.num_iterations)
    count = rollouts * settings.global_batch_size
    return Dataset.from_dict({"index": [order[position] for position in range(count)]})
