"""Settings of models, data, optimizers and stages in a recipe.

Nothing here imports torch or TRL: ``train --list`` and the documentation read these records. The
stages of the tiny model are in :mod:`coprs_deploy.curriculum.recipe`.
"""

from __future__ import annotations

import math
import re
from enum import Enum
from typing import Annotated, ClassVar, Literal

from msgspec import Meta

from coprs_deploy.specs import Record

MASK_METRICS = ("giou", "prior_giou", "precision_at_50")
"""Metrics of masks in an evaluation."""

TEACHER_FORCED = "teacher_forced_"
"""Start of the names of metrics of masks whose response was given, not generated."""

COMPLETION_METRICS = ("reward", "format_score", "count_accuracy", "completion_length")
"""Metrics of generated completions in an evaluation."""

Positive = Annotated[int, Meta(ge=1)]
Count = Annotated[int, Meta(ge=0)]
Weight = Annotated[float, Meta(ge=0)]
Share = Annotated[float, Meta(ge=0, le=1)]
Momentum = Annotated[float, Meta(ge=0, lt=1)]
PositiveShare = Annotated[float, Meta(gt=0, le=1)]


class SegmentationLossWeights(Record, frozen=True):
    """Weights of the single segmentation losses (paper, eq. 8 and appendix B.3).

    Attributes:
        prior_bce: binary cross-entropy of the prior.
        prior_dice: dice loss of the prior (public code only; off in the paper).
        mask_dice: dice loss of the mask, lambda_d.
        mask_focal: focal loss of the mask, lambda_f.
        mask_bce: binary cross-entropy of the mask, an addition of this project: tiny models
            trained from random weights need it for sharp edges.
    """

    prior_bce: Weight = 1.0
    prior_dice: Weight = 0.0
    mask_dice: Weight = 1.5
    mask_focal: Weight = 0.0
    mask_bce: Weight = 0.0


class ResponseFormat(str, Enum):
    """Format rules of the reward: the minor violation besides long reasoning and text before it."""

    PAPER = "paper"
    """Text after ``<REF_POS>``."""

    PUBLIC_CODE = "public_code"
    """More than ten words between the reasoning and ``<REF_POS>``."""


class RewardWeights(Record, frozen=True):
    """Weights of the rewards, adding up to 1 (the paper ablates the mask's from 0 to 1).

    Attributes:
        mask: weight of the mask reward, in [0, 1].
        format: weight of the format reward, in [0, 1].
        length: weight of the length reward for concise reasoning, in [0, 1], an addition of this
            project; 0 computes none.
    """

    mask: Share = 0.7
    format: Share = 0.3
    length: Share = 0.0

    def __post_init__(self) -> None:
        if abs(self.mask + self.format + self.length - 1) > 1e-6:
            raise ValueError(
                f"reward_weights is {{ mask = {self.mask:g}, format = {self.format:g}, length = "
                f"{self.length:g} }}; accepted: weights in [0, 1] that add up to 1; set all of them"
            )


class CheckpointModel(Record, frozen=True, tag_field="kind", tag="checkpoint"):
    """Model that starts from a checkpoint directory, as ``coprs-deploy convert`` writes it.

    Attributes:
        path: checkpoint directory; empty for the demo model of the package.
        policy: name of the policy's size, as in ``coprs-deploy convert --random``; needed by
            ``--estimate`` only.
        sam: name of SAM's size; needed by ``--estimate`` only.
        freeze_vision_tower: whether the policy's vision tower is frozen.
        gradient_checkpointing: whether activations are recomputed in the backward pass.
    """

    path: str = ""
    policy: str = ""
    sam: str = ""
    freeze_vision_tower: bool = False
    gradient_checkpointing: bool = True


class SyntheticData(Record, frozen=True, tag_field="kind", tag="synthetic"):
    """Generated scenes.

    A tiny model gets new questions each time a scene is shown; a model that starts from a
    checkpoint gets one fixed question per scene.

    Attributes:
        preset: difficulty preset of the scenes.
        num_training_scenes: number of training scenes.
        num_held_out_scenes: number of held-out scenes, one question each.
        num_no_match_scenes: number of further held-out scenes with a no-match question each.
    """

    preset: Literal["plain", "full"] = "plain"
    num_training_scenes: Positive = 36_000
    num_held_out_scenes: Positive = 1024
    num_no_match_scenes: Count = 256


