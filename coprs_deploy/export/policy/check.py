"""Equivalence check of a policy: tokens, hidden states and masks against PyTorch.

The candidate (graphs, or quantized weights) responds to instructions. PyTorch then reads each
prompt with that response in one float32 pass, whatever the stored dtype, which gives the token that
it would have chosen at each position. Graphs are closed before PyTorch maps the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
from coprs_deploy.export.equivalence import (
    cosine_similarity,
    reference_opener,
    relative_error,
)
from coprs_deploy.export.policy.graphs import load_policy
from coprs_deploy.export.policy.samples import (
    PolicySample,
    decode_samples,
    decoder_inputs,
    layer_outputs,
)
from coprs_deploy.export.tolerances import PolicyTolerance
from coprs_deploy.images import fit_pixel_count, prepare_image
from coprs_deploy.policy.openvino_policy.graphs import read_description
from coprs_deploy.policy.vision_inputs import VisionProcessor
from coprs_deploy.specs import IMAGE_ENCODER, MASK_DECODER, PRIOR, graph_specs

NUM_SAMPLES = 4
"""Generated scenes with one instruction each."""


def compare_policy(
    checkpoint: Checkpoint,
    graphs: Path,
    tolerance: PolicyTolerance,
    report: Callable[[str], None],
    *,
    examples: Sequence[Example] = (),
    first_seed: int = 0,
) -> PolicyEquivalence:
    """Compare a policy's graphs with PyTorch, on instructions about generated scenes.

    Args:
        checkpoint: weights of policy and segmentation model.
        graphs: directory of the policy's graphs.
        tolerance: limits.
        report: called with the name of each step as it starts.
        examples: examples to respond to, besides the scenes.
        first_seed: seed of the first scene.
    """
    report("candidate policy")
    scenes = held_out_examples(PRESETS["plain"], NUM_SAMPLES, 0, first_seed)
    samples = decode_samples(checkpoint, graphs, [*scenes, *examples])
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


def read_in_float32(
    checkpoint: Checkpoint, samples: Sequence[PolicySample]
) -> tuple[list[NDArray[np.float32]], list[list[int]]]:
    """Read each prompt with its response in one pass of PyTorch.

    Returns:
        Hidden states of the response's tokens, (T, D) each, and the token that PyTorch chooses at
        each of these places.
    """
    states, chosen = [], []
    for sample, output, head in _outputs_in_float32(checkpoint, samples):
        hidden = output.last_hidden_state[0, len(sample.prompt_ids) - 1 :]
        chosen.append(head(hidden[:-1]).argmax(-1).tolist())
        states.append(hidden[1:].numpy())
    return states, chosen


def describe_layer_errors(checkpoint: Checkpoint, graphs: Path) -> str:
    """Compare the output of each layer at ``<REF_POS>`` with float32, one line per layer.

    A layer's error includes those of the vision tower and of the layers before it. The last layer
    is measured after the norm, as the error of the hidden state.
    """
    (sample,) = decode_samples(checkpoint, graphs, held_out_examples(PRESETS["plain"], 1, 0))
    embeddings, positions = next(decoder_inputs(checkpoint, graphs, [sample]))
    found = layer_outputs(graphs, embeddings, positions)
    ((_, output, _),) = _outputs_in_float32(checkpoint, [sample], output_hidden_states=True)
    wanted = [states[0].numpy() for states in output.hidden_states]
    is_image = np.asarray(sample.prompt_ids) == read_description(graphs).image_token_id
    vision, expected_vision = (r[: len(is_image)][is_image] for r in (embeddings, wanted[0]))
    lines = ["Relative error at <REF_POS> after each layer, against float32:"]
    lines.append(f"  vision tokens: {relative_error(vision, expected_vision, order=2):.2%}")
    for number, (row, expected) in enumerate(zip(found, wanted[1:], strict=True)):
        norm = ", after the norm" if number == len(found) - 1 else ""
        error = relative_error(row, expected[-1], order=2)
        lines.append(f"  layer {number}: {error:.2%}{norm}")
    return "\n".join(lines)


def _outputs_in_float32(
    checkpoint: Checkpoint, samples: Sequence[PolicySample], **options: bool
) -> Iterator[tuple[PolicySample, Any, torch.nn.Module]]:
    """Read each prompt with its response; yield the outputs, and the output head."""
    model = load_policy(checkpoint.policy_path)
    vision_of = VisionProcessor(checkpoint.policy_path, model.config)
    limits = checkpoint.config.policy_image
    for sample in samples:
        pixels = fit_pixel_count(sample.image, limits.min_pixels, limits.max_pixels)
        vision = vision_of(pixels)
        ids = torch.tensor([[*sample.prompt_ids, *sample.token_ids]])
        inputs = dict(vision.tensors)
        if vision.marks_image_tokens:
            inputs["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
        with torch.inference_mode(), computed_in_float32(model):
            output = model.model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                use_cache=False,
                **inputs,
                **options,
            )
            yield sample, output, model.get_output_embeddings()


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
