"""Judging a model by whole answers: generated text first, then the masks that it leads to.

Responses are generated greedily by transformers in batches; the masks are computed in float32 and
brought to the picture's size exactly as the runtime does it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coprs_deploy.curriculum.packed_forward import PackedForward
from coprs_deploy.curriculum.packing import InstructionResponse, QuestionPacker
from coprs_deploy.curriculum.scenes import StoredScenes, policy_pixels
from coprs_deploy.curriculum.tiny_policy import END_TOKEN
from coprs_deploy.data.synthetic.examples import with_kinds
from coprs_deploy.data.synthetic.presets import Preset
from coprs_deploy.data.synthetic.questions import Question, ask
from coprs_deploy.evaluation.metrics import no_match_figures, overlap, pearson_r, union
from coprs_deploy.images import prepare_image, resize_logits
from coprs_deploy.prompts import read_response
from coprs_deploy.training.mask_decoding import decode_targets, whole_images
from coprs_deploy.training.state import TrainingState

if TYPE_CHECKING:
    from accelerate import Accelerator

ROWS_AT_ONCE = 64
"""Questions that are decoded together."""

LEAST_OVERLAP = 0.1
"""IoU that a mask needs with some object to be said to mean it."""

_PLACE = re.compile(r"row\d+ col\d+")
_CONCLUSION = "The target"

QUESTION_SEED = 77
"""Seed of the questions about held-out scenes, apart from those asked in training."""


@dataclass(frozen=True)
class HeldOutQuestion:
    """A question about the scene of an index."""

    index: int
    question: Question


@dataclass(frozen=True)
class EvaluatedResponse:
    """One answer beside the truth.

    Attributes:
        index: of the scene.
        kind: of the question.
        instruction: the question.
        response: what was written.
        is_exact: whether it is the very response that was wanted.
        names_targets: whether its conclusion names the places of the targets, and no others.
        num_targets: targets that there are.
        num_found: ``<REF_POS>`` that were written.
        mask_iou: IoU of all masks together with all targets together; 0 without a mask.
        prior_iou: the same for the priors, cut at logit 0.
        is_right: whether the masks overlap the targets more than any other objects.
    """

    index: int
    kind: str
    instruction: str
    response: str
    is_exact: bool
    names_targets: bool
    num_targets: int
    num_found: int
    mask_iou: float
    prior_iou: float
    is_right: bool


def held_out_questions(
    tier: Preset, scenes: StoredScenes, num_scenes: int, num_absent: int
) -> list[HeldOutQuestion]:
    """Ask one question about each of the first scenes, and of others something that is not there.

    Args:
        tier: the world of the scenes; its kinds of question are asked equally often.
        scenes: held-out scenes.
        num_scenes: questions that have an answer.
        num_absent: questions that nothing matches, about the last scenes.
    """
    present = with_kinds(tier, dict.fromkeys((k for k in tier.kinds if k != "none"), 1.0))
    absent = with_kinds(tier, {"none": 1.0})
    count = len(scenes)
    chosen = [(i, present) for i in range(min(num_scenes, count))]
    chosen += [(count - 1 - i, absent) for i in range(min(num_absent, count))]
    return [
        HeldOutQuestion(index, ask(scenes.scene(index), world, QUESTION_SEED + index)[0])
        for index, world in chosen
    ]


class SceneEvaluator:
    """Answers questions with the parts of a model in training and compares with the truth.

    Args:
        state: the model.
        scenes: the scenes that the questions are about.
        forward: the policy's forward pass in float32.
        packer: its prompt.
    """

    def __init__(
        self,
        state: TrainingState,
        scenes: StoredScenes,
        forward: PackedForward,
        packer: QuestionPacker,
    ) -> None:
        self._state = state
        self._scenes = scenes
        self._forward = forward
        self._packer = packer
        self._device = next(state.segmentation.parameters()).device

    def judge(
        self,
        questions: Sequence[HeldOutQuestion],
        generates: bool = True,
        accelerator: Accelerator | None = None,
    ) -> list[EvaluatedResponse]:
        """Answer and compare.

        Args:
            questions: what is asked.
            generates: whether the response is generated; else the wanted one is fed.
            accelerator: spreads the questions over its processes; each gets all answers.
        """
        mine = list(questions)
        if accelerator is not None:
            mine = mine[accelerator.process_index :: accelerator.num_processes]
        model = self._state.policy.model
        was_training = model.training
        model.eval()
        answers: list[EvaluatedResponse] = []
        with torch.no_grad():
            for start in range(0, len(mine), ROWS_AT_ONCE):
                answers += self._judge_batch(mine[start : start + ROWS_AT_ONCE], generates)
        model.train(was_training)
        if accelerator is not None and accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            answers = gather_object(answers)
        return answers

    def generate(self, images: Sequence[Any], instructions: Sequence[str]) -> list[list[int]]:
        """Write responses greedily, token ids without prompt and padding.

        Args:
            images: (S, S, 3) uint8 each.
            instructions: one an image.
        """
        policy = self._state.policy
        prompts = [self._packer.encode_prompt(text) for text in instructions]
        width, pad = max(map(len, prompts)), policy.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=self._device)
        attended = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
        pixels = policy.image_processor(images=list(images), return_tensors="pt")
        written = policy.model.generate(
            input_ids=ids,
            attention_mask=torch.tensor(attended, device=self._device),
            mm_token_type_ids=(ids == policy.model.config.image_token_id).int(),
            pixel_values=pixels["pixel_values"].to(self._device),
            image_grid_thw=pixels["image_grid_thw"].to(self._device),
            max_new_tokens=policy.prompt.max_response_tokens,
            do_sample=False,
        )[:, width:].tolist()
        end = policy.tokenizer.convert_tokens_to_ids(END_TOKEN)
        return [row[: row.index(end) + 1] if end in row else row for row in written]

    def _judge_batch(
        self, questions: Sequence[HeldOutQuestion], generates: bool
    ) -> list[EvaluatedResponse]:
        policy = self._state.policy
        images = [self._scenes.images[item.index] for item in questions]
        wanted = [
            policy.tokenizer(item.question.response + END_TOKEN)["input_ids"] for item in questions
        ]
        instructions = [item.question.instruction for item in questions]
        written = self.generate(images, instructions) if generates else wanted
        pairs: list[list[InstructionResponse]] = [
            [pair] for pair in zip(instructions, written, strict=True)
        ]
        rows = self._packer.pack(pairs)
        rows = type(rows)(*(tensor.to(self._device) for tensor in rows))
        pixels = policy_pixels(
            torch.from_numpy(np.stack(images)).to(self._device), policy.image_processor
        )
        states = self._forward(pixels, rows, self._packer.image_start, 1).hidden
        assert states is not None
        concentrations = states[rows.references[:, 0], rows.references[:, 1]]
        priors, masks = self._segment(images, rows.references[:, 0], concentrations)
        owner = rows.references[:, 0].tolist()
        found = [[n for n, row in enumerate(owner) if row == i] for i in range(len(questions))]
        return [
            self._compare(item, ids, goal, priors[numbers], masks[numbers])
            for item, ids, goal, numbers in zip(questions, written, wanted, found, strict=True)
        ]

    def _segment(
        self, images: Sequence[Any], rows: Tensor, concentrations: Tensor
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Decode each target on its image: prior and mask at the picture's size, (N, H, W)."""
        model = self._state.segmentation
        geometry = model.config.geometry
        prepared = [prepare_image(image, geometry) for image in images]
        shape = (0, *images[0].shape[:2])
        if not len(rows):
            return np.zeros(shape, np.bool_), np.zeros(shape, np.bool_)
        batch = torch.from_numpy(np.concatenate([p.image for p in prepared])).to(self._device)
        embedding = model.image_encoder(batch)
        inside = whole_images(len(rows), geometry, embedding.device)
        logits = decode_targets(model, embedding[rows], concentrations, inside)
        sources = [prepared[row] for row in rows.tolist()]

        def at_picture_size(tensor: Tensor) -> NDArray[np.bool_]:
            array = tensor.float().cpu().numpy()
            grown = [
                resize_logits(array[n : n + 1], source, geometry)
                for n, source in enumerate(sources)
            ]
            return np.concatenate(grown) > 0

        return at_picture_size(logits[0]), at_picture_size(logits[1])

    def _compare(
        self,
        item: HeldOutQuestion,
        ids: Sequence[int],
        goal: Sequence[int],
        priors: NDArray[np.bool_],
        masks: NDArray[np.bool_],
    ) -> EvaluatedResponse:
        scene = self._scenes.scene(item.index)
        truth = union(scene.masks(item.question.targets))
        everything = scene.masks(range(len(scene.objects)))
        meant = set()
        for mask in masks:
            overlaps = [overlap(mask, other).iou for other in everything]
            if max(overlaps) > LEAST_OVERLAP:
                meant.add(int(np.argmax(overlaps)))
        tokenizer = self._state.policy.tokenizer
        response = read_response(
            list(ids),
            self._packer.reference_id,
            lambda part: tokenizer.decode(list(part), skip_special_tokens=True),
        )
        return EvaluatedResponse(
            index=item.index,
            kind=item.question.kind,
            instruction=item.question.instruction,
            response=response.text,
            is_exact=list(ids) == list(goal),
            names_targets=named_places(response.text)
            == {scene.objects[i].place for i in item.question.targets},
            num_targets=len(item.question.targets),
            num_found=len(masks),
            mask_iou=overlap(union(masks), truth).iou,
            prior_iou=overlap(union(priors), truth).iou,
            is_right=len(masks) > 0 and meant == set(item.question.targets),
        )


