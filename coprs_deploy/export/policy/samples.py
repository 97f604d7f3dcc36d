"""Responses of a policy to instructions, and what the decoder of its graphs read for them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from coprs_deploy.checkpoint import Checkpoint
from coprs_deploy.data.examples import Example
from coprs_deploy.engines.openvino_runner import DEVICE, openvino_core
from coprs_deploy.export.policy.compression import DecoderInput
from coprs_deploy.images import RgbArray, fit_pixel_count
from coprs_deploy.policy.greedy import GreedyPolicy
from coprs_deploy.policy.openvino_policy.graphs import (
    DECODER_FILE,
    EmbeddingTable,
    VisionTower,
    decoder_tensors,
    read_description,
)
from coprs_deploy.policy.openvino_policy.policy import OpenVinoPolicy
from coprs_deploy.policy.policy import PolicyRequest

MAX_TOKENS = 96
"""Tokens of a response that are compared; the longest of the demo model has 77."""

LARGE_DECODER_BYTES = 1_000_000_000
"""Size of the decoder's weights from which only ``MAX_TOKENS_LARGE`` tokens are compared."""

MAX_TOKENS_LARGE = 32
"""The same for policies of real size, which take minutes for more."""


@dataclass(frozen=True)
class PolicySample:
    """One instruction and the response of the candidate.

    Attributes:
        image: (H, W, 3) uint8.
        instruction: what to segment.
        prompt_ids: tokens of the prompt.
        token_ids: tokens of the response; ``<REF_POS>`` is appended if there is none.
        num_written: how many of them the candidate chose.
        states: (len(token_ids), D) hidden states.
    """

    image: RgbArray
    instruction: str
    prompt_ids: Sequence[int]
    token_ids: Sequence[int]
    num_written: int
    states: NDArray[np.float32]


def decode_samples(
    checkpoint: Checkpoint, graphs: Path, examples: Iterable[Example]
) -> list[PolicySample]:
    """Decode responses with the graphs, up to the first ``<REF_POS>``."""
    limits, prompt = checkpoint.config.policy_image, checkpoint.config.prompt
    weights = (graphs / DECODER_FILE).with_suffix(".bin").stat().st_size
    max_tokens = MAX_TOKENS if weights < LARGE_DECODER_BYTES else MAX_TOKENS_LARGE
    with OpenVinoPolicy(graphs, prompt, limits.min_pixels, limits.max_pixels) as policy:
        return [decode_sample(policy, example, max_tokens) for example in examples]


def decode_sample(
    policy: GreedyPolicy, example: Example, max_tokens: int = MAX_TOKENS
) -> PolicySample:
    """Decode the response to an example's instruction, up to the first ``<REF_POS>``."""
    reference_id, ends = policy.tokens.reference_id, policy.tokens.end_ids
    with policy.start(PolicyRequest(example.image, example.instruction)) as decoding:
        tokens, states = list[int](), []
        token, _ = decoding.prefill()
        while len(tokens) < max_tokens and token not in ends:
            tokens.append(token)
            (token,), state = decoding.feed([token])
            states.append(state[0])
            if tokens[-1] == reference_id:
                break
        num_written = len(tokens)
        if reference_id not in tokens:
            tokens.append(reference_id)
            states.append(decoding.feed([reference_id])[1][0])
    return PolicySample(
        example.image,
        example.instruction,
        decoding.prompt_ids,
        tokens,
        num_written,
        np.array(states),
    )


def decoder_inputs(
    checkpoint: Checkpoint, graphs: Path, samples: Iterable[PolicySample]
) -> Iterator[DecoderInput]:
    """Yield what the decoder reads for each prompt with its response, by the vision graph."""
    description = read_description(graphs)
    vision = VisionTower(graphs, description, description.settings)
    embed = EmbeddingTable(graphs)
    limits = checkpoint.config.policy_image
    for sample in samples:
        image = fit_pixel_count(sample.image, limits.min_pixels, limits.max_pixels)
        ids = [*sample.prompt_ids, *sample.token_ids]
        is_image = np.asarray(ids) == description.image_token_id
        embeddings = np.array(embed(ids))
        embeddings[is_image] = vision(image)
        yield embeddings, vision.positions(is_image, vision.grid(image))


def layer_outputs(
    graphs: Path, embeddings: NDArray[np.float32], positions: NDArray[np.int64]
) -> list[NDArray[np.float32]]:
    """Return the (D,) last row after each layer of the decoder graph, of the last after the norm.

    Args:
        graphs: directory of the policy's graphs.
        embeddings: (L, D).
        positions: (3, L) or (1, L).
    """
    core = openvino_core()
    decoder = core.read_model(graphs / DECODER_FILE)
    norms = [
        node
        for node in decoder.get_ordered_ops()
        if node.get_type_name() == "Power" and "input_layernorm" in node.get_friendly_name()
    ]
    # What a layer's first norm squares is the output of the layer before it.
    decoder.add_outputs([node.input_value(0) for node in norms[1:]])
    compiled = core.compile_model(decoder, DEVICE, read_description(graphs).settings)
    outputs = compiled.create_infer_request().infer(decoder_tensors(embeddings, positions))
    _, hidden, *rows = outputs.values()
    return [*(each[0, -1].copy() for each in rows), hidden[0].copy()]
