"""Memory of a model on a device, and an upper bound of its decoding speed, computed from sizes.

Parameters are counted on a model on the meta device
(:mod:`coprs_deploy.training.planning.estimate`). What a library adds to them is assumed; each
assumption is a constant below. One image is encoded at a time; a request has the paper's 1,300
prompt tokens and 2,000 response tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import NamedTuple

from coprs_deploy.model_config import SAM_SIZES, SamConfig
from coprs_deploy.training.planning.estimate import (
    BFLOAT16_BYTES,
    GIGABYTE,
    USABLE_MEMORY,
    ModelSizes,
    TransformerSizes,
    Workload,
    model_sizes,
)

CONTEXT_BYTES = 0.5 * GIGABYTE
"""Assumed memory of a process on a GPU before it allocates; the policy's engine and the graphs are
two processes."""

ENGINE_BYTES = 0.5 * GIGABYTE
"""Assumed memory of vLLM's CUDA graphs and workspaces."""

SYSTEM_BYTES = 1.5 * GIGABYTE
"""Assumed memory of the operating system where it shares the GPU's memory (Jetson)."""

OPENVINO_BYTES = 1.0 * GIGABYTE
"""Assumed memory of Python, the libraries and activations on a CPU."""

SCORE_TENSORS = 5
"""Tensors of attention scores that a global block of the image encoder holds at once in ONNX
Runtime: scores, two position terms, their sum and the softmax."""

REQUEST = Workload(rows=1, rows_per_pass=1)
"""One request at its longest."""


class WeightFormat(NamedTuple):
    """Bytes per weight of a policy's parts, and per number of its KV cache.

    ``first_layer`` is the decoder's first one; 0 stands for that of the others. The scales of rows
    (one per some thousand weights) are left out; those of groups are not.
    """

    layers: float
    head: float
    vision: float
    cache: float
    first_layer: float = 0.0

    def decoder_bytes(self, decoder: TransformerSizes) -> float:
        """Return the bytes of the decoder layers."""
        first = (self.first_layer or self.layers) - self.layers
        return (self.layers + first / decoder.num_layers) * decoder.parameters


INT4_BYTES = 0.5 + BFLOAT16_BYTES / 128
"""Bytes of a 4-bit weight with its share of a 16-bit scale per 128."""

GPU_FORMATS: Mapping[str, WeightFormat] = {
    "bf16": WeightFormat(2, 2, 2, 2),
    "fp8, w8a8": WeightFormat(1, 2, 2, 2),
    "w4a16": WeightFormat(INT4_BYTES, 2, 2, 2),
}
"""Formats that vLLM runs; vision tower, embeddings and output head stay bf16."""

OPENVINO_FORMATS: Mapping[str, WeightFormat] = {
    "fp32, bf16": WeightFormat(2, 2, 2, 4),
    "int8": WeightFormat(1, 1, 1, 1),
    "int4": WeightFormat(INT4_BYTES, 1, 1, 1, first_layer=1),
}
"""Precisions of the policy's graphs, for a checkpoint with 16-bit weights."""


class Device(NamedTuple):
    """Memory and peak memory bandwidth of a device, as its maker publishes them."""

    name: str
    memory_gb: float
    bandwidth_gb: float
    is_shared: bool = False

    @property
    def usable_bytes(self) -> float:
        """Memory available to a model."""
        system = SYSTEM_BYTES if self.is_shared else 0.0
        return USABLE_MEMORY * self.memory_gb * GIGABYTE - system


GPUS = (
    Device("RTX 4060", 8, 272),
    Device("RTX 4070", 12, 504),
    Device("RTX 4080", 16, 717),
    Device("L4", 24, 300),
    Device("RTX 4090", 24, 1008),
    Device("L40S", 48, 864),
    Device("A100", 80, 2039),
    Device("H100 SXM", 80, 3350),
)
JETSONS = (
    Device("Orin Nano", 8, 102, is_shared=True),
    Device("Orin NX", 16, 102, is_shared=True),
    Device("AGX Orin", 32, 205, is_shared=True),
    Device("AGX Orin", 64, 205, is_shared=True),
)
CPU_MEMORIES: Mapping[str, float] = {
    f"{channels} x {kind}-{rate}": channels * 8 * rate / 1000
    for channels, kind, rate in ((2, "DDR4", 3200), (2, "DDR5", 5600), (8, "DDR5", 4800))
}
"""Peak bandwidth in GB/s of memory channels of 8 bytes, by their transfers per microsecond."""


