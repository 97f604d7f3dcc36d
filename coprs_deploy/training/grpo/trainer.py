"""TRL's GRPO trainer with a segmentation loss in the same forward and backward pass.

TRL keeps sampling (by the policy itself or by vLLM), groups and advantages, the policy loss and its
variants, the frozen reference, accumulation and distribution. Added here:

- the mask reward, computed from the masks decoded for each completion;
- reasoning budgets: longer reasoning is truncated, and the policy loss leaves out what is forced;
- mask decoding in the forward pass of the policy loss, and the segmentation loss added to it;
- one learning rate per part, one cycle (:mod:`coprs_deploy.training.optim`);
- states with the trainable weights under their names in memory, loaded strictly. (transformers'
  own states use the names of published checkpoints and load without an error when none matches,
  which resets the language model.)
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
from coprs_deploy.training.batches import pad_tokens
from coprs_deploy.training.grpo.attachment import ATTRIBUTE
from coprs_deploy.training.grpo.batch import GroundTruth, PromptCollator, PromptItem
from coprs_deploy.training.grpo.distribution import (
    average_gradients,
    check_sharding_settings,
    exclude_segmentation,
    load_trainable_weights,
    save_trainable_weights,
)
from coprs_deploy.training.grpo.processor import PolicyProcessor
from coprs_deploy.training.grpo.scores import (
    DecodedMasks,
    ResponseReader,
    grid_ious,
    length_scores,
    mask_scores,
    row_losses,
)
from coprs_deploy.training.losses import Mean
from coprs_deploy.training.lr_schedule import lr_factor
from coprs_deploy.training.optim import build_optimizers, group_settings, set_group_settings
from coprs_deploy.training.settings import GrpoSettings
from coprs_deploy.training.stage import add_mean, reduce_means
from coprs_deploy.training.truncation import (
    ReasoningTruncator,
    TruncatedResponse,
    truncation_generator,
)

GROUND_TRUTH_KEYS = GroundTruth._fields
"""Keys of a batch that hold its :class:`GroundTruth`, one row per completion."""


@dataclass(frozen=True)
class GrpoParts:
    """Parts of a GRPO training; the segmentation head is attached to the policy."""

    policy: Any
    processor: PolicyProcessor
    collator: PromptCollator
    reader: ResponseReader
    examples: Sequence[Example]
    settings: GrpoSettings


@dataclass
class ScoredRollout:
    """One batch of sampled completions, token ids each; ``decoded`` is None before scoring.

    ``budgets`` are the reasoning budgets of the rows, None for those without one.
    """

    items: list[PromptItem]
    ground_truth: GroundTruth
    completions: list[list[int]]
    decoded: DecodedMasks | None = None
    budgets: Sequence[int | None] = ()


class JointTrainer(GRPOTrainer):  # type: ignore[misc]
    """GRPO trainer with the joint loss; see the module.

    ``order`` is a ``datasets.Dataset`` of indices into ``parts.examples``; ``on_log`` is called in
    the main process with each line of the log.
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
        self._truncator = ReasoningTruncator(parts.processor.tokenizer, parts.processor.prompt)
        self._means: dict[str, Mean] = {}
        self.optimizer: Any
        self.lr_scheduler: Any
        head = getattr(parts.policy, ATTRIBUTE)
        trainable = [p for p in head.parameters() if p.requires_grad]
        super().__init__(
            model=parts.policy,
            reward_funcs=[
                self._mask_rewards,
                self._format_rewards,
                *[self._length_rewards] * (parts.settings.reward_weights.length > 0),
            ],
            args=arguments,
            train_dataset=order,
            processing_class=parts.processor,
            peft_config=peft_config,
            callbacks=callbacks,
        )
        if peft_config is not None:  # PEFT froze everything but the adapters
            for weight in trainable:
                weight.requires_grad_(True)
        if parts.settings.use_vllm:
            exclude_segmentation(self.vllm_generation)
        if self.is_fsdp_enabled:
            check_sharding_settings(parts.settings)
            self.accelerator.state.fsdp_plugin.ignored_modules = [head]

    # Sampling and scoring.

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        processor, collator = self.parts.processor, self.parts.collator
        processor.clear_cache()
        indices = [row["index"] for row in inputs]
        distinct = {i: collator.item(self.parts.examples[i], i) for i in dict.fromkeys(indices)}
        items = [distinct[i] for i in indices]
        gt = collator.ground_truth(items, self.accelerator.device)
        budgets = {index: self._budget(index) for index in distinct}
        self.rollout = ScoredRollout(items, gt, [], budgets=[budgets[index] for index in indices])
        batch: dict[str, Any] = super()._generate_and_score_completions(
            [item.row for item in items]
        )
        batch.update(gt._asdict())
        count = (gt.num_targets > 0).sum()
        batch["rows_with_targets"] = self.accelerator.gather(count).sum()
        return batch

    def _budget(self, index: int) -> int | None:
        """Draw the reasoning budget of an example in this step, the same in every process."""
        settings = self.parts.settings
        seed = (self.args.seed, self.state.global_step, index)
        generator = truncation_generator(settings.truncation_ratio, *seed)
        if generator is None:
            return None
        return int(generator.integers(settings.max_reasoning_tokens, endpoint=True))

    def _generate(self, prompts: list[Any]) -> Any:
        """Generate completions, and truncate reasoning beyond its budget.

        TRL excludes tokens from the policy loss where its mask of tool results is 0.
        """
        generated = super()._generate(prompts)
        assert self.rollout is not None
        if not self.parts.settings.truncation_ratio:
            return generated
        prompt_ids, completion_ids, _, completions, logprobs, *others = generated
        targets = self.rollout.ground_truth.num_targets.tolist()
        rows = zip(completion_ids, self.rollout.budgets, targets, strict=True)
        truncated = [
            TruncatedResponse(list(ids), len(ids))
            if budget is None or not count
            else self._truncator.truncate(ids, budget, count)
            for ids, budget, count in rows
        ]
        masks = [[1] * kept + [0] * (len(ids) - kept) for ids, kept in truncated]
        if logprobs is not None:
            pairs = zip(logprobs, truncated, strict=True)
            logprobs = [[*row[:kept], *[0.0] * (len(ids) - kept)] for row, (ids, kept) in pairs]
        is_truncated = torch.tensor([kept < len(ids) for ids, kept in truncated])
        device = self.accelerator.device
        add_mean(self._means, "frac_truncated", Mean.of(is_truncated.float().to(device)))
        ids = [each.ids for each in truncated]
        return (prompt_ids, ids, masks, completions, logprobs, *others)

    def _mask_rewards(self, completion_ids: list[list[int]], **_: Any) -> list[float]:
        """Decode the masks of the completions without gradient and score them."""
        assert self.rollout is not None
        rollout = self.rollout
        rollout.completions = [list(ids) for ids in completion_ids]
        decoded = self.decode(rollout.items, rollout.ground_truth, rollout.completions)
        rollout.decoded = decoded
        for name, mean in grid_ious(decoded, rollout.ground_truth).items():
            add_mean(self._means, name, mean)
        add_mean(self._means, "frac_with_reference", Mean.of(decoded.is_found.any(1).float()))
        scores: list[float] = mask_scores(decoded, rollout.ground_truth).tolist()
        return scores

    _mask_rewards.__name__ = "mask"  # TRL logs a reward under the name of its function

    def _format_rewards(self, completion_ids: list[list[int]], **_: Any) -> list[float]:
        assert self.rollout is not None
        counts = self.rollout.ground_truth.num_targets.tolist()
        return self.parts.reader.format_scores(completion_ids, counts)

    _format_rewards.__name__ = "format"

    def _length_rewards(self, completion_ids: list[list[int]], **_: Any) -> list[float]:
        """Score the length of completions whose masks have been decoded."""
        assert self.rollout is not None
        assert self.rollout.decoded is not None
        scores = mask_scores(self.rollout.decoded, self.rollout.ground_truth).tolist()
        return self.length_scores(completion_ids, scores)

    _length_rewards.__name__ = "length"

    def length_scores(
        self, completions: Sequence[Sequence[int]], scores: Sequence[float]
    ) -> list[float]:
        """Return the length score of each completion, given its mask score."""
        return length_scores(completions, scores, self._truncator, self.parts.settings)

    @torch.no_grad()
    def decode(
        self,
        items: Sequence[PromptItem],
        gt: GroundTruth,
        completions: Sequence[Sequence[int]],
    ) -> DecodedMasks:
        """Decode the masks of given completions (collective call)."""
        rows = self.args.per_device_train_batch_size
        if len(items) > rows:
            slices = [slice(start, start + rows) for start in range(0, len(items), rows)]
            parts = [self.decode(items[s], gt.rows(s), completions[s]) for s in slices]
            return DecodedMasks(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
        processor = self.parts.processor
        fields = processor([[item.image] for item in items], [i.example.instruction for i in items])
        ids, attended = pad_tokens(completions, processor.tokenizer.pad_token_id)
        first_column = fields["input_ids"].shape[1]
        fields["input_ids"] = torch.cat([fields["input_ids"], ids], 1)
        fields["attention_mask"] = torch.cat([fields["attention_mask"], attended], 1)
        if "mm_token_type_ids" in fields:
            no_image = torch.zeros_like(ids, dtype=torch.int32)
            fields["mm_token_type_ids"] = torch.cat([fields["mm_token_type_ids"], no_image], 1)
        device = self.accelerator.device
        with self.accelerator.autocast():
            output = self.model(
                **{name: tensor.to(device) for name, tensor in fields.items()},
                segmentation=gt.request(first_column),
                logits_to_keep=1,
                use_cache=False,
            )
        return _decoded_masks(output)

    # Losses.

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """Return the policy loss plus the segmentation loss of the same forward pass."""
        mode, outputs = self.parts.settings.mode, list[Any]()
        gt = GroundTruth(*(inputs[key] for key in GROUND_TRUTH_KEYS))
        request = gt.request(inputs["prompt_ids"].shape[1])

        def decoding(**named: Any) -> Any:
            """Call the model with a request for masks and keep its output."""
            outputs.append(model(**named, segmentation=request))
            return outputs[-1]

        policy_loss: Tensor = super().compute_loss(model if mode == "rl" else decoding, inputs)
        accumulated = int(self.current_gradient_accumulation_steps)
        add_mean(self._means, "loss/policy", Mean.of(policy_loss.detach() * accumulated))
        if mode == "rl":
            return policy_loss
        segmentation_loss = self._segmentation_loss(_decoded_masks(outputs[-1]), gt, inputs)
        return segmentation_loss if mode == "segmentation" else policy_loss + segmentation_loss

    def _segmentation_loss(
        self, decoded: DecodedMasks, gt: GroundTruth, inputs: dict[str, Any]
    ) -> Tensor:
        """Return the weighted sum of the losses, a mean over the rows of all processes and passes.

        Gradients are averaged over the processes, hence ``num_processes``.
        """
        settings = self.parts.settings
        weights = settings.loss_weights_at(self.state.global_step)
        rows = inputs["rows_with_targets"].clamp(min=1) / self.accelerator.num_processes
        total = 0 * decoded.mask_logits.sum() + 0 * decoded.prior_logits.sum()
        local_rows = (gt.num_targets > 0).sum().float()
        for name, loss in row_losses(decoded, gt, weights).items():
            total = total + getattr(weights, name) * loss / rows
            add_mean(self._means, f"loss/{name}", Mean(loss.detach(), local_rows))
        return settings.segmentation_loss_weight * total

    # Weights.

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """Create the optimizer with one learning rate per part."""
        if self.optimizer is None:
            settings = self.parts.settings.optimizer
            (self.optimizer,) = build_optimizers(model or self.model, settings)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Create the scheduler of one cycle for all learning rates."""
        if self.lr_scheduler is None:
            settings = self.parts.settings.optimizer
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer,
                lambda step: lr_factor(settings, step, num_training_steps),
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        if self.is_fsdp_enabled:  # the head is neither sharded nor reduced
            average_gradients(getattr(self.parts.policy, ATTRIBUTE))
        return super()._clip_grad_norm(model)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save:
            save_trainable_weights(Path(output_dir or self.args.output_dir), self.model)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        load_trainable_weights(Path(resume_from_checkpoint), model or self.model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the moments of a state; rates and their schedule are those of the recipe."""
        kept = group_settings([self.optimizer])
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        set_group_settings([self.optimizer], kept)
        schedule = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)
        schedule.base_lrs = [group["initial_lr"] for group in self.optimizer.param_groups]
        for group, peak, factor in zip(
            self.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True
        ):
            group["lr"] = peak * factor(schedule.last_epoch)

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Write nothing: the run directory has a report."""

    def _send_telemetry(self) -> None:
        """Send nothing."""

    # The log.

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log TRL's metrics together with those of this class."""
        means = reduce_means(self.accelerator, self._means)
        self._means = {}
        line = {**logs, **means}
        super().log(line, start_time)
        if "loss" in logs and self.accelerator.is_main_process:
            self._on_log({**line, **self._learning_rates()})

    def _learning_rates(self) -> dict[str, float]:
        """Return the learning rate of each part."""
        settings, group = self.parts.settings.optimizer, self.optimizer.param_groups[0]
        current = settings.learning_rate * group["lr"] / group["peak_lr"]
        rates = {"policy": current}
        rates |= {name: factor * current for name, factor in settings.lr_multipliers.items()}
        return {f"learning_rate/{name}": rate for name, rate in rates.items()}


def _decoded_masks(output: Any) -> DecodedMasks:
    return DecodedMasks(output.prior_logits, output.mask_logits, output.is_found)
