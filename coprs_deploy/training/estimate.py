"""What a recipe needs: memory of each GPU and time of a step, before anything is launched.

Everything follows from sizes: parameters are counted on a model without memory, activations from
the tensors that a layer keeps for its gradient (listed below), time from multiplications and bytes
that must be read. Speeds are assumptions, and stand in the result. The policy is sharded evenly
over the GPUs (FSDP2), the segmentation modules are whole on each.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from coprs_deploy.models import SegmentationModel
from coprs_deploy.specs import Record
from coprs_deploy.training.recipe import Recipe
from coprs_deploy.training.settings import CheckpointModel, ExampleData, GrpoSettings, StageSettings

FULL, HALF = 4, 2
"""Bytes of a float32 and of a bfloat16."""

WIDE_TENSORS = 10
"""Tensors of the model's width that a layer keeps a token: the inputs of two norms, what they give
before and after their weights, and queries, keys, values and result of attention."""

MLP_TENSORS = 4
"""Tensors of the MLP's width: gate before and after its activation, other branch, product."""

UNDER_AUTOCAST = 0.75
"""Bytes of an activation in bf16 training, as a share of float32: norms keep float32 copies."""

DECODER_TENSORS = 70
"""Tensors of the size of an image embedding that prior, prompt encoder and mask decoder keep for
one target, those on the mask grid included."""

LOG_PROBABILITY_CHUNK = 256
"""Tokens whose scores over the vocabulary TRL holds at once."""

ROOM = 0.9
"""Share of a GPU's memory that a peak may take."""

GIGABYTE = 1e9


class Gpu(Record, frozen=True):
    """A card, and how much of what it promises is reached: assumptions, not measurements.

    Attributes:
        memory_gb: its memory.
        teraflops: dense bf16 products a second, in 1e12.
        bandwidth_gb: bytes read from memory a second, in 1e9.
        link_gb: bytes received from the other GPUs a second, in 1e9.
        share_of_flops: reached in training.
        share_of_bandwidth: reached in decoding.
    """

    memory_gb: float = 80.0
    teraflops: float = 312.0
    bandwidth_gb: float = 2039.0
    link_gb: float = 200.0
    share_of_flops: float = 0.35
    share_of_bandwidth: float = 0.5


class Cards(NamedTuple):
    """Equal GPUs that share the work: how many, and of what kind."""

    number: int
    gpu: Gpu


class TransformerSizes(NamedTuple):
    """One stack of transformer layers.

    Attributes:
        width: of the residual stream.
        mlp_width: of its MLPs.
        key_width: of keys (and values) a token, over all heads that have their own.
        depth: layers.
        parameters: of the whole stack.
    """

    width: int
    mlp_width: int
    key_width: int
    depth: int
    parameters: int

    def activation_bytes(self, tokens: float, checkpointing: bool, element: float) -> float:
        """Count what a forward pass keeps for the backward pass.

        Args:
            tokens: that run through the stack at once.
            checkpointing: whether a layer keeps its input only and is computed again.
            element: bytes of a number.
        """
        layer = tokens * (WIDE_TENSORS * self.width + MLP_TENSORS * self.mlp_width) * element
        if not checkpointing:
            return self.depth * layer
        return self.depth * tokens * self.width * element + layer

    def cache_bytes(self, tokens: float) -> float:
        """Count keys and values of all layers, in bf16."""
        return 2 * self.depth * self.key_width * tokens * HALF


class PolicySizes(NamedTuple):
    """What is counted of a policy.

    Attributes:
        language: its language layers.
        vision: its vision tower.
        parameters: all of them, a tied table once.
        head_parameters: of the table that gives scores.
        vocabulary: tokens.
        patches_a_token: vision patches behind one image token.
    """

    language: TransformerSizes
    vision: TransformerSizes
    parameters: int
    head_parameters: int
    vocabulary: int
    patches_a_token: float


class Workload(NamedTuple):
    """What a step does.

    Attributes:
        rows: responses (or examples) a step of all GPUs.
        rows_a_pass: rows of one forward pass of one GPU.
        rows_a_prompt: responses of one prompt.
        prompt_tokens: longest prompt, image tokens included.
        image_tokens: those of the image.
        response_tokens: longest response.
        targets: masks of a row.
        engine: who samples responses first, as a recipe names it; empty where nobody does.
        has_reference: whether a frozen reference is held.
        adapter_parameters: of adapters; 0 trains whole weights.
    """

    rows: int
    rows_a_pass: int
    rows_a_prompt: int
    prompt_tokens: int
    image_tokens: int
    response_tokens: int
    targets: int
    engine: str
    has_reference: bool
    adapter_parameters: int


class Estimate(Record, frozen=True):
    """Memory of one GPU in bytes, and seconds of one step.

    Attributes:
        gpus: that share the work.
        gpu: assumptions about each.
        memory: part to bytes; ``peak`` is what must fit.
        seconds: part to seconds; ``step`` is their sum.
        fits: whether the peak is below nine tenths of the memory.
        notes: what else to know.
    """

    gpus: int
    gpu: Gpu
    memory: dict[str, float]
    seconds: dict[str, float]
    fits: bool
    notes: tuple[str, ...] = ()


