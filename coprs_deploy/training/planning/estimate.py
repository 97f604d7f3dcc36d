"""Memory per GPU and time per step of a recipe, estimated before a launch.

Parameters are counted on a model on the meta device, activations by the tensors that a layer keeps
for its gradient (listed below); peaks are tested against measured ones. Times are computed from
multiplications and bytes read at assumed speeds; they were never measured. The policy is sharded
evenly over the GPUs (FSDP2), the segmentation modules are replicated.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from coprs_deploy.models import SegmentationModel
from coprs_deploy.specs import Record
from coprs_deploy.training.planning.meta_models import MetaModels, build_on_meta
from coprs_deploy.training.recipe import Recipe
from coprs_deploy.training.settings import ExampleData, GrpoSettings, StageSettings
from coprs_deploy.training.state import vision_tower

FLOAT32_BYTES, BFLOAT16_BYTES = 4, 2

HIDDEN_TENSORS = 10
"""Hidden-size tensors that a layer keeps per token: inputs of two norms, their outputs before and
after the weights, and queries, keys, values and output of the attention."""

MLP_TENSORS = 4
"""MLP-size tensors that a layer keeps: output of ``gate_proj`` before and after the activation,
output of ``up_proj``, and their product."""

AUTOCAST_RATIO = 0.75
"""Bytes of an activation in bf16 training relative to float32: norms keep float32 copies."""

DECODER_TENSORS = 70
"""Tensors of image-embedding size that prior, prompt encoder and mask decoder keep per target,
those on the mask grid included."""

LOGIT_CHUNK = 256
"""Tokens whose logits over the vocabulary TRL holds at once."""

USABLE_MEMORY = 0.9
"""Share of a GPU's memory available to a peak."""

FINISHED_WEIGHTS = "weights of the finished stage"
"""Part of the disk space that stays until the run ends."""

GIGABYTE = 1e9


class GpuSpec(Record, frozen=True):
    """Peak rates of a GPU and their assumed utilization (by default an A100 with 80 GB).

    Attributes:
        memory_gb: memory in GB.
        teraflops: peak dense bf16 TFLOP/s.
        bandwidth_gb: peak memory bandwidth in GB/s.
        link_gb: bandwidth from the other GPUs in GB/s.
        flops_utilization: share of the peak FLOP/s reached in training.
        bandwidth_utilization: share of the peak bandwidth reached in decoding.
    """

    memory_gb: float = 80.0
    teraflops: float = 312.0
    bandwidth_gb: float = 2039.0
    link_gb: float = 200.0
    flops_utilization: float = 0.35
    bandwidth_utilization: float = 0.5


class TransformerSizes(NamedTuple):
    """Sizes of a stack of transformer layers; ``kv_size`` is the size of the keys of a token."""

    hidden_size: int
    intermediate_size: int
    kv_size: int
    num_layers: int
    parameters: int

    def activation_bytes(self, tokens: float, work: Workload) -> float:
        """Return the bytes that a forward pass over ``tokens`` keeps for the backward pass."""
        per_token = HIDDEN_TENSORS * self.hidden_size + MLP_TENSORS * self.intermediate_size
        layer = tokens * per_token * work.activation_size
        if not work.checkpointing:
            return self.num_layers * layer
        return self.num_layers * tokens * self.hidden_size * work.activation_size + layer

    def cache_bytes(self, tokens: float) -> float:
        """Return the bytes of the KV cache in bf16."""
        return 2 * self.num_layers * self.kv_size * tokens * BFLOAT16_BYTES

    @property
    def adapter_parameters(self) -> int:
        """Parameters of rank-1 adapters on all layers."""
        attention = 4 * self.hidden_size + 2 * (self.hidden_size + self.kv_size)
        return self.num_layers * (attention + 3 * (self.hidden_size + self.intermediate_size))


class ModelSizes(NamedTuple):
    """Sizes of a policy (tied embeddings counted once) and a segmentation path.

    ``segmentation_head`` counts prior, prompt encoder and mask decoder; ``embedding_size`` is
    C * G * G of an image embedding.
    """

    language: TransformerSizes
    vision: TransformerSizes
    policy: int
    output_embeddings: int
    vocab_size: int
    patches_per_token: float
    image_encoder: int
    segmentation_head: int
    grid_cells: int
    embedding_size: int


