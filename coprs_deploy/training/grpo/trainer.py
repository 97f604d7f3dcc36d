"""TRL's GRPO trainer with a second loss: masks, decoded in the same forward and backward pass.

What TRL does stays TRL's: sampling (by the policy itself or by vLLM), groups and advantages, the
policy's loss and its variants, the frozen reference, accumulation and distribution. Added here:

- the reward of a response comes from the mask that it leads to;
- the forward pass of the policy's loss also decodes masks, and their loss is added to it;
- one rate for each part, one cycle (:mod:`coprs_deploy.training.optim`);
- states hold the weights that move, under the names that they have in memory, and are read back
  strictly. (transformers' own states take the names of published checkpoints and are read back
  without a complaint when none fits, which restarts the language model.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from trl import GRPOConfig, GRPOTrainer

from coprs_deploy.data.examples import Example
from coprs_deploy.training.grpo.attachment import ATTRIBUTE, SegmentationRequest
from coprs_deploy.training.grpo.batch import GroundTruth, PromptItem, QuestionCollector
from coprs_deploy.training.grpo.distribution import (
    average_gradients,
    keep_segmentation_out,
    load_moving_weights,
    require_sharding_settings,
    save_moving_weights,
)
from coprs_deploy.training.grpo.processor import PolicyProcessor
from coprs_deploy.training.grpo.scores import (
    DecodedMasks,
    ResponseReader,
    mask_scores,
    overlaps,
    row_losses,
)
from coprs_deploy.training.losses import Mean
from coprs_deploy.training.optim import build_optimizers, relative_rate
from coprs_deploy.training.settings import GrpoSettings
from coprs_deploy.training.stage import reduce_means

TRUTH = ("image_embedding", "inside", "masks", "num_targets")
"""Keys under which a batch carries its :class:`GroundTruth`, one row a response."""


@dataclass(frozen=True)
class GrpoParts:
    """What a trainer works with.

    Attributes:
        policy: the policy with its segmentation head attached.
        processor: prompts and pictures.
        collector: truth.
        reader: judges form.
        examples: what is asked, in the order of the run: row n is prompt n.
        settings: of the phase.
    """

    policy: Any
    processor: PolicyProcessor
    collector: QuestionCollector
    reader: ResponseReader
    examples: Sequence[Example]
    settings: GrpoSettings


@dataclass
class ScoredRollout:
    """One batch of sampled responses, scored.

    Attributes:
        questions: one a response.
        truth: the same, as tensors.
        responses: token ids.
        decoded: the masks that they lead to.
    """

    questions: list[PromptItem]
    truth: GroundTruth
    responses: list[list[int]]
    decoded: DecodedMasks | None = None


class JointTrainer(GRPOTrainer):  # type: ignore[misc]
    """See the module.

    Args:
        parts: what is trained, on what.
        arguments: TRL's settings.
        order: the run's prompts: indices of ``parts.examples``, as a ``datasets.Dataset``.
        peft_config: adapters, as PEFT describes them; None trains whole weights.
        on_log: called with each line of the log, in the main process.
        callbacks: of transformers' trainer.
    """

    def __init__(
        self,
        parts: GrpoParts,
        arguments: GRPOConfig,
        *,
        order: Any,
        peft_config: Any,
        on_log: Callable[[dict[str, float]], None],
        callbacks: list[Any],
    ) -> None:
        self.parts = parts
        self.rollout: ScoredRollout | None = None
        self._on_log = on_log
        self._means: dict[str, Mean] = {}
        self.optimizer: Any
        self.lr_scheduler: Any
        head = getattr(parts.policy, ATTRIBUTE)
        learned = [p for p in head.parameters() if p.requires_grad]
        super().__init__(
            model=parts.policy,
            reward_funcs=[_Reward("mask", self._mask_rewards), _Reward("format", self._forms)],
            args=arguments,
            train_dataset=order,
            processing_class=parts.processor,
            peft_config=peft_config,
            callbacks=callbacks,
        )
        if peft_config is not None:  # it froze everything that is no adapter
            for weight in learned:
                weight.requires_grad_(True)
        if parts.settings.rollout.engine != "transformers":
            keep_segmentation_out(self.vllm_generation)
        if self.is_fsdp_enabled:
            require_sharding_settings(parts.settings)
            self.accelerator.state.fsdp_plugin.ignored_modules = [head]

    # Sampling and scoring.

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        processor, collector = self.parts.processor, self.parts.collector
        processor.forget()
        asked: dict[int, PromptItem] = {}
        for row in inputs:
            index = row["index"]
            if index not in asked:
                asked[index] = collector.question(self.parts.examples[index], index)
        questions = [asked[row["index"]] for row in inputs]
        truth = collector.truth(questions, self.accelerator.device)
        self.rollout = ScoredRollout(questions, truth, [])
        batch: dict[str, Any] = super()._generate_and_score_completions(
            [question.row for question in questions]
        )
        batch.update(zip(TRUTH, truth, strict=True))
        count = (truth.num_targets > 0).sum()
        batch["rows_with_targets"] = self.accelerator.gather(count).sum()
        return batch

    def _mask_rewards(self, completion_ids: list[list[int]], **_: Any) -> list[float]:
        """Decode the masks of the responses, without a gradient, and score them."""
        assert self.rollout is not None
        rollout = self.rollout
        rollout.responses = [list(ids) for ids in completion_ids]
        rollout.decoded = self.decode(rollout.questions, rollout.truth, rollout.responses)
        for name, mean in overlaps(rollout.decoded, rollout.truth).items():
            self._add(name, mean)
        self._add("found", Mean.of(rollout.decoded.is_found.any(1).float()))
        scores: list[float] = mask_scores(rollout.decoded, rollout.truth).tolist()
        return scores

    def _forms(self, completion_ids: list[list[int]], **_: Any) -> list[float]:
        assert self.rollout is not None
        counts = self.rollout.truth.num_targets.tolist()
        return self.parts.reader.format_scores(completion_ids, counts)

    @torch.no_grad()
    def decode(
        self,
        questions: Sequence[PromptItem],
        truth: GroundTruth,
        responses: Sequence[Sequence[int]],
    ) -> DecodedMasks:
        """Read given responses and decode their masks; all processes take part."""
        rows = self.args.per_device_train_batch_size
        parts = [
            self._decode_rows(
                questions[start : start + rows],
                truth.part(start, start + rows),
                responses[start : start + rows],
            )
            for start in range(0, len(questions), rows)
        ]
        return DecodedMasks(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))

    def _decode_rows(
        self,
        questions: Sequence[PromptItem],
        truth: GroundTruth,
        responses: Sequence[Sequence[int]],
    ) -> DecodedMasks:
        processor = self.parts.processor
        pictures = [question.picture for question in questions]
        prompts = [processor.encode(q.example.instruction, q.picture) for q in questions]
        fields = processor.tensors(prompts, pictures)
        width = max(map(len, responses))
        pad = int(processor.tokenizer.pad_token_id)
        added = torch.tensor([[*ids, *[pad] * (width - len(ids))] for ids in responses])
        present = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in responses])
        first_column = fields["input_ids"].shape[1]
        fields["input_ids"] = torch.cat([fields["input_ids"], added], 1)
        fields["attention_mask"] = torch.cat([fields["attention_mask"], present], 1)
        if "mm_token_type_ids" in fields:
            blank = torch.zeros_like(added, dtype=torch.int32)
            fields["mm_token_type_ids"] = torch.cat([fields["mm_token_type_ids"], blank], 1)
        placed = {name: tensor.to(self.accelerator.device) for name, tensor in fields.items()}
        with self.accelerator.autocast():
            output = self.model(
                **placed,
                segmentation=truth.request(first_column),
                logits_to_keep=1,
                use_cache=False,
            )
        return DecodedMasks(output.prior_logits, output.mask_logits, output.is_found)

    # Losses.

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """Add both losses; one forward pass has served them."""
        settings = self.parts.settings
        if settings.mode == "rl":
            policy_loss: Tensor = super().compute_loss(model, inputs)
            self._add("loss.policy", Mean.of(policy_loss.detach() * self._accumulated))
            return policy_loss
        truth = GroundTruth(*(inputs[key] for key in TRUTH))
        asking = _Asking(model, truth.request(inputs["prompt_ids"].shape[1]))
        policy_loss = super().compute_loss(asking, inputs)
        self._add("loss.policy", Mean.of(policy_loss.detach() * self._accumulated))
        segmentation_loss = self._segmentation_loss(asking.decoded(), truth, inputs)
        if settings.mode == "segmentation":
            return segmentation_loss
        return policy_loss + segmentation_loss

    def _segmentation_loss(
        self, decoded: DecodedMasks, truth: GroundTruth, inputs: dict[str, Any]
    ) -> Tensor:
        """Add up the weighted parts, as a mean over the rows of all processes and passes.

        Gradients are averaged over the processes, hence ``num_processes``.
        """
        settings = self.parts.settings
        weights = settings.loss_weights(self.state.global_step)
        rows = inputs["rows_with_targets"].clamp(min=1) / self.accelerator.num_processes
        total = 0 * decoded.mask_logits.sum() + 0 * decoded.prior_logits.sum()
        here = (truth.num_targets > 0).sum().float()
        for name, loss in row_losses(decoded, truth, weights).items():
            total = total + getattr(weights, name) * loss / rows
            self._add(f"loss.{name}", Mean(loss.detach(), here))
        return settings.segmentation_loss_weight * total

    @property
    def _accumulated(self) -> int:
        return int(self.current_gradient_accumulation_steps)

    # Weights.

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """Give each part its own rate."""
        if self.optimizer is None:
            settings = self.parts.settings.optimizer
            (self.optimizer,) = build_optimizers(model or self.model, settings)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Let the rates follow one cycle."""
        if self.lr_scheduler is None:
            settings = self.parts.settings.optimizer
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer,
                lambda step: relative_rate(settings, step, num_training_steps),
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        if self.is_fsdp_enabled:  # the head is outside of what is sharded and reduced
            average_gradients(getattr(self.parts.policy, ATTRIBUTE))
        return super()._clip_grad_norm(model)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save:
            save_moving_weights(Path(output_dir or self.args.output_dir), self.model)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        load_moving_weights(Path(resume_from_checkpoint), model or self.model)

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Write nothing: the run's folder has a report."""

    def _send_telemetry(self) -> None:
        """Send nothing."""

    # The log.

    def _add(self, name: str, mean: Mean) -> None:
        known = self._means.get(name)
        self._means[name] = mean if known is None else Mean(*map(torch.add, known, mean))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Bring our figures and TRL's together; one line in the run's log."""
        means = reduce_means(self.accelerator, self._means)
        self._means = {}
        line = {**logs, **means}
        super().log(line, start_time)
        if "loss" in logs and self.accelerator.is_main_process:
            self._on_log({**line, **self._rates()})

    def _rates(self) -> dict[str, float]:
        """Name the rate of each part."""
        settings, group = self.parts.settings.optimizer, self.optimizer.param_groups[0]
        now = settings.rate * group["lr"] / group["peak_rate"]
        parts = {f"rate.{name}": factor * now for name, factor in settings.lr_multipliers.items()}
        return {"rate.policy": now, **parts}


class _Asking:
    """Calls a model with a request for masks, and keeps the output."""

    def __init__(self, model: nn.Module, request: SegmentationRequest) -> None:
        self._model = model
        self._request = request
        self._output: Any = None

    def __call__(self, **inputs: Any) -> Any:
        self._output = self._model(**inputs, segmentation=self._request)
        return self._output

    def decoded(self) -> DecodedMasks:
        output = self._output
        return DecodedMasks(output.prior_logits, output.mask_logits, output.is_found)


class _Reward:
    """A reward function under the name that it has in the log."""

    def __init__(self, name: str, score: Callable[..., list[float]]) -> None:
        self.__name__ = name
        self._score = score

    def __call__(self, **batch: Any) -> list[float]:
        return self._score(**batch)