class ExampleData(Record, frozen=True, tag_field="kind", tag="examples"):
    """Example files (image, instruction, masks, reasoning), or public data sets by name.

    Attributes:
        training: file of training examples, or a data set, as in ``refcoco:train``.
        held_out: file of held-out examples, or a data set.
        features: folder of image embeddings, as ``coprs-deploy features`` writes it; empty
            computes them in every step.
    """

    training: str
    held_out: str
    features: str = ""


class Optimizer(Record, frozen=True):
    """Optimizer and learning-rate schedule.

    Attributes:
        learning_rate: peak learning rate.
        lr_multipliers: learning-rate multipliers by a part of a parameter's name (``prior``,
            ``prompt_encoder``, ``mask_decoder``, ``image_encoder``, ``policy``).
        name: ``muon`` (Muon for hidden matrices, AdamW for the rest) or ``adamw``.
        weight_decay: decoupled weight decay.
        betas: AdamW's betas.
        max_grad_norm: largest norm of the whole gradient; 0 does not clip it.
        warmup_steps: steps of linear warm-up.
        lr_decay_type: ``linear`` or ``cosine``.
        lr_decay_ratio: share of the steps, at the end, over which the learning rate decays.
        min_lr_ratio: final learning rate as a share of the peak.
    """

    learning_rate: Annotated[float, Meta(gt=0)] = 2e-3
    lr_multipliers: dict[str, Weight] = {}
    name: Literal["muon", "adamw"] = "muon"
    weight_decay: Weight = 0.01
    betas: tuple[Momentum, Momentum] = (0.9, 0.98)
    max_grad_norm: Weight = 1.0
    warmup_steps: Count = 60
    lr_decay_type: Literal["linear", "cosine"] = "linear"
    lr_decay_ratio: Share = 0.6
    min_lr_ratio: Share = 0.02


class StageSettings(Record, frozen=True):
    """Settings of every stage.

    Attributes:
        max_steps: number of weight updates.
        global_batch_size: images per update, over all processes together.
        optimizer: optimizer and learning-rate schedule.
        eval_steps: steps between two evaluations; 0 evaluates at the end only.
        num_eval_examples: held-out scenes or examples per evaluation.
        thresholds: acceptance thresholds at the end of the stage, metric to smallest value.
        best_metric: metric of the evaluations during the stage (``eval_steps``) whose largest value
            selects the weights in ``checkpoints/best``; empty for none.
    """

    max_steps: Positive
    global_batch_size: Positive = 32
    optimizer: Optimizer = Optimizer()
    eval_steps: Count = 0
    num_eval_examples: Positive = 256
    thresholds: dict[str, float] = {}
    best_metric: str = ""

    metric_names: ClassVar[tuple[str, ...]] = ()
    """Metrics of an evaluation, without a group in front, as in ``relation.giou``."""

    def __post_init__(self) -> None:
        known = self.metric_names
        for name in self.thresholds:
            if name.rpartition(".")[2] not in known:
                raise ValueError(
                    f"thresholds has {name!r}, and an evaluation measures: {', '.join(known)}"
                )
        if self.best_metric and self.best_metric.rpartition(".")[2] not in known:
            raise ValueError(
                f"best_metric is {self.best_metric!r}; accepted: {', '.join(known)}, or '' for none"
            )

    def batch_text(self) -> str:
        """Return what a step learns from."""
        return f"{self.global_batch_size} examples"


class SupervisedSettings(StageSettings, frozen=True, tag_field="kind", tag="supervised"):
    """Supervised stage on examples: cross-entropy on the response, and segmentation losses.

    Attributes:
        language_loss_weight: weight of the cross-entropy on the response.
        segmentation_loss_weight: weight of the segmentation losses (lambda_SEG); 0 disables them.
        loss_weights: weights of the single segmentation losses.
        train_image_encoder: whether SAM's image encoder is trained.
        truncation_ratio: share of the examples with a target whose reasoning is truncated at a
            random length, so that the masks of a best guess are learned; no loss teaches to end the
            reasoning there.
        allow_missing_responses: whether examples without a response are trained on their
            ``<REF_POS>`` alone, which teaches answers without reasoning; else they are refused.
        num_completions_to_print: held-out examples whose generated responses the report shows.
    """

    metric_names = tuple(TEACHER_FORCED + name for name in MASK_METRICS)

    best_metric: str = f"{TEACHER_FORCED}giou"
    language_loss_weight: Weight = 1.0
    segmentation_loss_weight: Weight = 0.0
    loss_weights: SegmentationLossWeights = SegmentationLossWeights()
    train_image_encoder: bool = False
    truncation_ratio: Share = 0.0
    allow_missing_responses: bool = False
    num_completions_to_print: Count = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.truncation_ratio and not self.segmentation_loss_weight:
            raise ValueError(
                f"truncation_ratio is {self.truncation_ratio:g} and segmentation_loss_weight is 0; "
                "only masks learn from truncated reasoning: set segmentation_loss_weight, or "
                "truncation_ratio=0"
            )


