"""Evaluation of a policy in GRPO training: greedy responses, and sheets of sampled completions.

Scores and metrics are those of :mod:`coprs_deploy.evaluation`, with four more per example:
``reward``, ``format_score``, ``count_accuracy`` (as many ``<REF_POS>`` as targets) and
``completion_length`` in tokens.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from coprs_deploy.evaluation.evaluator import Prediction, evaluate
from coprs_deploy.evaluation.metrics import count_pixels, iou, standard_error, union
from coprs_deploy.evaluation.protocols import TARGETS
from coprs_deploy.evaluation.rows import EvaluationRow
from coprs_deploy.evaluation.summary import measure, row_iou
from coprs_deploy.images import prepare_image
from coprs_deploy.logits import resize_logits, sigmoid
from coprs_deploy.training.grpo.scores import mask_scores
from coprs_deploy.training.settings import COMPLETION_METRICS, MASK_METRICS
from coprs_deploy.visualization import add_caption, draw_grid, draw_heatmap, draw_overlay

if TYPE_CHECKING:
    from coprs_deploy.data.examples import Example
    from coprs_deploy.training.grpo.batch import PromptItem
    from coprs_deploy.training.grpo.trainer import JointTrainer

COMPLETIONS_FILE = "completions.jsonl"

TILE_PX = 240
"""Side of one image on a sheet, in pixels."""

BATCH_SIZE = 32
"""Prompts that are generated together."""


def evaluate_policy(trainer: JointTrainer, examples: Sequence[Example]) -> list[EvaluationRow]:
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
    gathered: list[EvaluationRow] = gather_object(evaluated) if num_processes > 1 else evaluated
    return gathered


def summarize(scores: Sequence[EvaluationRow]) -> dict[str, float]:
    """Average metrics over all examples; those of masks are nan if no example has a target."""
    present = [score for score in scores if score.num_targets]
    of_masks = measure(present, TARGETS)
    means = {n: float(np.mean([score.extra[n] for score in scores])) for n in COMPLETION_METRICS}
    return {
        **means,
        **{n: of_masks[n].value if n in of_masks else math.nan for n in MASK_METRICS},
        "giou_stderr": standard_error([row_iou(score, TARGETS) for score in present]),
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
    weights = parts.settings.reward_weights
    scores = mask_scores(decoded, ground_truth).float().cpu()
    rewards = (weights.mask * scores + weights.format * torch.tensor(format_scores)).tolist()
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


def write_samples(trainer: JointTrainer, directory: Path, step: int, count: int) -> None:
    """Write completions of the last rollout to ``step-N.png`` and ``completions.jsonl``.

    Different prompts come first. A row of the sheet is one completion: the ground truth, its prior
    and its mask, or empty fields if it named no target, and below them instruction and response.
    """
    rollout = trainer.rollout
    decoded = rollout.decoded if rollout else None
    if rollout is None or decoded is None or not count:
        return
    directory.mkdir(parents=True, exist_ok=True)
    reader, lines, sheets = trainer.parts.reader, [], []
    for number in spread([item.example.id for item in rollout.items], count):
        example, is_found = rollout.items[number].example, decoded.is_found[number]
        completion = rollout.completions[number]
        found = _largest(trainer, example, decoded.prior_logits[number][is_found])
        mask = _largest(trainer, example, decoded.mask_logits[number][is_found])
        gt = union(example.masks)
        predicted = np.zeros_like(gt) if mask is None else mask > 0
        targets = int(rollout.ground_truth.num_targets[number])
        line = {
            "step": step,
            "id": example.id,
            "instruction": example.instruction,
            "response": reader.read(completion).text,
            "format_score": reader.format_scores([completion], [targets])[0],
            "mask_iou": iou(count_pixels(predicted, gt), empty=0.0) if targets else None,
            "num_targets": targets,
            "num_found": int(is_found.sum()),
        }
        lines.append(line)
        empty = Image.new("RGB", (TILE_PX, TILE_PX), "gray")
        tiles = [draw_overlay(example.image, gt[None] if targets else gt[None][:0])]
        tiles.append(empty if found is None else draw_heatmap(example.image, sigmoid(found)))
        tiles.append(empty if mask is None else draw_overlay(example.image, predicted[None]))
        sheets.append(_captioned(draw_grid([tiles], TILE_PX), line))
    _stack(sheets).save(directory / f"step-{step:06d}.png")
    with (directory / COMPLETIONS_FILE).open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def spread(prompts: Sequence[str], count: int) -> list[int]:
    """Choose ``count`` rows: the first of each prompt, then the second of each, and so on."""
    seen = Counter[str]()
    turns = []
    for number, prompt in enumerate(prompts):
        turns.append((seen[prompt], number))
        seen[prompt] += 1
    return [number for _, number in sorted(turns)[:count]]


def _captioned(tiles: Image.Image, line: Mapping[str, Any]) -> Image.Image:
    """Add the numbers, the instruction and the response below a row of a sheet."""
    quality = "no-match" if line["mask_iou"] is None else f"IoU {line['mask_iou']:.2f}"
    numbers = f"{quality}, {line['num_found']} of {line['num_targets']} targets named"
    tiles = add_caption(tiles, "ground truth | prior | mask: " + numbers)
    return add_caption(add_caption(tiles, line["instruction"]), line["response"] or "(empty)")


def _stack(rows: Sequence[Image.Image]) -> Image.Image:
    """Arrange rows of one width below each other."""
    sheet = Image.new("RGB", (rows[0].width, sum(row.height for row in rows)))
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    return sheet


def _largest(
    trainer: JointTrainer, example: Example, found: torch.Tensor
) -> NDArray[np.float32] | None:
    """Return the maximum of (N, M, M) logits at the image size, (H, W); None if N is 0."""
    if not len(found):
        return None
    largest: NDArray[np.float32] = at_image_size(trainer, example, found.float().amax(0)[None])[0]
    return largest