class Workload(NamedTuple):
    """Sizes of a step at its longest.

    Attributes:
        rows: completions (or examples) per step of all GPUs.
        rows_per_pass: rows per forward pass of a GPU.
        prompt_tokens: prompt length, image tokens included.
        checkpointing: whether a layer keeps its input only and is recomputed.
        activation_size: bytes per number of an activation.
        has_features: whether image embeddings are precomputed.
        grpo: settings of a GRPO stage; None for a supervised one.
    """

    rows: int
    rows_per_pass: int
    prompt_tokens: int = 1300  # paper, B.3 and section 3.3
    image_tokens: int = 900
    response_tokens: int = 2000
    gpus: int = 1
    checkpointing: bool = False
    activation_size: float = FLOAT32_BYTES
    has_features: bool = False
    grpo: GrpoSettings | None = None

    @property
    def row_tokens(self) -> int:
        """Tokens of prompt and response."""
        return self.prompt_tokens + self.response_tokens

    @property
    def lora_rank(self) -> int:
        """Rank of the adapters; 0 trains whole weights."""
        return self.grpo.lora.r if self.grpo else 0

    @property
    def is_sharded(self) -> bool:
        """Whether the policy is sharded; adapters are trained on a replicated one."""
        return self.gpus > 1 and not self.lora_rank

    @property
    def has_reference(self) -> bool:
        """Whether a frozen reference is loaded."""
        return self.grpo is not None and self.grpo.beta > 0 and not self.lora_rank

    @property
    def rollout(self) -> str:
        """``transformers``, ``colocate`` or ``server``; empty for a supervised stage."""
        if self.grpo is None:
            return ""
        return self.grpo.vllm_mode if self.grpo.use_vllm else "transformers"


class Estimate(Record, frozen=True):
    """Memory per GPU, time and disk of a stage.

    Attributes:
        memory: bytes per GPU by part; ``peak`` is their largest sum at one time.
        seconds: seconds of a step by part, computed, not measured; ``step`` is their sum.
        hours: hours of all steps at the maximum length, evaluations included.
        evaluation_hours: share of ``hours`` in evaluations.
        disk: bytes of the run directory by part; ``peak`` is their largest sum at one time.
        fits: whether the peak is below 90 % of the memory.
    """

    gpus: int
    gpu: GpuSpec
    memory: dict[str, float]
    seconds: dict[str, float]
    hours: float
    evaluation_hours: float
    disk: dict[str, float]
    fits: bool
    notes: tuple[str, ...] = ()


def estimate(
    recipe: Recipe, gpus: int, gpu: GpuSpec | None = None, models: MetaModels | None = None
) -> dict[str, Estimate]:
    """Estimate every stage of a recipe that starts from a checkpoint.

    ``models`` are those of the recipe; None builds them.

    Raises:
        CheckpointError: the checkpoint does not exist and the recipe names no sizes, or it cannot
            be used.
        ValueError: the name of a size is unknown.
    """
    models = models or build_on_meta(recipe.model)
    sizes, gpu = model_sizes(models.policy, models.segmentation), gpu or GpuSpec()
    estimates = {}
    for name, settings in recipe.stages.items():
        work = workload(recipe, settings, gpus)
        memory = memory_bytes(sizes, work, gpu)
        fits = memory["peak"] < USABLE_MEMORY * gpu.memory_gb * GIGABYTE
        notes: tuple[str, ...] = ()
        if work.rollout == "transformers" and work.is_sharded:
            notes = ("each sampled token gathers the sharded policy; use_vllm = true avoids it",)
        seconds = step_seconds(sizes, work, gpu)
        evaluation = evaluation_seconds(sizes, work, settings, gpu) / 3600
        hours = settings.max_steps * seconds["step"] / 3600 + evaluation
        disk = disk_bytes(sizes, work, recipe, settings)
        estimates[name] = Estimate(gpus, gpu, memory, seconds, hours, evaluation, disk, fits, notes)
    return estimates


