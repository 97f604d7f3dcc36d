"""Memory per GPU and time per step of a recipe, estimated before a launch.

Parameters are counted on a model on the meta device, activations by the tensors that a layer keeps
for its gradient (listed below); peaks are tested against measured ones. Times are computed from
multiplications and bytes read at assumed speeds; they were never measured. The policy is sharded
evenly over the GPUs (FSDP2), the segmentation modules are replicated.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from torch import nn

from coprs_deploy.models import SegmentationModel
from coprs_deploy.specs import Record
from coprs_deploy.training.recipe import Recipe
from coprs_deploy.training.settings import ExampleData, GrpoSettings, StageSettings

FLOAT32_BYTES, BFLOAT16_BYTES = 4, 2

HIDDEN_TENSORS = 10
"""Hidden-size tensors that a layer keeps per token: inputs of two norms, their outputs before and
after the weights, and queries, keys, values and output of the attention."""

MLP_TENSORS = 4
"""MLP-size tensors that a layer keeps: gate before and after activation, up projection, product."""

AUTOCAST_RATIO = 0.75
"""Bytes of an activation in bf16 training relative to float32: norms keep float32 copies."""

DECODER_TENSORS = 70
"""Tensors of image-embedding size that prior, prompt encoder and mask decoder keep per target,
those on the mask grid included."""

LOGIT_CHUNK = 256
"""Tokens whose logits over the vocabulary TRL holds at once."""

USABLE_MEMORY = 0.9
"""Share of a GPU's memory available to a peak."""

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
    """Sizes of a stack of transformer layers.

    Attributes:
        hidden_size: hidden size.
        intermediate_size: hidden size of the MLPs.
        kv_size: size of the keys (and of the values) of a token, all KV heads together.
        num_layers: number of layers.
        parameters: parameters of the stack.
    """

    hidden_size: int
    intermediate_size: int
    kv_size: int
    num_layers: int
    parameters: int

    def activation_bytes(self, tokens: float, checkpointing: bool, element: float) -> float:
        """Return the bytes that a forward pass keeps for the backward pass.

        Args:
            tokens: tokens of the forward pass.
            checkpointing: whether a layer keeps its input only and is recomputed.
            element: bytes per number.
        """
        per_token = HIDDEN_TENSORS * self.hidden_size + MLP_TENSORS * self.intermediate_size
        layer = tokens * per_token * element
        if not checkpointing:
            return self.num_layers * layer
        return self.num_layers * tokens * self.hidden_size * element + layer

    def cache_bytes(self, tokens: float) -> float:
        """Return the bytes of the KV cache in bf16."""
        return 2 * self.num_layers * self.kv_size * tokens * BFLOAT16_BYTES


class PolicySizes(NamedTuple):
    """Sizes of a policy.

    Attributes:
        language: language layers.
        vision: vision tower.
        parameters: parameters of the policy, tied embeddings counted once.
        head_parameters: parameters of the output embeddings.
        vocab_size: vocabulary size.
        patches_per_token: vision patches per image token.
    """

    language: TransformerSizes
    vision: TransformerSizes
    parameters: int
    head_parameters: int
    vocab_size: int
    patches_per_token: float


class Workload(NamedTuple):
    """Sizes of a step at its longest.

    Attributes:
        rows: completions (or examples) per step of all GPUs.
        rows_per_pass: rows per forward pass of a GPU.
        rows_per_prompt: completions per prompt.
        prompt_tokens: prompt length, image tokens included.
        image_tokens: image tokens of a prompt.
        response_tokens: response length.
        max_targets: masks per row.
        rollout: sampling backend, ``transformers``, ``colocate`` or ``server``; empty for a
            supervised stage.
        has_reference: whether a frozen reference is loaded.
        adapter_parameters: parameters of the adapters; 0 trains whole weights.
    """

    rows: int
    rows_per_pass: int
    rows_per_prompt: int
    prompt_tokens: int
    image_tokens: int
    response_tokens: int
    max_targets: int
    rollout: Literal["", "transformers", "colocate", "server"] = ""
    has_reference: bool = False
    adapter_parameters: int = 0


