"""A GRPO stage of a run: training, evaluation, logging and resumable states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PrinterCallback, TrainerCallback

from coprs_deploy.artifacts import atomic_write, write_json
from coprs_deploy.data.examples import Example
from coprs_deploy.evaluation.summary import flat_row
from coprs_deploy.policy.progress_bars import without_progress_bars
from coprs_deploy.prompts import REFERENCE_TOKEN
from coprs_deploy.training.batches import EpochOrder
from coprs_deploy.training.examples import ExampleSets, first_examples
from coprs_deploy.training.grpo.arguments import grpo_arguments, lora_config
from coprs_deploy.training.grpo.attachment import Attachment, SegmentationHead
from coprs_deploy.training.grpo.batch import PromptCollator
from coprs_deploy.training.grpo.distribution import load_trainable_weights, policy_weights
from coprs_deploy.training.grpo.evaluation import (
    COMPLETIONS_FILE,
    evaluate_policy,
    summarize,
    write_samples,
)
from coprs_deploy.training.grpo.processor import PolicyProcessor
from coprs_deploy.training.grpo.scores import ResponseReader
from coprs_deploy.training.grpo.trainer import GrpoParts, JointTrainer
from coprs_deploy.training.recipe import Recipe
from coprs_deploy.training.runs.gallery import spread_indices, write_gallery
from coprs_deploy.training.runs.progress import REFERENCE
from coprs_deploy.training.runs.run_directory import rewind_lines
from coprs_deploy.training.settings import GrpoSettings
from coprs_deploy.training.state import TrainingState

if TYPE_CHECKING:
    from coprs_deploy.training.runs.run import Run

SAMPLES_FOLDER = "samples"
HELD_OUT_FOLDER = "held_out"


class GrpoStage:
    """One GRPO stage of an open run.

    The frozen reference is loaded from ``policy_path``, a transformers directory with the policy's
    current weights; None writes one.
    """

    def __init__(
        self,
        run: Run[Recipe],
        name: str,
        settings: GrpoSettings,
        state: TrainingState,
        examples: ExampleSets,
        *,
        policy_path: Path | None,
    ) -> None:
        self.settings = settings
        self.progress = run.progress(name)
        self._run, self._name, self._state, self._examples = run, name, state, examples
        self._held_out = first_examples(examples.held_out, settings.num_eval_examples)
        self._policy_path = policy_path

    def run(self) -> dict[str, Any]:
        """Train to the end, from the last state if there is one; return the result."""
        progress, accelerator, stop = self.progress, self._run.accelerator, self._run.stop
        progress.start()
        if accelerator.is_main_process:
            self._rewind_samples()
        trainer, attachment = self._attach()
        if progress.state and progress.step == self.settings.max_steps:
            load_trainable_weights(progress.state, trainer.model)
        else:
            with stop.while_steps_run():
                trainer.train(resume_from_checkpoint=progress.state and str(progress.state))
        if trainer.state.global_step < self.settings.max_steps and stop.is_agreed(accelerator):
            self._run.write_report()
            stop.exit()
        metrics = self.evaluate(trainer, self.settings.max_steps)
        num_trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        self._take_weights(trainer, attachment)
        return progress.finish(self._state, metrics, num_trainable)

    def save_checkpoint(self, trainer: JointTrainer, step: int) -> None:
        """Write the checkpoint of the current weights."""
        self._run.save_last(self._state, self.progress, step, policy_weights(trainer))

    def evaluate(self, trainer: JointTrainer, step: int) -> dict[str, float]:
        """Evaluate the current weights on the held-out examples."""
        shown = spread_indices(len(self._held_out), self.settings.num_completions_to_print)
        evaluated, samples = evaluate_policy(trainer, self._held_out, shown)
        metrics = summarize(evaluated)
        if self.progress.log_evaluation(step, metrics):
            self._run.save_best(self._state, self.progress, policy_weights(trainer))
        if self._run.accelerator.is_main_process:
            write_gallery(self._run.directory.path, self._name, step, samples)
            held_out, _ = self._folders()
            held_out.mkdir(parents=True, exist_ok=True)
            rows = [flat_row(each) for each in evaluated]
            write_json(held_out / f"step-{step:06d}.json", {"examples": rows})
        if step < self.settings.max_steps:
            self._run.write_report()
        return metrics

    def write_samples(self, trainer: JointTrainer, step: int) -> None:
        """Write samples of the last rollout, which a run that resumes does not have any more."""
        if self._run.accelerator.is_main_process:
            _, samples = self._folders()
            write_samples(trainer, samples, step, self.settings.num_completions_to_print)

    def is_stopped(self) -> bool:
        """Return whether the training is to stop (collective call)."""
        return self._run.stop.is_agreed(self._run.accelerator)

    def _folders(self) -> tuple[Path, Path]:
        """Return the folders of held-out responses and of samples."""
        root = self._run.directory.path
        return root / HELD_OUT_FOLDER / self._name, root / SAMPLES_FOLDER / self._name

    def _rewind_samples(self) -> None:
        """Remove responses and samples after the step that the stage resumes from."""
        kept = self.progress.kept_step
        for folder in self._folders():
            for file in folder.glob("step-*"):
                if int(file.stem.removeprefix("step-")) > kept:
                    file.unlink()
        completions = self._folders()[1] / COMPLETIONS_FILE
        if completions.is_file():
            rewind_lines(completions, lambda line: line["step"] <= kept)

    def _attach(self) -> tuple[JointTrainer, Attachment]:
        """Build the trainer of the policy with its segmentation head."""
        policy, tokenizer = self._state.policy.model, self._state.policy.tokenizer
        policy.config.name_or_path = str(self._policy_path or self._reference())
        head = SegmentationHead(self._state.segmentation)
        head.requires_grad_(self.settings.mode != "rl")
        attachment = Attachment(policy, head, tokenizer.convert_tokens_to_ids(REFERENCE_TOKEN))
        return self._trainer(policy), attachment

    def _log(self, step: int, line: dict[str, float]) -> None:
        """Log the metrics of a step, under TRL's names and ours."""
        self.progress.log(step, {name: value for name, value in line.items() if value is not None})

    def _trainer(self, policy: Any) -> JointTrainer:
        settings, state, examples = self.settings, self._state, self._examples
        tokenizer, prompt = state.policy.tokenizer, state.policy.prompt
        parts = GrpoParts(
            policy=policy,
            processor=PolicyProcessor(tokenizer, examples.vision, prompt),
            collator=PromptCollator(state, examples.features, settings.max_targets),
            reader=ResponseReader(tokenizer, settings.response_format),
            examples=examples.training,
            settings=settings,
        )
        callback = _StageCallback(self)
        recipe, accelerator = self._run.recipe, self._run.accelerator
        with without_progress_bars():  # of the reference
            trainer = JointTrainer(
                parts,
                grpo_arguments(settings, recipe, accelerator, self.progress.path, state),
                order=prompt_order(examples.training, settings, examples.seed),
                peft_config=lora_config(settings.lora),
                on_log=lambda line: self._log(trainer.state.global_step, line),
                callbacks=[callback],
            )
        callback.trainer = trainer
        trainer.remove_callback(PrinterCallback)
        return trainer

    def _reference(self) -> Path:
        """Write the initial weights of the stage, from which the frozen reference is loaded."""
        path = self.progress.path / REFERENCE
        if self._run.accelerator.is_main_process and not path.is_dir():
            with atomic_write(path) as partial, without_progress_bars():
                partial.mkdir(parents=True)
                self._state.policy.model.save_pretrained(partial)
        self._run.accelerator.wait_for_everyone()
        return path

    def _take_weights(self, trainer: JointTrainer, attachment: Attachment) -> None:
        """Merge adapters, gather shards, and detach the policy from the trainer."""
        if trainer.is_fsdp_enabled:
            self._take_sharded_weights(trainer)
        elif self.settings.lora.r:
            merged = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
            assert merged is self._state.policy.model, "merging replaced the policy"
        attachment.detach()
        if not trainer.is_fsdp_enabled:
            vars(self._state.policy.model).pop("forward", None)
        trainer.accelerator.free_memory()

    def _take_sharded_weights(self, trainer: JointTrainer) -> None:
        """Gather a sharded policy into the training state of the main process."""
        from transformers import AutoModelForImageTextToText

        weights = policy_weights(trainer)
        if self._run.accelerator.is_main_process:
            parts = self._state.policy
            copy = AutoModelForImageTextToText.from_pretrained(
                parts.model.config.name_or_path, dtype=torch.float32, local_files_only=True
            )
            copy.load_state_dict(weights)
            self._state.policy = replace(parts, model=copy)


