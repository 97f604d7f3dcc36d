"""One GRPO phase of a run: from the weights on the workbench to better ones, resumable."""

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
from coprs_deploy.training.grpo.batch import QuestionCollector
from coprs_deploy.training.grpo.distribution import whole_policy
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
from coprs_deploy.training.trainer import gate_results

if TYPE_CHECKING:
    from accelerate import Accelerator

REFERENCE_FOLDER = "reference"
SAMPLES_FOLDER = "samples"
HELD_OUT_FOLDER = "held_out"

LOG_NAMES = {
    "clip_ratio/region_mean": "clip_fraction",
    "completions/mean_length": "response_tokens",
    "completions/clipped_ratio": "truncated",
    "frac_reward_zero_std": "groups_without_spread",
    "rewards/mask/mean": "reward.mask",
    "rewards/format/mean": "reward.format",
    "reward_std": "reward_spread",
    "step_time": "step_seconds",
}
"""TRL's names of the figures that the run's log takes under another name."""

KEPT_NAMES = ("loss", "grad_norm", "reward", "kl", "entropy", "mask_iou", "prior_iou", "found")


@dataclass(frozen=True)
class RunContext:
    """What a phase of a run works with.

    Attributes:
        recipe: of the run.
        accelerator: of the run; it writes the curves.
        folder: of the run.
        workbench: the model; its weights are those that the phase starts from.
        examples: what is asked, in training and to judge.
        steps_before: of earlier phases, for the curves.
        policy_path: a transformers directory with the very weights that the policy has now, where
            there is one: the frozen reference is read from it.
    """

    recipe: Recipe
    accelerator: Accelerator
    folder: RunDirectory
    workbench: TrainingState
    examples: ExampleSets
    steps_before: int
    policy_path: Path | None


def run_grpo_phase(name: str, settings: GrpoSettings, context: RunContext) -> dict[str, Any]:
    """Run a GRPO phase to its end, from its last state if there is one.

    Returns:
        Its result: figures before and after, gates, seconds.

    Raises:
        ValueError: settings and data do not fit together.
    """
    result = context.folder.phase_result(name)
    if result is None:
        return _GrpoRun(name, settings, context).run()
    file = context.folder.phase(name) / WEIGHTS_FILE
    context.workbench.load_state_dict(torch.load(file, weights_only=True))
    return result


