"""Greedy responses of a policy in training, outside of GRPO: for the gallery of a report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coprs_deploy.data.examples import Example
from coprs_deploy.images import prepare_image
from coprs_deploy.logits import resize_logits, sigmoid
from coprs_deploy.prompts import REFERENCE_TOKEN, Response
from coprs_deploy.specs import Geometry
from coprs_deploy.training.batches import pad_tokens
from coprs_deploy.training.examples import ExampleSets
from coprs_deploy.training.grpo.attachment import Attachment, SegmentationHead
from coprs_deploy.training.grpo.batch import PromptCollator
from coprs_deploy.training.grpo.processor import PolicyProcessor
from coprs_deploy.training.grpo.scores import DecodedMasks, ResponseReader, mask_scores
from coprs_deploy.training.runs.gallery import Sample
from coprs_deploy.training.settings import ResponseFormat, RewardWeights
from coprs_deploy.training.state import TrainingState


@torch.no_grad()
def respond(state: TrainingState, sets: ExampleSets, examples: Sequence[Example]) -> list[Sample]:
    """Generate a greedy response to each example, all in one batch, and decode its masks.

    Rewards have the weights and the format rules of the paper.
    """
    policy, tokenizer, prompt = state.policy.model, state.policy.tokenizer, state.policy.prompt
    processor = PolicyProcessor(tokenizer, sets.vision, prompt)
    most = max(1, *(len(example.masks) for example in examples))
    collator = PromptCollator(state, sets.features, most)
    items = [collator.item(example, number) for number, example in enumerate(examples)]
    fields = {
        name: tensor.to(policy.device)
        for name, tensor in processor(
            [[item.image] for item in items], [example.instruction for example in examples]
        ).items()
    }
    start = fields["input_ids"].shape[1]
    generated = policy.generate(
        **fields,
        max_new_tokens=prompt.max_response_tokens,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )[:, start:].tolist()
    completions = [until_end(row, {tokenizer.eos_token_id}) for row in generated]
    ids, attended = pad_tokens(completions, tokenizer.pad_token_id)
    fields["input_ids"] = torch.cat([fields["input_ids"], ids.to(policy.device)], 1)
    fields["attention_mask"] = torch.cat([fields["attention_mask"], attended.to(policy.device)], 1)
    if "mm_token_type_ids" in fields:
        no_image = torch.zeros_like(ids, dtype=torch.int32, device=policy.device)
        fields["mm_token_type_ids"] = torch.cat([fields["mm_token_type_ids"], no_image], 1)
    gt = collator.ground_truth(items, policy.device)
    reference = tokenizer.convert_tokens_to_ids(REFERENCE_TOKEN)
    attachment = Attachment(policy, SegmentationHead(state.segmentation), reference)
    try:
        output = policy(**fields, segmentation=gt.request(start), logits_to_keep=1, use_cache=False)
    finally:
        attachment.detach()
    decoded = DecodedMasks(output.prior_logits, output.mask_logits, output.is_found)
    reader, weights = ResponseReader(tokenizer, ResponseFormat.PAPER), RewardWeights()
    format_scores = reader.format_scores(completions, gt.num_targets.tolist())
    scores = mask_scores(decoded, gt).tolist()
    return [
        sample_of(
            example,
            reader.read(completions[row]),
            row_of(decoded, row),
            collator.geometry,
            (weights.mask * scores[row] + weights.format * format_scores[row], format_scores[row]),
        )
        for row, example in enumerate(examples)
    ]


def sample_of(
    example: Example,
    response: Response,
    decoded: tuple[Tensor, Tensor],
    geometry: Geometry,
    scores: tuple[float, float],
) -> Sample:
    """Build a sample from the (N, M, M) logits of its priors and masks, and its two scores."""
    priors, masks = (at_image_size(geometry, example, logits) for logits in decoded)
    prior = sigmoid(priors.max(0)) if len(priors) else None
    return Sample(example, response.text, response.reasoning, prior, masks > 0, *scores)


def row_of(decoded: DecodedMasks, row: int) -> tuple[Tensor, Tensor]:
    """Return the prior and mask logits, (N, M, M) each, of the targets that a completion names."""
    is_found = decoded.is_found[row]
    return decoded.prior_logits[row][is_found], decoded.mask_logits[row][is_found]


def at_image_size(geometry: Geometry, example: Example, logits: Tensor) -> NDArray[np.float32]:
    """Resize (N, M, M) logits to the size of the image: (N, H, W)."""
    if not len(logits):
        return np.zeros((0, *example.image.shape[:2]), np.float32)
    prepared = prepare_image(example.image, geometry)
    return resize_logits(logits.float().cpu().numpy()[:, None], prepared, geometry)


def until_end(row: Sequence[int], ends: set[Any]) -> list[int]:
    """Return generated tokens up to and including the first that ends a response."""
    stop = next((i for i, token in enumerate(row) if token in ends), len(row) - 1)
    return list(row[: stop + 1])