@cache
def named_sizes(policy: str, sam: str = "vit_h") -> ModelSizes:
    """Count a model of the named sizes, as in ``coprs-deploy convert --random``.

    Raises:
        ValueError: a name is unknown.
    """
    from coprs_deploy.training.planning.meta_models import build_named
    from coprs_deploy.training.settings import CheckpointModel

    models = build_named(CheckpointModel(policy=policy, sam=sam))
    return model_sizes(models.policy, models.segmentation)


def cache_bytes(sizes: ModelSizes, form: WeightFormat, tokens: float) -> float:
    """Return the bytes of keys and values."""
    return sizes.language.cache_bytes(tokens) * form.cache / BFLOAT16_BYTES


def read_bytes(sizes: ModelSizes, form: WeightFormat) -> float:
    """Return the bytes read per token of one request, in the middle of its response."""
    tokens = REQUEST.prompt_tokens + REQUEST.response_tokens / 2
    weights = form.decoder_bytes(sizes.language) + form.head * sizes.output_embeddings
    return weights + cache_bytes(sizes, form, tokens)


def prefill_bytes(sizes: ModelSizes, activation_size: float) -> float:
    """Return the bytes of the activations while a prompt is read: those of its largest layer."""
    work = REQUEST._replace(activation_size=activation_size)
    patches = work.image_tokens * sizes.patches_per_token
    return max(
        _layer_bytes(sizes.language, work.prompt_tokens, work),
        _layer_bytes(sizes.vision, patches, work),
    )


def _layer_bytes(transformer: TransformerSizes, tokens: float, work: Workload) -> float:
    return transformer._replace(num_layers=1).activation_bytes(tokens, work)


def gpu_policy_bytes(sizes: ModelSizes, form: WeightFormat) -> dict[str, float]:
    """Return the bytes of a policy in vLLM by part, for one request."""
    rest = sizes.policy - sizes.language.parameters - sizes.vision.parameters
    weights = form.decoder_bytes(sizes.language) + form.vision * sizes.vision.parameters
    return {
        "weights": weights + form.head * rest,
        "cache": cache_bytes(sizes, form, REQUEST.row_tokens),
        "activations": prefill_bytes(sizes, BFLOAT16_BYTES),
        "engine": CONTEXT_BYTES + ENGINE_BYTES,
    }


def encoder_bytes(config: SamConfig, size: float) -> float:
    """Return the bytes of an image encoder's activations in ONNX Runtime: a global block's.

    Args:
        config: sizes of the encoder.
        size: bytes per number of an activation.
    """
    cells, width = config.geometry.grid_size**2, config.encoder_embed_dim
    block = TransformerSizes(width, int(config.mlp_ratio * width), width, 1, 0)
    scores = SCORE_TENSORS * config.encoder_num_heads * cells**2 * size
    return scores + _layer_bytes(block, cells, REQUEST._replace(activation_size=size))


def gpu_graph_bytes(sizes: ModelSizes, sam: str) -> float:
    """Return the bytes of the graphs in half precision, with their process.

    ``sizes`` must be those of a model with the encoder ``sam``.
    """
    weights = BFLOAT16_BYTES * (sizes.image_encoder + sizes.segmentation_head)
    return CONTEXT_BYTES + weights + encoder_bytes(SAM_SIZES[sam], BFLOAT16_BYTES)


def openvino_policy_bytes(sizes: ModelSizes, form: WeightFormat) -> dict[str, float]:
    """Return the bytes of a policy's graphs in OpenVINO.

    Returns:
        ``files``: the weight files. ``private``: memory that cannot be dropped: the weights once
        more, in the layout of the products, KV cache and libraries. ``peak``: private memory and
        the mapped file of the decoder, whose pages are given back after the first prompt.
    """
    decoder = form.decoder_bytes(sizes.language) + form.head * sizes.output_embeddings
    files = decoder + form.vision * sizes.vision.parameters
    private = files + cache_bytes(sizes, form, REQUEST.row_tokens) + OPENVINO_BYTES
    return {"files": files, "private": private, "peak": decoder + private}
