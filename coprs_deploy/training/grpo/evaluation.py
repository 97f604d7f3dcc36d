"""Judging a policy in training by whole answers: greedy responses, then masks of full size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from coprs_deploy.evaluation.metrics import overlap, union
from coprs_deploy.images import prepare_image, resize_logits
from coprs_deploy.training.grpo.scores import mask_scores
from coprs_deploy.training.rewards import total_reward

if TYPE_CHECKING:
    from coprs_deploy.data.examples import Example
    from coprs_deploy.training.grpo.trainer import JointTrainer

ROWS_AT_ONCE = 32
"""Prompts that are answered together."""


@dataclass(frozen=True)
class EvaluatedCompletion:
    """One greedy answer beside the truth.

    Attributes:
        id: of the example.
        response: what was written.
        reward: what it would have earned.
        format: score of its form.
        num_targets: targets that there are.
        is_counted: whether it names as many.
        mask_iou: IoU of all masks together with all targets together, at the picture's size.
        prior_iou: the same for the priors, cut at logit 0.
        num_tokens: of the response.
    """

    id: str
    response: str
    reward: float
    format: float
    num_targets: int
    is_counted: bool
    mask_iou: float
    prior_iou: float
    num_tokens: int


def judge(trainer: JointTrainer, examples: Sequence[Example]) -> list[EvaluatedCompletion]:
    """Answer examples greedily and compare; every process takes part and gets all answers."""
    from accelerate.utils import gather_object

    accelerator, model = trainer.accelerator, trainer.model
    count, ranks = len(examples), accelerator.num_processes
    mine = range(accelerator.process_index, count, ranks)
    was_training = model.training
    model.eval()
    answers: list[EvaluatedCompletion] = []
    for start in range(0, -(-count // ranks), ROWS_AT_ONCE):
        # A process without an example of its own answers the last one again: sharded models are
        # called by all processes or by none.
        wanted = range(start, min(start + ROWS_AT_ONCE, -(-count // ranks)))
        chosen = [mine[i] if i < len(mine) else count - 1 for i in wanted]
        judged = _judge_batch(trainer, [examples[i] for i in chosen])
        answers += judged[: max(0, len(mine) - start)]
    model.train(was_training)
    gathered: list[EvaluatedCompletion] = gather_object(answers) if ranks > 1 else answers
    return gathered


def figures(answers: Sequence[EvaluatedCompletion]) -> dict[str, float]:
    """Bring answers down to means, and the standard errors of the two that matter."""
    found = {
        name: float(np.mean([getattr(answer, name) for answer in answers]))
        for name in ("reward", "format", "is_counted", "num_tokens")
    }
    present = [answer for answer in answers if answer.num_targets]
    for name in ("mask_iou", "prior_iou"):
        found[name] = float(np.mean([getattr(a, name) for a in present])) if present else math.nan
    found["precision_at_50"] = (
        float(np.mean([a.mask_iou > 0.5 for a in present])) if present else math.nan
    )
    return {
        **found,
        "error.mask_iou": standard_error([a.mask_iou for a in present]),
        "error.reward": standard_error([a.reward for a in answers]),
    }


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of a mean; nan for fewer than two values."""
    if len(values) < 2:
        return math.nan
    return float(np.std(values, ddof=1) / math.sqrt(len(values)))


def _judge_batch(trainer: JointTrainer, examples: Sequence[Example]) -> list[EvaluatedCompletion]:
    parts = trainer.parts
    questions = [parts.collator.item(example, i) for i, example in enumerate(examples)]
    parts.processor.clear_cache()
    responses = generate_greedily(trainer, questions)
    truth = parts.collator.ground_truth(questions, trainer.accelerator.device)
    decoded = trainer.decode(questions, truth, responses)
    counts = truth.num_targets.tolist()
    forms = parts.reader.format_scores(responses, counts)
    scores = mask_scores(decoded, truth).float().cpu()
    rewards = total_reward(scores, torch.tensor(forms), parts.settings.reward_weights).tolist()
    parts.processor.clear_cache()
    answers = []
    for row, example in enumerate(examples):
        found = decoded.is_found[row]
        masks = _at_picture_size(trainer, example, decoded.mask_logits[row][found])
        priors = _at_picture_size(trainer, example, decoded.prior_logits[row][found])
        read = parts.reader.read(responses[row])
        wanted = union(example.masks)
        answers.append(
            EvaluatedCompletion(
                id=example.id,
                response=read.text,
                reward=rewards[row],
                format=forms[row],
                num_targets=len(example.masks),
                is_counted=len(read.reference_positions) == len(example.masks),
                mask_iou=overlap(union(masks), wanted).iou,
                prior_iou=overlap(union(priors), wanted).iou,
                num_tokens=len(responses[row]),
            )
        )
    return answers


def generate_greedily(trainer: JointTrainer, questions: Sequence[Any]) -> list[list[int]]:
    """Write one response a question, token ids without prompt and padding."""
    from trl.models import unwrap_model_for_generation

    processor = trainer.parts.processor
    pictures = [question.image for question in questions]
    prompts = [processor.encode(q.example.instruction, q.image) for q in questions]
    fields = processor.tensors(prompts, pictures)
    device = trainer.accelerator.device
    ends = set(trainer.eos_token_ids)
    with (
        unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator) as policy,
        torch.no_grad(),
        trainer.accelerator.autocast(),
    ):
        written = policy.generate(
            **{name: tensor.to(device) for name, tensor in fields.items()},
            max_new_tokens=trainer.max_completion_length,
            do_sample=False,
            eos_token_id=trainer.eos_token_ids,
            pad_token_id=processor.tokenizer.pad_token_id,
        )[:, fields["input_ids"].shape[1] :].tolist()
    responses = []
    for row in written:
        stop = next((i for i, token in enumerate(row) if token in ends), len(row) - 1)
        responses.append(row[: stop + 1])
    return responses


def _at_picture_size(
    trainer: JointTrainer, example: Example, logits: torch.Tensor
) -> NDArray[np.bool_]:
    """Bring (N, M, M) logits to the picture's size and cut them, (N, H, W)."""
    geometry = trainer.parts.collator.geometry
    if not len(logits):
        return np.zeros((0, *example.image.shape[:2]), np.bool_)
    source = prepare_image(example.image, geometry)
    return resize_logits(logits.float().cpu().numpy()[:, None], source, geometry) > 0
