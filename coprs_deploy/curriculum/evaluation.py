"""Evaluation of a tiny policy in training on held-out scenes.

Responses are generated greedily in batches, or given: the target responses (teacher forcing), or
responses whose reasoning is truncated. The
masks are computed in float32 and resized exactly as the runtime does. Scores and metrics are those
of :mod:`coprs_deploy.evaluation`, with three more per example:

    object_accuracy    the masks overlap the targets more than any other objects
    location_accuracy  the conclusion names the locations of the targets and no others
    exact_match        the response equals the target response token by token
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coprs_deploy.curriculum.packed_forward import PackedForward
from coprs_deploy.curriculum.packing import PackedRows, QuestionPacker
from coprs_deploy.curriculum.scenes import StoredScenes, policy_pixels
from coprs_deploy.curriculum.tiny_policy import END_TOKEN
from coprs_deploy.data.examples import Example
from coprs_deploy.data.synthetic.examples import (
    example_from_question,
    preset_with_target,
    with_question_types,
)
from coprs_deploy.data.synthetic.presets import Preset
from coprs_deploy.data.synthetic.questions import ask_questions
from coprs_deploy.data.synthetic.scene import Scene
from coprs_deploy.evaluation.evaluator import Prediction, evaluate
from coprs_deploy.evaluation.metrics import EMPTY_IOU, count_pixels, iou
from coprs_deploy.evaluation.rows import EvaluationRow
from coprs_deploy.images import prepare_image
from coprs_deploy.logits import resize_logits
from coprs_deploy.prompts import REASONING_START, read_response
from coprs_deploy.training.batches import pad_tokens
from coprs_deploy.training.mask_decoding import decode_targets, whole_images
from coprs_deploy.training.state import TrainingState

if TYPE_CHECKING:
    from accelerate import Accelerator

BATCH_SIZE = 64
"""Examples that are generated together."""

MIN_OBJECT_IOU = 0.1
"""IoU with some object below which a mask selects no object."""

QUESTION_SEED = 77
"""Seed of the questions about held-out scenes, different from those of training."""

_LOCATION = re.compile(r"row\d+ col\d+")
_CONCLUSION = "The target"


@dataclass(frozen=True, eq=False, kw_only=True)
class SceneExample(Example):
    """Example of a stored scene.

    Attributes:
        scene: the scene.
        targets: indices of the scene's objects that are targets.
    """

    scene: Scene
    targets: tuple[int, ...]


def held_out_questions(
    preset: Preset, scenes: StoredScenes, num_examples: int, num_no_match: int
) -> list[SceneExample]:
    """Ask one question about each of the first scenes, and no-match questions about the last ones.

    Question types with a target are equally likely, whatever the weights of the preset.
    """
    count = len(scenes)
    with_target, no_match = preset_with_target(preset), with_question_types(preset, {"none": 1.0})
    chosen = [(i, with_target) for i in range(min(num_examples, count))]
    chosen += [(count - 1 - i, no_match) for i in range(min(num_no_match, count))]
    return [_scene_example(scenes, index, weighted) for index, weighted in chosen]


def _scene_example(scenes: StoredScenes, index: int, preset: Preset) -> SceneExample:
    scene = scenes.scene(index)
    question = ask_questions(scene, preset, QUESTION_SEED + index)[0]
    example = example_from_question(scene, question, preset, f"held-out-{index}")
    return SceneExample(**vars(example), scene=scene, targets=question.targets)


class SceneEvaluator:
    """Evaluates a model in training on questions about stored scenes; ``forward`` is in float32."""

    def __init__(
        self, state: TrainingState, forward: PackedForward, packer: QuestionPacker
    ) -> None:
        self._state = state
        self._forward = forward
        self._packer = packer
        self._device = next(state.segmentation.parameters()).device

    def evaluate(
        self,
        questions: Sequence[SceneExample],
        responses: Sequence[Sequence[int]] | None = None,
        accelerator: Accelerator | None = None,
    ) -> list[EvaluationRow]:
        """Predict and score.

        Args:
            questions: questions with their ground truth.
            responses: token ids of the response to each question; None generates them.
            accelerator: distributes the questions over its processes; each returns all results.
        """
        own = slice(None)
        if accelerator is not None:
            own = slice(accelerator.process_index, None, accelerator.num_processes)
        given = None if responses is None else iter(responses[own])
        model = self._state.policy.model
        was_training = model.training
        model.eval()

        def predict(batch: Sequence[SceneExample]) -> list[Prediction]:
            if given is not None:
                return self._predict(batch, list(islice(given, len(batch))))
            pairs = [(each.image, each.instruction) for each in batch]
            return self._predict(batch, self.generate(*zip(*pairs, strict=True)))

        with torch.no_grad():
            scores = evaluate(predict, questions[own], batch_size=BATCH_SIZE)
        model.train(was_training)
        if accelerator is not None and accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            scores = gather_object(scores)
        return scores

    def target_responses(self, questions: Sequence[SceneExample]) -> list[list[int]]:
        """Return the token ids of the target responses."""
        return [self._packer.encode_response(each.response + END_TOKEN) for each in questions]

    def truncate(self, response: Sequence[int], max_reasoning_tokens: int) -> list[int]:
        """Return the response of a policy whose reasoning has at most so many tokens.

        The tail of the prompt template is forced behind it, as the runtime does, and the response
        names one target.
        """
        tokenizer, tail = self._state.policy.tokenizer, self._state.policy.prompt.reference_tail
        start, *forced = tokenizer(f"{REASONING_START}{tail}{END_TOKEN}")["input_ids"]
        columns = self._packer.reasoning_columns(response)
        reasoning = list(response)[columns.start : columns.stop][:max_reasoning_tokens]
        return [start, *reasoning, *forced]

    @torch.no_grad()
    def generate(self, images: Sequence[Any], instructions: Sequence[str]) -> list[list[int]]:
        """Generate a response per (S, S, 3) uint8 image: token ids without prompt and padding."""
        policy = self._state.policy
        prompts = [self._packer.encode_prompt(text) for text in instructions]
        padded = pad_tokens(prompts, policy.tokenizer.pad_token_id, "left")
        ids, attention_mask = (tensor.to(self._device) for tensor in padded)
        pixels = policy.image_processor(images=list(images), return_tensors="pt")
        sequences = policy.model.generate(
            input_ids=ids,
            attention_mask=attention_mask,
            mm_token_type_ids=(ids == policy.model.config.image_token_id).int(),
            pixel_values=pixels["pixel_values"].to(self._device),
            image_grid_thw=pixels["image_grid_thw"].to(self._device),
            max_new_tokens=policy.prompt.max_response_tokens,
            do_sample=False,
        )[:, ids.shape[1] :].tolist()
        end = policy.tokenizer.convert_tokens_to_ids(END_TOKEN)
        return [row[: row.index(end) + 1] if end in row else row for row in sequences]

    def _predict(
        self, questions: Sequence[SceneExample], responses: Sequence[Sequence[int]]
    ) -> list[Prediction]:
        policy, packer = self._state.policy, self._packer
        images = [question.image for question in questions]
        instructions = [question.instruction for question in questions]
        targets = self.target_responses(questions)
        packed = packer.pack([[pair] for pair in zip(instructions, responses, strict=True)])
        packed = PackedRows(*(tensor.to(self._device) for tensor in packed))
        pixels = policy_pixels(
            torch.from_numpy(np.stack(images)).to(self._device), policy.image_processor
        )
        states = self._forward(pixels, packed, packer.image_start, 1).hidden
        assert states is not None
        rows, columns = packed.references.T
        priors, masks = self._segment(images, rows, states[rows, columns])
        predictions = []
        for i, question in enumerate(questions):
            own = rows.cpu().numpy() == i
            parts = responses[i], targets[i], priors[own], masks[own]
            predictions.append(self._prediction(question, *parts))
        return predictions

    def _segment(
        self, images: Sequence[Any], rows: Tensor, concentrations: Tensor
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Decode each target on its image: prior and mask at the image's size, (N, H, W) each."""
        model = self._state.segmentation
        geometry = model.config.geometry
        prepared = [prepare_image(image, geometry) for image in images]
        if not len(rows):
            nothing = np.zeros((0, *images[0].shape[:2]), np.bool_)
            return nothing, nothing
        batch = torch.from_numpy(np.concatenate([p.image for p in prepared])).to(self._device)
        embedding = model.image_encoder(batch)
        inside = whole_images(len(rows), geometry, embedding.device)
        logits = decode_targets(model, embedding[rows], concentrations, inside)

        def at_image_size(tensor: Tensor) -> NDArray[np.bool_]:
            maps = np.split(tensor.float().cpu().numpy(), len(rows))
            pairs = zip(maps, rows.tolist(), strict=True)
            return np.concatenate([resize_logits(m, prepared[i], geometry) for m, i in pairs]) > 0

        return at_image_size(logits[0]), at_image_size(logits[1])

    def _prediction(
        self,
        question: SceneExample,
        response: Sequence[int],
        target: Sequence[int],
        priors: NDArray[np.bool_],
        masks: NDArray[np.bool_],
    ) -> Prediction:
        """Collect a prediction and its further metrics; response and target are token ids."""
        tokenizer = self._state.policy.tokenizer
        text = read_response(
            list(response),
            self._packer.reference_id,
            lambda part: tokenizer.decode(list(part), skip_special_tokens=True),
        ).text
        locations = {question.scene.objects[i].location for i in question.targets}
        selected = selected_objects(question.scene, masks)
        extra = {
            "object_accuracy": float(len(masks) > 0 and selected == set(question.targets)),
            "location_accuracy": float(named_locations(text) == locations),
            "exact_match": float(list(response) == list(target)),
        }
        return Prediction(masks, priors, text, extra)


def selected_objects(scene: Scene, masks: NDArray[np.bool_]) -> set[int]:
    """Return the object that each mask overlaps most, if it does so at all."""
    objects = scene.masks(range(len(scene.objects)))
    overlaps = [
        [iou(count_pixels(mask, each), empty=EMPTY_IOU) for each in objects] for mask in masks
    ]
    return {int(np.argmax(row)) for row in overlaps if max(row) > MIN_OBJECT_IOU}


def named_locations(response: str) -> set[str]:
    """Return the locations in the conclusion of a response, as in ``row3 col5``."""
    return set(_LOCATION.findall(response.rpartition(_CONCLUSION)[2]))
