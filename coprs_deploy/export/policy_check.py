"""Equivalence check of a policy: tokens, hidden states and masks against PyTorch.

The candidate (graphs, or quantized weights) responds to instructions. PyTorch then reads each
prompt with that response in one float32 pass, whatever the stored dtype, which gives the token that
it would have chosen at each position. Graphs are closed before PyTorch maps the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from coprs_deploy.bundle import PolicyEquivalence
from coprs_deploy.checkpoint import Checkpoint
from coprs_deploy.data.examples import Example
from coprs_deploy.data.synthetic.examples import held_out_examples
from coprs_deploy.data.synthetic.presets import PRESETS
from coprs_deploy.evaluation.metrics import count_pixels, iou
from coprs_deploy.export.equivalence import cosine_similarity, reference_opener
from coprs_deploy.export.policy_graphs import load_policy
from coprs_deploy.export.tolerances import PolicyTolerance
from coprs_deploy.images import RgbArray, fit_pixel_count, prepare_image
from coprs_deploy.policy.greedy import GreedyPolicy
from coprs_deploy.policy.openvino_policy.graphs import DECODER_FILE
from coprs_deploy.policy.openvino_policy.policy import OpenVinoPolicy
from coprs_deploy.policy.policy import PolicyRequest
from coprs_deploy.policy.vision_inputs import VisionProcessor
from coprs_deploy.specs import IMAGE_ENCODER, MASK_DECODER, PRIOR, graph_specs

NUM_SAMPLES = 4
"""Generated scenes with one instruction each."""

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


def compare_policy(
    checkpoint: Checkpoint,
    graphs: Path,
    tolerance: PolicyTolerance,
    report: Callable[[str], None],
    first_seed: int = 0,
) -> PolicyEquivalence:
    """Compare a policy's graphs with PyTorch, on instructions about generated scenes.

    Args:
        checkpoint: weights of policy and segmentation model.
        graphs: directory of the policy's graphs.
        tolerance: limits.
        report: called with the name of each step as it starts.
        first_seed: seed of the first scene.
    """
    report("candidate policy")
    samples = decode_samples(checkpoint, graphs, first_seed)
    return compare_samples(checkpoint, samples, tolerance, report)


def compare_samples(
    checkpoint: Checkpoint,
    samples: Sequence[PolicySample],
    tolerance: PolicyTolerance,
    report: Callable[[str], None],
) -> PolicyEquivalence:
    """Compare the responses of a candidate with PyTorch; arguments as :func:`compare_policy`."""
    report("reference policy")
    expected, chosen = read_in_float32(checkpoint, samples)
    report("policy masks")
    concentrations = [[s.states[-1], e[-1]] for s, e in zip(samples, expected, strict=True)]
    found_masks, expected_masks = decode_masks(checkpoint, samples, concentrations)
    differences = [found - wanted for found, wanted in concentrations]
    scale = max(float(np.abs(states[-1]).max()) for states in expected)
    equal = [
        int(written == wanted)
        for sample, tokens in zip(samples, chosen, strict=True)
        for written, wanted in zip(sample.token_ids[: sample.num_written], tokens, strict=False)
    ]
    values = {
        "relative_error": max(float(np.abs(d).max()) for d in differences) / scale,
        "mean_error": max((float(d.mean()) for d in differences), key=abs) / scale,
        "cosine": min(cosine_similarity(found, wanted) for found, wanted in concentrations),
        "token_agreement": float(np.mean(equal)),
        "mask_iou": iou(count_pixels(found_masks, expected_masks), empty=1.0),
    }
    return PolicyEquivalence(
        inputs=len(samples), tokens=len(equal), passed=tolerance.accepts(values), **values
    )


def decode_samples(checkpoint: Checkpoint, graphs: Path, first_seed: int = 0) -> list[PolicySample]:
    """Decode responses to instructions about generated scenes with the graphs."""
    limits, prompt = checkpoint.config.policy_image, checkpoint.config.prompt
    weights = (graphs / DECODER_FILE).with_suffix(".bin").stat().st_size
    max_tokens = MAX_TOKENS if weights < LARGE_DECODER_BYTES else MAX_TOKENS_LARGE
    with OpenVinoPolicy(graphs, prompt, limits.min_pixels, limits.max_pixels) as policy:
        scenes = held_out_examples(PRESETS["plain"], NUM_SAMPLES, 0, first_seed)
        return [decode_sample(policy, scene, max_tokens) for scene in scenes]


def decode_sample(
    policy: GreedyPolicy, example: Example, max_tokens: int = MAX_TOKENS
) -> PolicySample:
    """Decode the response to an example's instruction, up to the first ``<REF_POS>``."""
    reference_id, ends = policy.tokens.reference_id, policy.tokens.end_ids
    with policy.start(PolicyRequest(example.image, example.instruction)) as decoding:
        tokens, states = list[int](), []
        token = decoding.prefill()
        while len(tokens) < max_tokens and token not in ends:
            tokens.append(token)
            token, state = decoding.feed(token)
            states.append(state)
            if tokens[-1] == reference_id:
                break
        num_written = len(tokens)
        if reference_id not in tokens:
            tokens.append(reference_id)
            states.append(decoding.feed(reference_id)[1])
    return PolicySample(
        example.image,
        example.instruction,
        decoding.prompt_ids,
        tokens,
        num_written,
        np.array(states),
    )


