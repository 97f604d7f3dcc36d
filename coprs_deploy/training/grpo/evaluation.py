"""Evaluation of a policy in GRPO training: greedy responses, then masks at the image's size.

Scores and metrics are those of :mod:`coprs_deploy.evaluation`, with four more per example:
``reward``, ``format_score``, ``count_accuracy`` (as many ``<REF_POS>`` as targets) and
``completion_length`` in tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from coprs_deploy.evaluation.evaluator import Prediction, evaluate
from coprs_deploy.evaluation.metrics import ExampleScore, mask_metrics, standard_error
from coprs_deploy.images import prepare_image, resize_logits
from coprs_deploy.training.grpo.scores import mask_scores
from coprs_deploy.training.rewards import total_reward

if TYPE_CHECKING:
    from coprs_deploy.data.examples import Example
    from coprs_deploy.training.grpo.batch import PromptItem
    from coprs_deploy.training.grpo.trainer import JointTrainer

BATCH_SIZE = 32
"""Prompts that are generated together."""

MASK_METRICS = ("giou", "prior_giou", "precision_at_50")
COMPLETION_METRICS = ("reward", "format_score", "count_accuracy", "completion_length")


def evaluate_policy(trainer: JointTrainer, examples: Sequence[Example]) -> list[ExampleScore]:
    """Evaluate greedy responses; all processes take part and each returns all results."""
    from accelerate.utils import gather_object

    accelerator, model = trainer.accelerator, trainer.model
    count, num_processes = len(examples), accelerator.num_processes
    own = list(range(accelerator.process_index, count, num_processes))
    # A sharded model must be called equally often by all processes: a process with fewer examples
    # evaluates the last one again.
    padding = [count - 1] * (-(-count // num_processes) - len(own))
    was_training = model.training
    model.eval()
    evaluated = evaluate(
        lambda batch: _predict(trainer, batch),
        [examples[i] for i in own + padding],
        batch_size=BATCH_SIZE,
    )[: len(own)]
    model.train(was_training)
    gathered: list[ExampleScore] = gather_object(evaluated) if num_processes > 1 else evaluated
    return gathered


def summarize(scores: Sequence[ExampleScore]) -> dict[str, float]:
    """Compute metrics over all examples, and mask metrics over those with a target.

    Returns:
        ``COMPLETION_METRICS``, ``MASK_METRICS``, ``giou_stderr`` and ``reward_stderr``; those of
        masks are nan if no example has a target.
    """
    present = [score for score in scores if score.num_targets]
    of_masks = mask_metrics(present)
    return {
        **{
            name: float(np.mean([score.extra[name] for score in scores]))
            for name in COMPLETION_METRICS
        },
        **{name: of_masks.get(name, math.nan) for name in MASK_METRICS},
        "giou_stderr": standard_error([score.mask_iou for score in present]),
        "reward_stderr": standard_error([score.extra["reward"] for score in scores]),
    }


def _predict(trainer: JointTrainer, examples: Sequence[Example]) -> list[Prediction]:
    parts = trainer.parts
    items = [parts.collator.item(example, i) for i, example in enumerate(examples)]
    parts.processor.clear_cache()
    responses = generate_greedily(trainer, items)
    ground_truth = parts.collator.ground_truth(items, trainer.accelerator.device)
    decoded = trainer.decode(items, ground_truth, responses)
    format_scores = parts.reader.format_scores(responses, ground_truth.num_targets.tolist())
    scores = mask_scores(decoded, ground_truth).float().cpu()
    rewards = total_reward(
        scores, torch.tensor(format_scores), parts.settings.reward_weights
    ).tolist()
    parts.processor.clear_cache()
    predictions = []
    for row, example in enumerate(examples):
        is_found = decoded.is_found[row]
        read = parts.reader.read(responses[row])
        predictions.append(
            Prediction(
                masks=at_image_size(trainer, example, decoded.mask_logits[row][is_found]) > 0,
                priors=at_image_size(trainer, example, decoded.prior_logits[row][is_found]) > 0,
                response=read.text,
                extra={
                    "reward": rewards[row],
                    "format_score": format_scores[row],
                    "count_accuracy": float(len(read.reference_positions) == len(example.masks)),
                    "completion_length": float(len(responses[row])),
                },
            )
        )
    return predictions


def generate_greedily(trainer: JointTrainer, items: Sequence[PromptItem]) -> list[list[int]]:
    """Generate one response per question: token ids without prompt and padding."""
    from trl.models import unwrap_model_for_generation

    processor = trainer.parts.processor
    fields = processor([[i.image] for i in items], [i.example.instruction for i in items])
    device = trainer.accelerator.device
    ends = set(trainer.eos_token_ids)
    with (
        unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator) as policy,
        torch.no_grad(),
        trainer.accelerator.autocast(),
    ):
        sequences = policy.generate(
            **{name: tensor.to(device) for name, tensor in fields.items()},
            max_new_tokens=trainer.max_completion_length,
            do_sample=False,
            eos_token_id=trainer.eos_token_ids,
            pad_token_id=processor.tokenizer.pad_token_id,
        )[:, fields["input_ids"].shape[1] :].tolist()
    responses = []
    for row in sequences:
        stop = next((i for i, token in enumerate(row) if token in ends), len(row) - 1)
        responses.append(row[: stop + 1])
    return responses


def at_image_size(
    trainer: JointTrainer, example: Example, logits: torch.Tensor
) -> NDArray[np.float32]:
    """Resize (N, M, M) logits to the size of the image: (N, H, W)."""
    if not len(logits):
        return np.zeros((0, *example.image.shape[:2]), np.float32)
    geometry = trainer.parts.collator.geometry
    prepared = prepare_image(example.image, geometry)
    return resize_logits(logits.float().cpu().numpy()[:, None], prepared, geometry)