def summarize(answers: Sequence[EvaluatedResponse]) -> dict[str, float]:
    """Bring answers down to figures.

    Returns:
        Over questions that have an answer: ``mask_iou``, ``precision_at_50``, ``right_object``,
        ``prior_iou``, ``text_right`` (the conclusion names the place of the target), ``exact``,
        ``pearson_r`` (prior IoU against mask IoU), and mask IoU and right
        objects by kind. Over all: ``no_match_precision`` and ``no_match_recall``.
    """
    present = [a for a in answers if a.num_targets]
    figures = _figures(present)
    for kind in sorted({a.kind for a in present}):
        part = _figures([a for a in present if a.kind == kind])
        figures.update({f"{kind}.{name}": value for name, value in part.items()})
    pearson = pearson_r([a.prior_iou for a in present], [a.mask_iou for a in present])
    if pearson is not None:
        figures["pearson_r"] = pearson
    figures.update(
        no_match_figures([a.num_targets for a in answers], [a.num_found for a in answers])
    )
    return figures


def named_places(response: str) -> set[str]:
    """Read the places that the conclusion of a response names."""
    return set(_PLACE.findall(response.rpartition(_CONCLUSION)[2]))


def _figures(answers: Sequence[EvaluatedResponse]) -> dict[str, float]:
    if not answers:
        return {}
    return {
        "giou": float(np.mean([a.mask_iou for a in answers])),
        "precision_at_50": float(np.mean([a.mask_iou > 0.5 for a in answers])),
        "object_accuracy": float(np.mean([a.is_right for a in answers])),
        "prior_giou": float(np.mean([a.prior_iou for a in answers])),
        "location_accuracy": float(np.mean([a.names_targets for a in answers])),
        "exact_match": float(np.mean([a.is_exact for a in answers])),
    }
