"""Evaluation of a policy in GRPO training: greedy responses, and sheets of sampled completions.

Scores and metrics are those of :mod:`coprs_deploy.evaluation`, with four more per example:
``reward``, ``format_score``, ``count_accuracy`` (as many ``<REF_POS>`` as targets) and
``completion_length`` in tokens.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from coprs_deploy.evaluation.evaluator import Prediction, evaluate
from coprs_deploy.evaluation.metrics import standard_error
from coprs_deploy.evaluation.protocols import TARGETS
from coprs_deploy.evaluation.rows import EvaluationRow
from coprs_deploy.evaluation.summary import measure, row_iou
from coprs_deploy.training.generation import at_image_size, row_of, sample_of, until_end
from coprs_deploy.training.grpo.scores import mask_scores, total_rewards
from coprs_deploy.training.runs.gallery import TILES, Sample, quality_text
from coprs_deploy.training.settings import COMPLETION_METRICS, MASK_METRICS
from coprs_deploy.visualization import add_caption

if TYPE_CHECKING:
    from coprs_deploy.data.examples import Example
    from coprs_deploy.training.grpo.batch import PromptItem
    from coprs_deploy.training.grpo.trainer import JointTrainer

COMPLETIONS_FILE = "completions.jsonl"

BATCH_SIZE = 32
"""Prompts that are generated together."""


def evaluate_policy(
    trainer: JointTrainer, examples: Sequence[Example], shown: Sequence[int] = ()
) -> tuple[list[EvaluationRow], list[Sample]]:
    """Evaluate greedy responses; all processes take part and each returns all results.

    ``shown`` are the indices of the examples whose samples are returned beside the scores.
    """
    from accelerate.utils import gather_object

    accelerator, model = trainer.accelerator, trainer.model
    count, num_processes = len(examples), accelerator.num_processes
    own = list(range(accelerator.process_index, count, num_processes))
    # A sharded model must be called equally often by all processes: a process with fewer examples
    # evaluates the last one again.
    indices = own + [count - 1] * (-(-count // num_processes) - len(own))
    kept: dict[int, Sample] = {}
    position = iter(indices)

    def predict(batch: Sequence[Example]) -> list[Prediction]:
        predictions, samples = _predict(trainer, batch)
        # Samples first: at their end, no position is taken.
        kept.update((i, each) for each, i in zip(samples, position, strict=False) if i in shown)
        return predictions

    was_training = model.training
    model.eval()
    evaluated = evaluate(predict, [examples[i] for i in indices], batch_size=BATCH_SIZE)[: len(own)]
    model.train(was_training)
    found = list(kept.items())
    if num_processes > 1:
        evaluated, found = gather_object(evaluated), gather_object(found)
    return evaluated, [sample for _, sample in sorted(dict(found).items())]


def summarize(scores: Sequence[EvaluationRow]) -> dict[str, float]:
    """Average metrics over all examples; an undefined metric is left out."""
    present = [score for score in scores if score.num_targets]
    of_masks = measure(present, TARGETS)
    means = {n: float(np.mean([score.extra[n] for score in scores])) for n in COMPLETION_METRICS}
    metrics = {
        **means,
        **{n: of_masks[n].value for n in MASK_METRICS if n in of_masks},
        "giou_stderr": standard_error([row_iou(score, TARGETS) for score in present]),
        "reward_stderr": standard_error([score.extra["reward"] for score in scores]),
    }
    return {name: value for name, value in metrics.items() if not math.isnan(value)}


def _predict(
    trainer: JointTrainer, examples: Sequence[Example]
) -> tuple[list[Prediction], list[Sample]]:
    parts = trainer.parts
    items = [parts.collator.item(example, i) for i, example in enumerate(examples)]
    parts.processor.clear_cache()
    responses = generate_greedily(trainer, items)
    ground_truth = parts.collator.ground_truth(items, trainer.accelerator.device)
    decoded = trainer.decode(items, ground_truth, responses)
    format_scores = parts.reader.format_scores(responses, ground_truth.num_targets.tolist())
    scores = mask_scores(decoded, ground_truth).tolist()
    lengths = trainer.length_scores(responses, scores)
    rewards = total_rewards(parts.settings, scores, format_scores, lengths)
    parts.processor.clear_cache()
    predictions, samples = [], []
    for row, example in enumerate(examples):
        read, of_row = parts.reader.read(responses[row]), row_of(decoded, row)
        geometry, both = parts.collator.geometry, (rewards[row], format_scores[row])
        priors = at_image_size(geometry, example, of_row[0]) > 0
        sample = sample_of(example, read, of_row, geometry, both)
        samples.append(sample)
        extra = {
            "reward": rewards[row],
            "format_score": format_scores[row],
            "count_accuracy": float(len(read.reference_positions) == len(example.masks)),
            "completion_length": float(len(responses[row])),
        }
        predictions.append(Prediction(sample.masks, priors, read.text, extra))
    return predictions, samples


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
    return [until_end(row, ends) for row in sequences]


def write_samples(trainer: JointTrainer, directory: Path, step: int, count: int) -> None:
    """Write completions of the last rollout to ``step-N.png`` and ``completions.jsonl``.

    Different prompts come first. A row of the sheet is one completion: the image, the ground truth,
    its prior and its mask, or grey fields if it named no target; below them scores and texts.
    """
    rollout = trainer.rollout
    decoded = rollout.decoded if rollout else None
    if rollout is None or decoded is None or not count:
        return
    directory.mkdir(parents=True, exist_ok=True)
    reader, geometry = trainer.parts.reader, trainer.parts.collator.geometry
    scores, counts = mask_scores(decoded, rollout.ground_truth), rollout.ground_truth.num_targets
    settings, lines, sheets = trainer.parts.settings, [], []
    for number in spread([item.example.id for item in rollout.items], count):
        completion = rollout.completions[number]
        score = [float(scores[number])]
        formats = reader.format_scores([completion], [int(counts[number])])
        lengths = trainer.length_scores([completion], score)
        (reward,) = total_rewards(settings, score, formats, lengths)
        sample = sample_of(
            rollout.items[number].example,
            reader.read(completion),
            row_of(decoded, number),
            geometry,
            (reward, formats[0]),
        )
        lines.append({"step": step, **sample.to_json()})
        sheets.append(_captioned(sample))
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


def _captioned(sample: Sample) -> Image.Image:
    """Draw a sample with its numbers, instruction and response below."""
    drawn = add_caption(sample.draw(), f"{TILES}: {quality_text(sample.to_json())}")
    drawn = add_caption(drawn, sample.example.instruction)
    return add_caption(drawn, sample.response or "(empty)")


def _stack(rows: Sequence[Image.Image]) -> Image.Image:
    """Arrange rows of one width below each other."""
    sheet = Image.new("RGB", (rows[0].width, sum(row.height for row in rows)))
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    return sheet