class _StageCallback(TrainerCallback):  # type: ignore[misc]
    """Evaluate on held-out examples and commit states at the steps of the recipe."""

    def __init__(self, stage: GrpoStage) -> None:
        self._stage = stage
        self.trainer: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 0:
            metrics = self._stage.evaluate(self.trainer, 0)
            self._stage.progress.init_metrics = {f"before/{k}": v for k, v in metrics.items()}

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        settings = self._stage.settings
        is_last = state.global_step == settings.max_steps
        evaluates = settings.eval_steps and state.global_step % settings.eval_steps == 0
        if is_last:
            control.should_log = True  # it is evaluated when its state is saved
        elif evaluates:
            self._stage.evaluate(self.trainer, state.global_step)
        if is_last or evaluates:
            self._stage.write_samples(self.trainer, state.global_step)
        # A state in the middle of a rollout could not be resumed.
        is_whole = state.global_step % settings.num_iterations == 0
        if self._stage.is_stopped() and is_whole and state.global_step < settings.max_steps:
            control.should_save = control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not control.should_training_stop:  # before the state: a resume would not write it
            self._stage.save_checkpoint(self.trainer, state.global_step)
        self._stage.progress.commit(state.global_step)


def prompt_order(examples: Sequence[Example], settings: GrpoSettings, seed: int) -> Any:
    """Return the prompts of all steps as a data set of indices, shuffled in each epoch."""
    from datasets import Dataset

    order = EpochOrder(len(examples), seed)
    rollouts = -(-settings.max_steps // settings.num_iterations)
    count = rollouts * settings.global_batch_size
    return Dataset.from_dict({"index": [order[position] for position in range(count)]})
