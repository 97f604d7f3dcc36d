"""What a recipe says about GRPO; the defaults are the paper's (section 4.1, appendix B.3)."""

from __future__ import annotations

from typing import Literal

from coprs_deploy.specs import Record
from coprs_deploy.training.losses import SegmentationLossWeights
from coprs_deploy.training.phase_settings import Optimizer, Phase
from coprs_deploy.training.rewards import RewardWeights

Mode = Literal["joint", "rl", "segmentation"]
Algorithm = Literal["grpo", "dapo", "gspo"]

PAPER_OPTIMIZER = Optimizer(
    rate=1.6e-6,
    rate_factors={"prior": 25.0, "prompt_encoder": 10.0, "mask_decoder": 5.0},
    muon=False,
    weight_decay=0.01,
    betas=(0.9, 0.999),
    clip=1.0,
    warm_up_steps=0,
    decay="cosine",
    decay_share=1.0,
    floor=1 / 6.7,
)
"""AdamW under one cycle without a rise, from the peak down to 1/6.7 of it (paper, B.3)."""


class Lora(Record, frozen=True):
    """Low-rank adapters on the language model; they are merged into the finished checkpoint.

    Attributes:
        rank: of each adapter; 0 trains the whole policy instead.
        alpha: the adapter's output is scaled by ``alpha / rank``.
        dropout: on the adapter's input.
    """

    rank: int = 0
    alpha: float = 32.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"rank is {self.rank}; it must be at least 0")


class Rollout(Record, frozen=True):
    """Who writes the sampled responses.

    Attributes:
        engine: ``transformers`` (the policy in training itself), ``vllm_colocated`` (an engine on
            the same GPUs) or ``vllm_server`` (``vllm serve`` elsewhere).
        tensor_parallel: GPUs that share one colocated engine.
        memory_share: share of a GPU's memory that a colocated engine takes.
        sleeps: whether a colocated engine gives its memory back during the update.
        host: of the server.
        port: of the server.
    """

    engine: Literal["transformers", "vllm_colocated", "vllm_server"] = "transformers"
    tensor_parallel: int = 1
    memory_share: float = 0.35
    sleeps: bool = True
    host: str = "127.0.0.1"
    port: int = 8000


class GrpoPhase(Phase, frozen=True, tag_field="kind", tag="grpo"):
    """Responses are sampled in groups, rewarded by form and mask, and learned from.

    ``batch_images`` counts prompts: a step learns from ``batch_images * group_size`` responses.

    Attributes:
        optimizer: how weights move; AdamW only.
        mode: ``joint`` takes both losses in one backward pass, ``rl`` leaves the segmentation
            modules as they are, ``segmentation`` leaves the policy's own loss out.
        group_size: responses sampled for a prompt (G).
        algorithm: ``grpo``, or one of its variants: ``dapo`` divides by all tokens of the batch,
            ``gspo`` takes one importance ratio a response.
        clip_below: how far below 1 the importance ratio counts.
        clip_above: how far above.
        kl_weight: of the divergence from the frozen reference (k3 estimator); 0 needs none.
        entropy_weight: of the entropy that is rewarded.
        skip_truncated: whether a response without an end is left out of the loss.
        updates_per_rollout: steps that learn from the same responses.
        rows_per_pass: responses in one forward pass of a process; 0 takes all of its responses.
        temperature: of the sampling.
        top_p: of the sampling; 1 is off.
        top_k: of the sampling; 0 is off.
        max_response_tokens: longest sampled response; 0 takes the prompt's.
        targets: most targets of one prompt; an example with more is refused.
        reward: how mask and form are mixed.
        segmentation_weight: lambda_SEG.
        weights: of the segmentation losses among themselves.
        later_weights: the same from ``later_from_step`` on.
        later_from_step: 0 keeps ``weights`` throughout.
        lora: adapters instead of whole weights.
        rollout: who writes the responses.
        samples: responses with their masks that are kept as a picture at each look.
    """

    optimizer: Optimizer = PAPER_OPTIMIZER
    mode: Mode = "joint"
    group_size: int = 8
    algorithm: Algorithm = "grpo"
    clip_below: float = 0.2
    clip_above: float = 0.2
    kl_weight: float = 0.2
    entropy_weight: float = 0.0
    skip_truncated: bool = False
    updates_per_rollout: int = 1
    rows_per_pass: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_response_tokens: int = 0
    targets: int = 1
    reward: RewardWeights = RewardWeights()
    segmentation_weight: float = 0.3
    weights: SegmentationLossWeights = SegmentationLossWeights()
    later_weights: SegmentationLossWeights = SegmentationLossWeights(mask_dice=3.0, mask_focal=10.0)
    later_from_step: int = 1500
    lora: Lora = Lora()
    rollout: Rollout = Rollout()
    samples: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (
            ("group_size", 2),
            ("updates_per_rollout", 1),
            ("rows_per_pass", 0),
            ("targets", 1),
            ("later_from_step", 0),
            ("max_response_tokens", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        for name in ("kl_weight", "clip_below", "clip_above", "segmentation_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature}; it must be above 0")
        if self.optimizer.muon:
            raise ValueError("optimizer.muon is set; GRPO moves weights by AdamW: muon = false")

    def loss_weights(self, step: int) -> SegmentationLossWeights:
        """Return the weights of the segmentation losses in a step, counted from 0."""
        is_later = self.later_from_step and step >= self.later_from_step
        return self.later_weights if is_later else self.weights