def read_in_float32(
    checkpoint: Checkpoint, samples: Sequence[PolicySample]
) -> tuple[list[NDArray[np.float32]], list[list[int]]]:
    """Read each prompt with its response in one pass of PyTorch.

    Returns:
        Hidden states of the response's tokens, (T, D) each, and the token that PyTorch chooses at
        each of these places.
    """
    model = load_policy(checkpoint.policy_path)
    vision_of = VisionProcessor(checkpoint.policy_path, model.config)
    limits = checkpoint.config.policy_image
    states, chosen = [], []
    for sample in samples:
        pixels = fit_pixel_count(sample.image, limits.min_pixels, limits.max_pixels)
        vision = vision_of(pixels)
        ids = torch.tensor([[*sample.prompt_ids, *sample.token_ids]])
        inputs = dict(vision.tensors)
        if vision.marks_image_tokens:
            inputs["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
        start = len(sample.prompt_ids)
        with torch.inference_mode(), computed_in_float32(model):
            output = model.model(
                input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **inputs
            )
            hidden = output.last_hidden_state[0, start - 1 :]
            chosen.append(model.get_output_embeddings()(hidden[:-1]).argmax(-1).tolist())
        states.append(hidden[1:].numpy())
    return states, chosen


@contextmanager
def computed_in_float32(model: Any) -> Iterator[None]:
    """Compute with 16-bit weights in float32, one decoder layer in memory at a time."""
    parts = model.model
    vision = [
        module
        for name in ("visual", "vision_tower", "multi_modal_projector")
        if (module := getattr(parts, name, None)) is not None
    ]
    text = parts.language_model
    kept: dict[torch.nn.Parameter, torch.Tensor] = {}

    def widen(module: torch.nn.Module, *_: Any) -> None:
        for parameter in module.parameters():
            if parameter.dtype != torch.float32:
                kept[parameter] = parameter.data
                parameter.data = parameter.data.float()

    def restore(module: torch.nn.Module, *_: Any) -> None:
        for parameter in module.parameters():
            if parameter in kept:
                parameter.data = kept.pop(parameter)

    hooks = [module.register_forward_hook(restore) for module in vision]
    for module in vision:  # its dtype is read before it is called
        widen(module)
    hooks.append(text.embed_tokens.register_forward_hook(lambda module, given, rows: rows.float()))
    for module in (*text.layers, text.norm, model.get_output_embeddings()):
        hooks.append(module.register_forward_pre_hook(widen))
        hooks.append(module.register_forward_hook(restore))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        restore(model)


def decode_masks(
    checkpoint: Checkpoint,
    samples: Sequence[PolicySample],
    concentrations: Sequence[Sequence[NDArray[np.float32]]],
) -> NDArray[np.bool_]:
    """Decode concentrations with PyTorch's segmentation model.

    Args:
        checkpoint: weights.
        samples: the images.
        concentrations: (D,) vectors, K for each sample.

    Returns:
        (K, samples, M, M) masks.
    """
    config = checkpoint.config.model
    geometry = config.geometry
    reference = reference_opener(checkpoint, graph_specs(geometry, config.policy_hidden_size))
    prepared = [prepare_image(sample.image, geometry) for sample in samples]
    masks: list[list[NDArray[np.bool_]]] = []
    with reference(IMAGE_ENCODER) as encoder:
        embeddings = [encoder(image=p.image)["image_embedding"].numpy() for p in prepared]
    with reference(PRIOR) as prior, reference(MASK_DECODER) as decoder:
        for image, embedding, vectors in zip(prepared, embeddings, concentrations, strict=True):
            masks.append([])
            for vector in vectors:
                logits = prior(image_embedding=embedding, concentration=vector[None])
                decoded = decoder(
                    image_embedding=embedding,
                    prior_logits=logits["prior_logits"].numpy(),
                    unpadded_size=image.unpadded_size,
                )
                masks[-1].append(decoded["mask_logits"].numpy()[0, 0] > 0)
    return np.array(masks).swapaxes(0, 1)