class Estimate(Record, frozen=True):
    """Memory per GPU and time per step of a stage.

    Attributes:
        gpus: number of GPUs.
        gpu: assumed GPU.
        memory: bytes per GPU by part; ``peak`` is their largest sum at one time.
        seconds: seconds by part, computed, not measured; ``step`` is their sum.
        fits: whether the peak is below 90 % of the memory.
        notes: remarks.
    """

    gpus: int
    gpu: GpuSpec
    memory: dict[str, float]
    seconds: dict[str, float]
    fits: bool
    notes: tuple[str, ...] = ()


def estimate(recipe: Recipe, gpus: int, gpu: GpuSpec | None = None) -> dict[str, Estimate]:
    """Estimate every stage of a recipe that starts from a checkpoint.

    Args:
        recipe: the recipe.
        gpus: number of GPUs.
        gpu: the GPU; None for the default :class:`GpuSpec`.

    Raises:
        ValueError: the recipe names no sizes of policy and SAM.
    """
    from coprs_deploy.training.run import build_on_meta

    if not (recipe.model.policy and recipe.model.sam):
        raise ValueError(
            f"model.policy is {recipe.model.policy!r} and model.sam is {recipe.model.sam!r}; "
            "--estimate needs the names of both sizes, as in `coprs-deploy convert --random`"
        )
    policy, segmentation = build_on_meta(recipe.model)
    sizes = policy_sizes(policy)
    estimates = {}
    for name, settings in recipe.stages.items():
        stage = _StageEstimator(
            recipe, settings, sizes, segmentation, gpus=gpus, gpu=gpu or GpuSpec()
        )
        estimates[name] = stage.run()
    return estimates


def policy_sizes(policy: nn.Module) -> PolicySizes:
    """Count a policy of either family."""
    config: Any = policy.config
    text, vision = config.text_config, config.vision_config
    inner: Any = policy.model
    tower = getattr(inner, "visual", None)
    if tower is None:
        tower = inner.vision_tower
    depth = getattr(vision, "depth", None) or vision.num_hidden_layers
    head = policy.get_output_embeddings().weight.numel()  # type: ignore[operator]
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    layers = sum(p.numel() for p in inner.language_model.layers.parameters())
    return PolicySizes(
        language=TransformerSizes(
            text.hidden_size,
            text.intermediate_size,
            head_dim * text.num_key_value_heads,
            text.num_hidden_layers,
            layers,
        ),
        vision=TransformerSizes(
            vision.hidden_size,
            vision.intermediate_size,
            vision.hidden_size,
            depth,
            sum(p.numel() for p in tower.parameters()),
        ),
        parameters=sum(p.numel() for p in policy.parameters()),
        head_parameters=head,
        vocab_size=text.vocab_size,
        patches_per_token=float(getattr(vision, "spatial_merge_size", 1) ** 2),
    )