class _GrpoRun:
    """The parts of one run of a phase."""

    def __init__(self, name: str, settings: GrpoSettings, context: RunContext) -> None:
        self.name = name
        self.settings = settings
        self.recipe = context.recipe
        self.accelerator = context.accelerator
        self.folder = context.folder
        self.workbench = context.workbench
        self.examples = context.examples
        self.facts: dict[str, float] = {}
        held_out = context.examples.held_out
        self.held_out: list[Example] = list(
            held_out[: min(settings.num_eval_examples, len(held_out))]
        )
        self._context = context
        self._seconds_before = 0.0
        self._start = time.perf_counter()

    def run(self) -> dict[str, Any]:
        """Train, judge, and leave the weights on the workbench."""
        state = self.folder.latest_state(self.name)
        first = 0
        if state is not None:
            first = state[1]["step"]
            self._seconds_before, self.facts = state[1]["seconds"], state[1]["facts"]
        phase_folder = self.folder.phase(self.name)
        if self.accelerator.is_main_process:
            phase_folder.mkdir(parents=True, exist_ok=True)
            self.folder.rewind_log(self.name, first)
            for unfinished in phase_folder.glob("checkpoint-*"):
                shutil.rmtree(unfinished)
        self.accelerator.wait_for_everyone()
        policy = self.workbench.policy.model
        policy.config.name_or_path = str(self._context.policy_path or self._reference())
        head = SegmentationHead(self.workbench.segmentation)
        head.requires_grad_(self.settings.mode != "rl")
        tokenizer = self.workbench.policy.tokenizer
        reference_id = tokenizer.convert_tokens_to_ids(REFERENCE_TOKEN)
        attachment = Attachment(policy, head, reference_id)
        trainer = self._trainer(policy, reference_id)
        trainer.train(resume_from_checkpoint=str(state[0]) if state else None)
        metrics = self.look(trainer, self.settings.steps)
        seconds = self.seconds()
        moved = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        self._take_weights(trainer, attachment)
        result = {
            "steps": self.settings.steps,
            "seconds": seconds,
            "metrics": metrics,
            "facts": self.facts,
            "gates": gate_results(self.settings.gates, metrics),
            "parameters": moved,
        }
        if self.accelerator.is_main_process:
            torch.save(self.workbench.state_dict(), phase_folder / WEIGHTS_FILE)
            self.folder.finish_phase(self.name, result)
            shutil.rmtree(phase_folder / REFERENCE_FOLDER, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        return result

    def seconds(self) -> float:
        """Time of the phase over all its runs."""
        return self._seconds_before + time.perf_counter() - self._start

    def look(self, trainer: JointTrainer, step: int) -> dict[str, float]:
        """Judge the weights as they are on held-out examples."""
        evaluated = evaluate_policy(trainer, self.held_out)
        found = summarize(evaluated)
        if self.accelerator.is_main_process:
            kept = self.folder.path / HELD_OUT_FOLDER / self.name
            kept.mkdir(parents=True, exist_ok=True)
            rows = [each.to_json() for each in evaluated]
            write_json(kept / f"step-{step:06d}.json", {"answers": rows})
            self._write(step, {f"held_out.{key}": value for key, value in found.items()})
            shown = "  ".join(f"{k} {v:.3f}" for k, v in found.items() if not k.endswith("_stderr"))
            print(f"{self.name:<14} {step:>6} held out: {shown}", file=sys.stderr, flush=True)
            write_samples(
                trainer, self.folder.path / SAMPLES_FOLDER / self.name, step, self.settings.samples
            )
        return found

    def log(self, trainer: JointTrainer, line: dict[str, float]) -> None:
        """Write a line of the log under this project's names."""
        kept = {name: line[name] for name in KEPT_NAMES if line.get(name) is not None}
        kept |= {new: line[old] for old, new in LOG_NAMES.items() if line.get(old) is not None}
        kept |= {k: v for k, v in line.items() if k.startswith(("loss.", "rate."))}
        step = trainer.state.global_step
        self._write(step, kept)
        left = self.seconds() / max(1, step) * (self.settings.steps - step)
        print(
            f"{self.name:<14} {step:>6}/{self.settings.steps}  reward {line['reward']:7.4f}  "
            f"loss {line['loss']:8.4f}  {self.seconds() / 60:6.1f} min, {left / 60:.1f} left",
            file=sys.stderr,
            flush=True,
        )

    def commit(self, step: int) -> None:
        """Make the state that transformers wrote the one to go on from."""
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            progress = {"step": step, "seconds": self.seconds(), "facts": self.facts}
            partial = self.folder.phase(self.name) / f"checkpoint-{step}"
            self.folder.commit_state(self.name, partial, progress)
        self.accelerator.wait_for_everyone()

    def _write(self, step: int, figures_of_step: dict[str, float]) -> None:
        position = {"phase": self.name, "step": step, "seconds": self.seconds()}
        self.folder.log({**position, **figures_of_step})
        self.accelerator.log(
            {f"{self.name}/{key}": value for key, value in figures_of_step.items()},
            step=self._context.steps_before + step,
        )

    def _trainer(self, policy: Any, reference_id: int) -> JointTrainer:
        settings, workbench = self.settings, self.workbench
        tokenizer, prompt = workbench.policy.tokenizer, workbench.policy.prompt
        parts = GrpoParts(
            policy=policy,
            processor=PolicyProcessor(tokenizer, self.examples.vision, prompt),
            collector=QuestionCollector(workbench, self.examples.features, settings.targets),
            reader=ResponseReader(
                reference_id,
                lambda ids: tokenizer.decode(list(ids), skip_special_tokens=True),
                settings.reward.convention,
            ),
            examples=self.examples.training,
            settings=settings,
        )
        arguments = grpo_arguments(
            settings, self.recipe, self.accelerator, self.folder.phase(self.name), workbench
        )
        watch = _Watch(self)
        trainer = JointTrainer(
            parts,
            arguments,
            order=order_of_prompts(self.examples.training, settings, self.examples.seed),
            peft_config=lora_config(settings.lora),
            on_log=lambda line: self.log(trainer, line),
            callbacks=[watch],
        )
        watch.trainer = trainer
        trainer.remove_callback(PrinterCallback)
        return trainer

    def _reference(self) -> Path:
        """Keep the weights that the phase starts from: what the policy is held close to."""
        path = self.folder.phase(self.name) / REFERENCE_FOLDER
        if self.accelerator.is_main_process and not path.is_dir():
            with atomic_write(path) as partial, without_progress_bars():
                partial.mkdir(parents=True)
                self.workbench.policy.model.save_pretrained(partial)
        self.accelerator.wait_for_everyone()
        return path

    def _take_weights(self, trainer: JointTrainer, attachment: Attachment) -> None:
        """Merge adapters, and take the policy out of the trainer."""
        if trainer.is_fsdp_enabled:
            self._take_whole_weights(trainer)
            attachment.detach()
            trainer.accelerator.free_memory()
            return
        if self.settings.lora.rank:
            merged = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
            assert merged is self.workbench.policy.model, "the policy is another one now"
        attachment.detach()
        vars(self.workbench.policy.model).pop("forward", None)
        trainer.accelerator.free_memory()

    def _take_whole_weights(self, trainer: JointTrainer) -> None:
        """Put a whole copy of a sharded policy on the workbench of the main process."""
        from transformers import AutoModelForImageTextToText

        weights = whole_policy(trainer.model, trainer.accelerator)
        if self.accelerator.is_main_process:
            parts = self.workbench.policy
            copy = AutoModelForImageTextToText.from_pretrained(
                parts.model.config.name_or_path, dtype=torch.float32, local_files_only=True
            )
            copy.load_state_dict(weights)
            self.workbench.policy = replace(parts, model=copy)


class _Watch(TrainerCallback):  # type: ignore[misc]
    """Looks at held-out examples and commits states at the steps that the recipe names."""

    def __init__(self, run: _GrpoRun) -> None:
        self._run = run
        self.trainer: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 0:
            found = self._run.look(self.trainer, 0)
            self._run.facts = {f"before.{key}": value for key, value in found.items()}

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        run = self._run
        is_last = state.global_step == run.settings.steps
        every = run.settings.eval_steps
        if is_last:
            control.should_log = True
        elif every and state.global_step % every == 0:
            run.look(self.trainer, state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._run.commit(state.global_step)


def order_of_prompts(examples: Sequence[Example], settings: GrpoSettings, seed: int) -> Any:
    """Lay out the prompts of all steps, shuffled afresh in each epoch, as one table."""
    from datasets import Dataset

    order = EpochOrder(len(examples), seed)
    rollouts = -(-settings.steps // settings.num_iterations)
    count = rollouts * settings.global_batch_size
    return Dataset.from_dict({"index": [order[position] for position in range(count)]})