def estimate(recipe: Recipe, gpus: int, gpu: Gpu | None = None) -> dict[str, Estimate]:
    """Estimate every phase of a recipe that starts from a checkpoint.

    Args:
        recipe: the run.
        gpus: that share it.
        gpu: the card; an A100 with 80 GB by default.

    Raises:
        ValueError: the recipe builds a small model, whose needs are those of any machine.
    """
    from coprs_deploy.training.run import build_on_meta

    model = recipe.model
    if not isinstance(model, CheckpointModel) or not model.policy:
        raise ValueError(
            "an estimate needs a recipe with model.policy and model.sam, the names of sizes; a "
            "small model trains on any machine"
        )
    policy, segmentation = build_on_meta(model)
    sizes = policy_sizes(policy)
    estimates = {}
    for name, phase in recipe.phases.items():
        cards = Cards(gpus, gpu or Gpu())
        estimates[name] = _estimate_phase(sizes, segmentation, phase, recipe, cards)
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
        vocabulary=text.vocab_size,
        patches_a_token=float(getattr(vision, "spatial_merge_size", 1) ** 2),
    )


def workload(phase: StageSettings, sizes: PolicySizes, gpus: int) -> Workload:
    """Say what a step of a phase does, at its longest."""
    prompt, response, image = 1300, 2000, 900  # paper, B.3 and section 3.3
    if not isinstance(phase, GrpoSettings):
        rows = phase.global_batch_size
        mine = -(-rows // gpus)
        return Workload(rows, mine, 1, prompt, image, response, 1, "", False, 0)
    rows = phase.global_batch_size * phase.num_generations
    mine = -(-rows // gpus)
    adapters = 0
    if phase.lora.rank:
        language = sizes.language
        ends = 4 * language.width + 2 * (language.width + language.key_width)
        ends += 3 * (language.width + language.mlp_width)
        adapters = phase.lora.rank * language.depth * ends
    return Workload(
        rows=rows,
        rows_a_pass=min(mine, phase.per_device_train_batch_size or mine),
        rows_a_prompt=phase.num_generations,
        prompt_tokens=prompt,
        image_tokens=image,
        response_tokens=phase.max_response_tokens or response,
        targets=phase.targets,
        engine=phase.rollout.engine,
        has_reference=phase.beta > 0 and not phase.lora.rank,
        adapter_parameters=adapters,
    )


def training_bytes(
    sizes: PolicySizes,
    segmentation: SegmentationModel,
    work: Workload,
    checkpointing: bool,
    element: float,
) -> float:
    """Count the activations of one forward and backward pass on one GPU."""
    rows = work.rows_a_pass
    tokens = rows * (work.prompt_tokens + work.response_tokens)
    patches = rows * work.image_tokens * sizes.patches_a_token
    geometry = segmentation.config.geometry
    cells = geometry.out_chans * geometry.grid_size**2
    return (
        sizes.language.activation_bytes(tokens, checkpointing, element)
        + sizes.vision.activation_bytes(patches, checkpointing, element)
        + 3 * LOG_PROBABILITY_CHUNK * sizes.vocabulary * FULL
        + rows * work.targets * DECODER_TENSORS * cells * element
    )


def standing_bytes(
    sizes: PolicySizes,
    segmentation: SegmentationModel,
    work: Workload,
    gpus: int,
    has_features: bool,
) -> dict[str, float]:
    """Count what one GPU holds between two steps, in float32 but for what is gathered."""
    encoder = sum(p.numel() for p in segmentation.image_encoder.parameters())
    head = sum(p.numel() for p in segmentation.parameters()) - encoder
    shards = 1 if work.adapter_parameters else gpus
    moved = (work.adapter_parameters or sizes.parameters) / shards + head
    layer = sizes.language.parameters / sizes.language.depth
    return {
        "policy": FULL * (sizes.parameters / shards + work.adapter_parameters),
        "segmentation": FULL * (head + (0 if has_features else encoder)),
        "reference": FULL * sizes.parameters / shards if work.has_reference else 0.0,
        "gradients": FULL * moved,
        "optimizer": 2 * FULL * moved,
        "gathered layers": 0.0 if shards == 1 else 2 * HALF * max(layer, sizes.head_parameters),
    }


def _estimate_phase(
    sizes: PolicySizes,
    segmentation: SegmentationModel,
    phase: StageSettings,
    recipe: Recipe,
    cards: Cards,
) -> Estimate:
    model, work, gpus = recipe.model, workload(phase, sizes, cards.number), cards.number
    assert isinstance(model, CheckpointModel)
    has_features = isinstance(recipe.data, ExampleData) and bool(recipe.data.features)
    element = FULL if recipe.precision == "fp32" else FULL * UNDER_AUTOCAST
    memory = standing_bytes(sizes, segmentation, work, gpus, has_features)
    standing = sum(memory.values())
    update = training_bytes(sizes, segmentation, work, model.gradient_checkpointing, element)
    rollout, always = _rollout_bytes(phase, sizes, work, cards)
    memory |= {"activations": update, "rollout (KV cache, engine)": rollout}
    memory["peak"] = standing + max(update + (rollout if always else 0.0), rollout)
    notes = []
    if work.engine == "transformers" and gpus > 1 and not work.adapter_parameters:
        notes.append("each sampled token gathers the sharded policy; rollout.engine knows others")
    return Estimate(
        gpus=gpus,
        gpu=cards.gpu,
        memory=memory,
        seconds=_seconds(sizes, segmentation, work, recipe, cards),
        fits=memory["peak"] < ROOM * cards.gpu.memory_gb * GIGABYTE,
        notes=tuple(notes),
    )


def _rollout_bytes(
    phase: StageSettings, sizes: PolicySizes, work: Workload, cards: Cards
) -> tuple[float, bool]:
    """Count what sampling takes on one GPU, and say whether it keeps it during the update."""
    if not isinstance(phase, GrpoSettings) or work.engine == "vllm_server":
        return 0.0, False
    if work.engine == "vllm_colocated":
        share = phase.rollout.memory_share * cards.gpu.memory_gb * GIGABYTE
        return share, not phase.rollout.sleeps
    tokens = work.rows / cards.number * (work.prompt_tokens + work.response_tokens)
    return sizes.language.cache_bytes(tokens), False


def _seconds(
    sizes: PolicySizes,
    segmentation: SegmentationModel,
    work: Workload,
    recipe: Recipe,
    cards: Cards,
) -> dict[str, float]:
    model, gpu = recipe.model, cards.gpu
    assert isinstance(model, CheckpointModel)
    mine = work.rows / cards.number
    tokens = mine * (work.prompt_tokens + work.response_tokens)
    patches = mine * work.image_tokens * sizes.patches_a_token
    forward = 2 * (sizes.language.parameters * tokens + sizes.vision.parameters * patches)
    scores = 2 * sizes.head_parameters * mine * work.response_tokens
    speed = gpu.teraflops * 1e12 * gpu.share_of_flops
    link = gpu.link_gb * GIGABYTE
    is_sharded = cards.number > 1 and not work.adapter_parameters
    passes = 4 if model.gradient_checkpointing else 3
    seconds = {"update": (passes * forward + 3 * scores) / speed}
    if not (isinstance(recipe.data, ExampleData) and recipe.data.features):
        encoder = sum(p.numel() for p in segmentation.image_encoder.parameters())
        cells = segmentation.config.geometry.grid_size**2
        images = max(1.0, mine / work.rows_a_prompt)
        seconds["image encoder"] = 2 * encoder * cells * images / speed
    if work.engine:
        seconds["masks for the reward"] = forward / speed
        if work.has_reference or work.adapter_parameters:
            seconds["reference"] = (forward + scores) / speed
        if work.engine != "transformers":
            seconds["sampled tokens again"] = (forward + scores) / speed
        read = HALF * sizes.parameters / (gpu.bandwidth_gb * GIGABYTE * gpu.share_of_bandwidth)
        computed = 2 * sizes.parameters * mine / speed
        seconds["rollout"] = forward / speed + work.response_tokens * max(read, computed)
        if work.engine == "transformers" and is_sharded:
            gathered = work.response_tokens * HALF * sizes.parameters
            seconds["gathering in the rollout"] = gathered / link
        elif work.engine != "transformers":
            seconds["weights to the engine"] = HALF * sizes.parameters / link
    if is_sharded:
        times = max(1.0, mine / work.rows_a_pass)
        seconds["communication"] = 3 * HALF * sizes.parameters * times / link
    seconds["step"] = sum(seconds.values())
    return seconds


def estimate_page(estimates: dict[str, Estimate]) -> str:
    """Lay estimates out for people."""
    lines = []
    for name, found in estimates.items():
        gpu = found.gpu
        lines += [
            f"{name}: {found.gpus} GPUs of {gpu.memory_gb:g} GB, "
            f"{'fits' if found.fits else 'DOES NOT FIT'} (peak "
            f"{found.memory['peak'] / GIGABYTE:.1f} GB on each)",
            *(
                f"  {part:<44}{size / GIGABYTE:>10.2f} GB"
                for part, size in found.memory.items()
                if size
            ),
            f"  a step, at the longest responses: {found.seconds['step']:.1f} s",
            *(
                f"  {part:<44}{time:>10.2f} s"
                for part, time in found.seconds.items()
                if part != "step"
            ),
            f"  assumed: {gpu.teraflops:g} TFLOP/s at {gpu.share_of_flops:.0%}, "
            f"{gpu.bandwidth_gb:g} GB/s at {gpu.share_of_bandwidth:.0%}, "
            f"links {gpu.link_gb:g} GB/s",
            *(f"  note: {note}" for note in found.notes),
        ]
    return "\n".join(lines)