def workload(settings: StageSettings, sizes: PolicySizes, gpus: int) -> Workload:
    """Return the sizes of a step of a stage."""
    prompt, response, image = 1300, 2000, 900  # paper, B.3 and section 3.3
    if not isinstance(settings, GrpoSettings):
        rows = settings.global_batch_size
        return Workload(rows, -(-rows // gpus), 1, prompt, image, response, 1)
    rows = settings.global_batch_size * settings.num_generations
    per_gpu = -(-rows // gpus)
    return Workload(
        rows=rows,
        rows_per_pass=min(per_gpu, settings.per_device_train_batch_size or per_gpu),
        rows_per_prompt=settings.num_generations,
        prompt_tokens=prompt,
        image_tokens=image,
        response_tokens=settings.max_completion_length or response,
        max_targets=settings.max_targets,
        rollout=settings.vllm_mode if settings.use_vllm else "transformers",
        has_reference=settings.beta > 0 and not settings.lora.r,
        adapter_parameters=settings.lora.r * _adapter_width(sizes.language),
    )


def _adapter_width(language: TransformerSizes) -> int:
    """Return the adapter parameters of a rank-1 adapter on all layers."""
    attention = 4 * language.hidden_size + 2 * (language.hidden_size + language.kv_size)
    mlp = 3 * (language.hidden_size + language.intermediate_size)
    return language.num_layers * (attention + mlp)


def activation_bytes(
    sizes: PolicySizes,
    segmentation: SegmentationModel,
    work: Workload,
    checkpointing: bool,
    element: float,
) -> float:
    """Return the bytes of the activations of a forward and backward pass on one GPU."""
    rows = work.rows_per_pass
    tokens = rows * (work.prompt_tokens + work.response_tokens)
    patches = rows * work.image_tokens * sizes.patches_per_token
    geometry = segmentation.config.geometry
    cells = geometry.out_chans * geometry.grid_size**2
    return (
        sizes.language.activation_bytes(tokens, checkpointing, element)
        + sizes.vision.activation_bytes(patches, checkpointing, element)
        + 3 * LOGIT_CHUNK * sizes.vocab_size * FLOAT32_BYTES
        + rows * work.max_targets * DECODER_TENSORS * cells * element
    )


def resident_bytes(
    sizes: PolicySizes,
    segmentation: SegmentationModel,
    work: Workload,
    gpus: int,
    has_features: bool,
) -> dict[str, float]:
    """Return the bytes held per GPU between steps by part; float32 except gathered layers."""
    encoder = sum(p.numel() for p in segmentation.image_encoder.parameters())
    head = sum(p.numel() for p in segmentation.parameters()) - encoder
    shards = 1 if work.adapter_parameters else gpus
    trainable = (work.adapter_parameters or sizes.parameters) / shards + head
    layer = sizes.language.parameters / sizes.language.num_layers
    return {
        "policy": FLOAT32_BYTES * (sizes.parameters / shards + work.adapter_parameters),
        "segmentation": FLOAT32_BYTES * (head + (0 if has_features else encoder)),
        "reference": FLOAT32_BYTES * sizes.parameters / shards if work.has_reference else 0.0,
        "gradients": FLOAT32_BYTES * trainable,
        "optimizer": 2 * FLOAT32_BYTES * trainable,
        "gathered layers": 0.0
        if shards == 1
        else 2 * BFLOAT16_BYTES * max(layer, sizes.head_parameters),
    }


class _StageEstimator:
    """Estimate of one stage; see :class:`Estimate`."""

    def __init__(
        self,
        recipe: Recipe,
        settings: StageSettings,
        sizes: PolicySizes,
        segmentation: SegmentationModel,
        *,
        gpus: int,
        gpu: GpuSpec,
    ) -> None:
        self._settings = settings
        self._sizes = sizes
        self._segmentation = segmentation
        self._gpus = gpus
        self._gpu = gpu
        self._work = workload(settings, sizes, gpus)
        self._checkpointing = recipe.model.gradient_checkpointing
        self._element = FLOAT32_BYTES * (1 if recipe.precision == "fp32" else AUTOCAST_RATIO)
        self._has_features = isinstance(recipe.data, ExampleData) and bool(recipe.data.features)
        self._is_sharded = gpus > 1 and not self._work.adapter_parameters

    def run(self) -> Estimate:
        memory = self._memory()
        notes = []
        if self._work.rollout == "transformers" and self._is_sharded:
            notes.append("each sampled token gathers the sharded policy; use_vllm = true avoids it")
        return Estimate(
            gpus=self._gpus,
            gpu=self._gpu,
            memory=memory,
            seconds=self._seconds(),
            fits=memory["peak"] < USABLE_MEMORY * self._gpu.memory_gb * GIGABYTE,
            notes=tuple(notes),
        )

    def _memory(self) -> dict[str, float]:
        sizes, work = self._sizes, self._work
        memory = resident_bytes(sizes, self._segmentation, work, self._gpus, self._has_features)
        resident = sum(memory.values())
        update = activation_bytes(
            sizes, self._segmentation, work, self._checkpointing, self._element
        )
        rollout, is_kept = self._rollout_bytes()
        memory |= {"activations": update, "rollout (KV cache, engine)": rollout}
        memory["peak"] = resident + max(update + (rollout if is_kept else 0.0), rollout)
        return memory

    def _rollout_bytes(self) -> tuple[float, bool]:
        """Return the bytes of sampling per GPU, and whether they stay during the update."""
        settings, work = self._settings, self._work
        if not isinstance(settings, GrpoSettings) or work.rollout == "server":
            return 0.0, False
        if work.rollout == "colocate":
            share = settings.vllm_gpu_memory_utilization * self._gpu.memory_gb * GIGABYTE
            return share, not settings.vllm_enable_sleep_mode
        tokens = work.rows / self._gpus * (work.prompt_tokens + work.response_tokens)
        return self._sizes.language.cache_bytes(tokens), False

    def _seconds(self) -> dict[str, float]:
        """Return the computed seconds of a step by part."""
        sizes, work, gpu = self._sizes, self._work, self._gpu
        rows = work.rows / self._gpus
        tokens = rows * (work.prompt_tokens + work.response_tokens)
        patches = rows * work.image_tokens * sizes.patches_per_token
        forward = 2 * (sizes.language.parameters * tokens + sizes.vision.parameters * patches)
        logits = 2 * sizes.head_parameters * rows * work.response_tokens
        flops = gpu.teraflops * 1e12 * gpu.flops_utilization
        link = gpu.link_gb * GIGABYTE
        passes = 4 if self._checkpointing else 3
        seconds = {"update": (passes * forward + 3 * logits) / flops}
        if not self._has_features:
            encoder = sum(p.numel() for p in self._segmentation.image_encoder.parameters())
            cells = self._segmentation.config.geometry.grid_size**2
            images = max(1.0, rows / work.rows_per_prompt)
            seconds["image encoder"] = 2 * encoder * cells * images / flops
        if work.rollout:
            seconds |= self._rollout_seconds(forward / flops, (forward + logits) / flops)
        if self._is_sharded:
            times = max(1.0, rows / work.rows_per_pass)
            seconds["communication"] = 3 * BFLOAT16_BYTES * sizes.parameters * times / link
        seconds["step"] = sum(seconds.values())
        return seconds

    def _rollout_seconds(self, forward: float, scoring: float) -> dict[str, float]:
        """Return the computed seconds of sampling and scoring by part.

        Args:
            forward: seconds of a forward pass over all rows, without logits.
            scoring: seconds of the same with logits.
        """
        sizes, work, gpu = self._sizes, self._work, self._gpu
        link = gpu.link_gb * GIGABYTE
        weights = BFLOAT16_BYTES * sizes.parameters
        seconds = {"masks for the reward": forward}
        if work.has_reference or work.adapter_parameters:
            seconds["reference"] = scoring
        if work.rollout != "transformers":
            seconds["log probabilities of the rollout"] = scoring
        read = weights / (gpu.bandwidth_gb * GIGABYTE * gpu.bandwidth_utilization)
        flops = gpu.teraflops * 1e12 * gpu.flops_utilization
        computed = 2 * sizes.parameters * work.rows / self._gpus / flops
        seconds["rollout"] = forward + work.response_tokens * max(read, computed)
        if work.rollout != "transformers":
            seconds["weights to the engine"] = weights / link
        elif self._is_sharded:
            seconds["gathering in the rollout"] = work.response_tokens * weights / link
        return seconds


def estimate_page(estimates: dict[str, Estimate]) -> str:
    """Format estimates as text."""
    return "\n".join(line for name, one in estimates.items() for line in _lines(name, one))


def _lines(name: str, one: Estimate) -> Iterator[str]:
    gpu, peak = one.gpu, one.memory["peak"] / GIGABYTE
    verdict = "fits" if one.fits else "DOES NOT FIT"
    yield f"{name}: {one.gpus} GPUs of {gpu.memory_gb:g} GB, {verdict} (peak {peak:.1f} GB per GPU)"
    for part, size in one.memory.items():
        if size:
            yield f"  {part:<44}{size / GIGABYTE:>10.2f} GB"
    step = one.seconds["step"]
    yield f"  step at the maximum length, computed, not measured: {step:.1f} s"
    for part, seconds in one.seconds.items():
        if part != "step":
            yield f"  {part:<44}{seconds:>10.2f} s"
    yield (
        f"  assumed: {gpu.teraflops:g} TFLOP/s at {gpu.flops_utilization:.0%}, "
        f"{gpu.bandwidth_gb:g} GB/s at {gpu.bandwidth_utilization:.0%}, links {gpu.link_gb:g} GB/s"
    )
    for note in one.notes:
        yield f"  note: {note}"