def evaluation_seconds(
    sizes: ModelSizes, work: Workload, settings: StageSettings, gpu: GpuSpec
) -> float:
    """Return the computed seconds of all evaluations of a stage, with the longest responses."""
    count = 1 + (settings.max_steps - 1) // settings.eval_steps if settings.eval_steps else 1
    one = step_seconds(sizes, work._replace(rows=settings.num_eval_examples), gpu)
    if work.grpo is None:
        return count * one["update"] / (4 if work.checkpointing else 3)
    parts = ("rollout", "gathering in the rollout", "masks for the reward", "image encoder")
    return (count + 1) * sum(one.get(part, 0.0) for part in parts)  # one before the first step


def model_sizes(policy: nn.Module, segmentation: SegmentationModel) -> ModelSizes:
    """Count a policy of either family and a segmentation path."""
    config: Any = policy.config
    text, vision = config.text_config, config.vision_config
    layers: Any = policy.model.language_model.layers  # type: ignore[union-attr]
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    depth = getattr(vision, "depth", None) or vision.num_hidden_layers
    width, tower = vision.hidden_size, vision_tower(policy)
    geometry = segmentation.config.geometry
    encoder = _count(segmentation.image_encoder)
    return ModelSizes(
        language=TransformerSizes(
            text.hidden_size,
            text.intermediate_size,
            head_dim * text.num_key_value_heads,
            text.num_hidden_layers,
            _count(layers),
        ),
        vision=TransformerSizes(width, vision.intermediate_size, width, depth, _count(tower)),
        policy=_count(policy),
        output_embeddings=policy.get_output_embeddings().weight.numel(),  # type: ignore[operator]
        vocab_size=text.vocab_size,
        patches_per_token=float(getattr(vision, "spatial_merge_size", 1) ** 2),
        image_encoder=encoder,
        segmentation_head=_count(segmentation) - encoder,
        grid_cells=geometry.grid_size**2,
        embedding_size=geometry.out_chans * geometry.grid_size**2,
    )


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def workload(recipe: Recipe, settings: StageSettings, gpus: int) -> Workload:
    """Return the sizes of a step of a stage."""
    grpo = settings if isinstance(settings, GrpoSettings) else None
    rows = settings.global_batch_size * (grpo.num_generations if grpo else 1)
    per_gpu = -(-rows // gpus)
    work = Workload(
        rows=rows,
        rows_per_pass=per_gpu,
        gpus=gpus,
        checkpointing=recipe.model.gradient_checkpointing,
        activation_size=FLOAT32_BYTES * (1 if recipe.precision == "fp32" else AUTOCAST_RATIO),
        has_features=isinstance(recipe.data, ExampleData) and bool(recipe.data.features),
        grpo=grpo,
    )
    if grpo is None:
        return work
    return work._replace(
        rows_per_pass=min(per_gpu, grpo.per_device_train_batch_size or per_gpu),
        response_tokens=grpo.max_completion_length or work.response_tokens,
    )


def memory_bytes(sizes: ModelSizes, work: Workload, gpu: GpuSpec) -> dict[str, float]:
    """Return the bytes per GPU by part, and their peak."""
    memory = resident_bytes(sizes, work)
    resident = sum(memory.values())
    update, rollout = activation_bytes(sizes, work), 0.0
    is_kept = False
    if work.grpo is not None and work.rollout == "colocate":
        rollout = work.grpo.vllm_gpu_memory_utilization * gpu.memory_gb * GIGABYTE
        is_kept = not work.grpo.vllm_enable_sleep_mode
    elif work.rollout == "transformers":
        rollout = sizes.language.cache_bytes(work.rows / work.gpus * work.row_tokens)
    memory |= {"activations": update, "rollout (KV cache, engine)": rollout}
    memory["peak"] = resident + max(update + (rollout if is_kept else 0.0), rollout)
    return memory


def activation_bytes(sizes: ModelSizes, work: Workload) -> float:
    """Return the bytes of the activations of a forward and backward pass on one GPU."""
    rows, max_targets = work.rows_per_pass, work.grpo.max_targets if work.grpo else 1
    return (
        sizes.language.activation_bytes(rows * work.row_tokens, work)
        + sizes.vision.activation_bytes(rows * work.image_tokens * sizes.patches_per_token, work)
        + 3 * LOGIT_CHUNK * sizes.vocab_size * FLOAT32_BYTES
        + rows * max_targets * DECODER_TENSORS * sizes.embedding_size * work.activation_size
    )


def resident_bytes(sizes: ModelSizes, work: Workload) -> dict[str, float]:
    """Return the bytes held per GPU between steps by part; float32 except gathered layers."""
    head, adapters = sizes.segmentation_head, work.lora_rank * sizes.language.adapter_parameters
    shards = work.gpus if work.is_sharded else 1
    trainable = (adapters or sizes.policy) / shards + head
    layer = sizes.language.parameters / sizes.language.num_layers
    gathered = 2 * BFLOAT16_BYTES * max(layer, sizes.output_embeddings)
    return {
        "policy": FLOAT32_BYTES * (sizes.policy / shards + adapters),
        "segmentation": FLOAT32_BYTES * (head + (0 if work.has_features else sizes.image_encoder)),
        "reference": FLOAT32_BYTES * sizes.policy / shards if work.has_reference else 0.0,
        "gradients": FLOAT32_BYTES * trainable,
        "optimizer": 2 * FLOAT32_BYTES * trainable,
        "gathered layers": gathered if work.is_sharded else 0.0,
    }


def disk_bytes(
    sizes: ModelSizes, work: Workload, recipe: Recipe, settings: StageSettings
) -> dict[str, float]:
    """Return the bytes of the files of a stage, and their peak: while a state replaces another.

    States and checkpoints are written before old ones are removed.
    """
    segmentation = sizes.segmentation_head + sizes.image_encoder
    weights = sizes.policy + segmentation
    trained = work.lora_rank * sizes.language.adapter_parameters or sizes.policy
    trained += sizes.segmentation_head
    # The trainer of supervised stages saves all weights, TRL's those that are trained.
    saved = trained if work.grpo else weights
    state = FLOAT32_BYTES * (saved + 2 * trained)
    size = FLOAT32_BYTES if recipe.save_dtype == "float32" else BFLOAT16_BYTES
    kept = min(recipe.save_total_limit, settings.max_steps // recipe.save_steps)
    checkpoint = size * weights
    disk = {
        "states to resume from": float(max(1, kept) * state),  # one when a signal stops the run
        "checkpoints while it runs": float((kept + (settings.eval_steps > 0)) * checkpoint),
        FINISHED_WEIGHTS: float(FLOAT32_BYTES * weights),
        "checkpoint": float(checkpoint),
    }
    disk["peak"] = sum(disk.values()) + (max(state, checkpoint) if kept else 0)
    return disk


def step_seconds(sizes: ModelSizes, work: Workload, gpu: GpuSpec) -> dict[str, float]:
    """Return the computed seconds of a step by part, and their sum."""
    rows = work.rows / work.gpus
    patches = rows * work.image_tokens * sizes.patches_per_token
    flops = gpu.teraflops * 1e12 * gpu.flops_utilization
    link = gpu.link_gb * GIGABYTE
    policy_bytes = BFLOAT16_BYTES * sizes.policy
    layers = sizes.language.parameters * rows * work.row_tokens + sizes.vision.parameters * patches
    forward = 2 * layers / flops
    logits = 2 * sizes.output_embeddings * rows * work.response_tokens / flops
    scoring = forward + logits
    seconds = {"update": (4 if work.checkpointing else 3) * forward + 3 * logits}
    if not work.has_features:
        images = max(1.0, rows / (work.grpo.num_generations if work.grpo else 1))
        seconds["image encoder"] = 2 * sizes.image_encoder * sizes.grid_cells * images / flops
    if work.rollout:
        seconds["masks for the reward"] = forward
        if work.has_reference or work.lora_rank:
            seconds["reference"] = scoring
        if work.rollout != "transformers":
            seconds["log probabilities of the rollout"] = scoring
            seconds["weights to the engine"] = policy_bytes / link
        elif work.is_sharded:
            seconds["gathering in the rollout"] = work.response_tokens * policy_bytes / link
        read = policy_bytes / (gpu.bandwidth_gb * GIGABYTE * gpu.bandwidth_utilization)
        token = max(read, 2 * sizes.policy * rows / flops)
        seconds["rollout"] = forward + work.response_tokens * token
    if work.is_sharded:
        passes = max(1.0, rows / work.rows_per_pass)
        seconds["communication"] = 3 * policy_bytes * passes / link
    seconds["step"] = sum(seconds.values())
    return seconds