PAPER_OPTIMIZER = Optimizer(
    learning_rate=1.6e-6,
    lr_multipliers={"prior": 25.0, "prompt_encoder": 10.0, "mask_decoder": 5.0},
    name="adamw",
    weight_decay=0.01,
    betas=(0.9, 0.999),
    max_grad_norm=1.0,
    warmup_steps=0,
    lr_decay_type="cosine",
    lr_decay_ratio=1.0,
    min_lr_ratio=1 / 6.7,
)
"""AdamW, cosine decay from the peak to 1/6.7 of it, without warm-up (paper, B.3)."""


LORA_TARGETS = (
    r".*language_model\.layers\.\d+\."
    r"(self_attn\.(q|k|v|o)_proj|mlp\.(gate_proj|up_proj|down_proj))"
)
"""Language-model matrices that get adapters, in both policy families."""


class Lora(Record, frozen=True):
    """LoRA adapters on the language model, merged into the finished checkpoint (PEFT's keys).

    Attributes:
        r: rank of each adapter; 0 trains the whole policy instead.
        lora_alpha: numerator of the output scale ``lora_alpha / r``.
        lora_dropout: dropout probability on the adapter's input.
    """

    r: Count = 0
    lora_alpha: Annotated[float, Meta(gt=0)] = 32.0
    lora_dropout: Momentum = 0.0


class GrpoSettings(StageSettings, frozen=True, tag_field="kind", tag="grpo"):
    """GRPO with segmentation: sample groups of completions, reward format and mask, update.

    ``global_batch_size`` counts prompts: a step learns from
    ``global_batch_size * num_generations`` completions. Keys are TRL's where TRL has them.

    Attributes:
        optimizer: AdamW settings; Muon is not accepted.
        mode: ``joint`` for both losses in one backward pass, ``rl`` for the policy loss alone with
            frozen segmentation modules, ``segmentation`` for the segmentation losses alone.
        num_generations: completions per prompt (G).
        loss_type: ``grpo``, or ``dapo`` for the mean over all tokens of the batch.
        importance_sampling_level: one ratio per ``token``, or per ``sequence`` (GSPO).
        epsilon: clip range of the importance ratio below 1.
        epsilon_high: clip range above 1.
        beta: weight of the KL divergence from the frozen reference (k3 estimator); 0 loads no
            reference.
        entropy_coef: weight of the entropy bonus.
        mask_truncated_completions: whether truncated completions are excluded from the loss.
        num_iterations: updates per rollout.
        per_device_train_batch_size: completions per forward pass of a process; 0 for all of them.
        temperature: sampling temperature.
        top_p: nucleus sampling threshold; 1 is off.
        top_k: number of most likely tokens to sample from; 0 is off.
        max_completion_length: maximum tokens of a completion; 0 for the checkpoint's limit.
        max_targets: maximum number of targets per prompt; an example with more is refused.
        truncation_ratio: share of the prompts with a reasoning budget. Longer reasoning of their
            completions is truncated, the answer is forced, and both are rewarded as they are; the
            policy loss counts sampled tokens only.
        max_reasoning_tokens: largest reasoning budget; each one is drawn from 0 to it, the same for
            all completions of a prompt.
        reward_weights: weights of the mask, the format and the length reward.
        length_reward_tokens: tokens of the reasoning from which on the length reward is 0.
        response_format: format rules of the paper or of its public code.
        segmentation_loss_weight: weight of the segmentation loss, lambda_SEG.
        loss_weights: weights of the segmentation losses among themselves.
        late_loss_weights: the same from ``late_from_step`` on.
        late_from_step: first step of ``late_loss_weights``; 0 for ``loss_weights`` throughout.
        lora: adapters instead of whole weights.
        use_vllm: sample with vLLM instead of transformers.
        vllm_mode: ``colocate`` (engine on the training GPUs) or ``server`` (``vllm serve``).
        vllm_tensor_parallel_size: GPUs per colocated engine.
        vllm_gpu_memory_utilization: share of GPU memory for a colocated engine.
        vllm_enable_sleep_mode: whether a colocated engine frees its memory during the update.
        vllm_server_host: host of the vLLM server.
        vllm_server_port: port of the vLLM server.
        num_completions_to_print: completions written with their masks at each evaluation, and
            held-out examples whose responses the report shows.
    """

    metric_names = (*COMPLETION_METRICS, *MASK_METRICS, "giou_stderr", "reward_stderr")

    optimizer: Optimizer = PAPER_OPTIMIZER
    best_metric: str = "giou"
    mode: Literal["joint", "rl", "segmentation"] = "joint"
    num_generations: Annotated[int, Meta(ge=2)] = 8
    loss_type: Literal["grpo", "dapo"] = "grpo"
    importance_sampling_level: Literal["token", "sequence"] = "token"
    epsilon: Weight = 0.2
    epsilon_high: Weight = 0.2
    beta: Weight = 0.2
    entropy_coef: float = 0.0
    mask_truncated_completions: bool = False
    num_iterations: Positive = 1
    per_device_train_batch_size: Count = 0
    temperature: Annotated[float, Meta(gt=0)] = 1.0
    top_p: PositiveShare = 1.0
    top_k: Count = 0
    max_completion_length: Count = 0
    max_targets: Positive = 1
    truncation_ratio: Share = 0.0
    max_reasoning_tokens: Positive = 64
    reward_weights: RewardWeights = RewardWeights()
    length_reward_tokens: Positive = 128
    response_format: ResponseFormat = ResponseFormat.PAPER
    segmentation_loss_weight: Weight = 0.3
    loss_weights: SegmentationLossWeights = SegmentationLossWeights()
    late_loss_weights: SegmentationLossWeights = SegmentationLossWeights(
        mask_dice=3.0, mask_focal=10.0
    )
    late_from_step: Count = 1500
    lora: Lora = Lora()
    use_vllm: bool = False
    vllm_mode: Literal["colocate", "server"] = "colocate"
    vllm_tensor_parallel_size: Positive = 1
    vllm_gpu_memory_utilization: PositiveShare = 0.35
    vllm_enable_sleep_mode: bool = True
    vllm_server_host: str = "127.0.0.1"
    vllm_server_port: Annotated[int, Meta(ge=1, le=65535)] = 8000
    num_completions_to_print: Count = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.optimizer.name != "adamw":
            raise ValueError(
                f"optimizer.name is {self.optimizer.name!r}; accepted for GRPO: 'adamw'"
            )

    def batch_text(self) -> str:
        """Return what a step learns from."""
        return f"{self.global_batch_size} prompts x {self.num_generations} completions"

    def trains(self, part: str, name: str) -> bool:
        """Return whether it trains a weight: no image encoder, and what its mode says."""
        if part == "segmentation":
            return self.mode != "rl" and not name.startswith("image_encoder.")
        return not self.lora.r or bool(re.match(LORA_TARGETS, name))

    def split_batch(self, num_processes: int) -> tuple[int, int]:
        """Split the completions of a step: completions and number of forward passes of a process.

        Raises:
            ValueError: the completions cannot be split evenly.
        """
        prompts, group = self.global_batch_size, self.num_generations
        total = prompts * group
        if total % num_processes:
            least = num_processes // math.gcd(num_processes, group)
            raise ValueError(
                f"global_batch_size is {prompts}; {prompts} prompts x {group} completions are not "
                f"divisible by {num_processes} processes; accepted: multiples of {least}"
            )
        per_process = total // num_processes
        per_pass = self.per_device_train_batch_size or per_process
        if per_process % per_pass:
            raise ValueError(
                f"per_device_train_batch_size is {per_pass}; accepted: divisors of {per_process}, "
                "the completions of a process"
            )
        return per_pass, per_process // per_pass

    def loss_weights_at(self, step: int) -> SegmentationLossWeights:
        """Return the weights of the segmentation losses in a step, counted from 0."""
        is_late = self.late_from_step and step >= self.late_from_step
        return self.late_loss_weights if is_late else self.loss_weights
