"""Reasoning stage: supervised responses on generated scenes, and masks through ``<REF_POS>``.

Several questions are packed behind each image. Without segmentation losses the policy alone is
trained; with them the whole model is trained jointly, after the query head has been initialized so
that the policy's states give the queries that the segmentation path was trained with.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from coprs_deploy.curriculum.auxiliary_heads import CellLabels, cell_labels, prefixed
from coprs_deploy.curriculum.context import CurriculumContext
from coprs_deploy.curriculum.evaluation import held_out_questions
from coprs_deploy.curriculum.packing import COMPLETE, PackedRows
from coprs_deploy.curriculum.recipe import NO_REASONING, ReasoningSettings
from coprs_deploy.curriculum.scenes import SceneBatch, policy_pixels, segmentation_pixels
from coprs_deploy.curriculum.segmentation_stage import SegmentationBatch, mask_output
from coprs_deploy.curriculum.tiny_policy import END_TOKEN
from coprs_deploy.data.synthetic import vocabulary
from coprs_deploy.evaluation.summary import summarize
from coprs_deploy.models import SegmentationModel
from coprs_deploy.training.losses import (
    IGNORED_LABEL,
    Mean,
    token_cross_entropy,
    token_kl_divergence,
)
from coprs_deploy.training.mask_decoding import encode_images
from coprs_deploy.training.settings import MASK_METRICS
from coprs_deploy.training.stage import StageOutput, TrainingStage
from coprs_deploy.training.state import freeze_unused

if TYPE_CHECKING:
    from accelerate import Accelerator

MIDDLE_LAYER = 2
"""Language layer whose image tokens the language cell head takes."""

TEXT_METRICS = ("location_accuracy", "exact_match", "no_match_precision", "no_match_recall")
"""Metrics that need no mask."""

INIT_SCENES = 512
"""Number of training scenes for the initialization of the query head."""

RIDGE = 1e-3
"""Ridge penalty, relative to the mean square of the states."""


class ReasoningBatch(NamedTuple):
    """Scenes with their packed questions.

    Attributes:
        scenes: B scenes.
        images: (B, 3, S, S) normalized pixels of the policy.
        rows: packed questions.
        targets: int64 (N,), target object of each ``<REF_POS>``.
        segmented: int64 (K,), indices of the targets with segmentation losses.
        is_dropped: bool (Q,), whether each question did not fit behind its image.
        labels: labels of each image token's cell.
    """

    scenes: SceneBatch
    images: Tensor
    rows: PackedRows
    targets: Tensor
    segmented: Tensor
    is_dropped: Tensor
    labels: CellLabels


class InitialPolicy:
    """Frozen copy of the policy as the stage finds it."""

    def __init__(self, context: CurriculumContext, settings: ReasoningSettings) -> None:
        self._policy = deepcopy(context.state.policy.model).requires_grad_(False)
        self._states = context.forward(settings.torch_compile, self._policy)
        self._image_start = context.packer.image_start

    def logits(self, batch: ReasoningBatch, chosen: Tensor) -> Tensor:
        """Compute logits (T, V) of the next token at the T chosen tokens, bool (B, L)."""
        hidden = self._states(batch.images, batch.rows, self._image_start, MIDDLE_LAYER).hidden
        assert hidden is not None
        logits: Tensor = self._policy.lm_head(hidden[chosen])
        return logits


class ReasoningObjective(nn.Module):
    """The policy on packed rows; heads and segmentation path where their losses have a weight."""

    token_weights: Tensor

    def __init__(self, context: CurriculumContext, settings: ReasoningSettings) -> None:
        super().__init__()
        state, heads = context.state, context.auxiliary_heads
        self.policy = state.policy.model
        self.cell_heads = heads.cells if settings.auxiliary_loss_weight > 0 else None
        self.reference_head = heads.reference if settings.reference_head_loss_weight > 0 else None
        self.segmentation = state.segmentation if settings.segmentation_loss_weight > 0 else None
        weights = token_weights(state.policy.tokenizer, settings.location_token_weight)
        self.register_buffer("token_weights", weights, persistent=False)
        self._settings, self._packer = settings, context.packer
        self.policy_states = context.forward(settings.torch_compile)
        self._initial_policy = (
            InitialPolicy(context, settings) if settings.kl_loss_weight > 0 else None
        )

    def forward(self, batch: ReasoningBatch) -> StageOutput:
        """Compute all losses with a weight."""
        packer, rows = self._packer, batch.rows
        states = self.policy_states(batch.images, rows, packer.image_start, MIDDLE_LAYER)
        assert states.hidden is not None
        losses, metrics = self._language(states.hidden, batch)
        metrics["frac_questions_dropped"] = Mean.of(batch.is_dropped)
        at_row, at_column = rows.references.T
        references = states.hidden[at_row, at_column]
        if self.cell_heads is not None:
            tokens = states.middle[:, packer.image_start : packer.image_stop]
            cells = self.cell_heads(states.image_features, tokens, batch.labels)
            losses |= prefixed("auxiliary", cells.losses)
            metrics |= cells.metrics
        if self.reference_head is not None:
            attributes = batch.scenes.attributes[at_row, batch.targets]
            reference = self.reference_head(references, attributes)
            losses |= prefixed("reference_head", reference.losses)
            metrics |= prefixed("reference_head", reference.metrics)
        if self.segmentation is not None:
            masks = self._masks(self.segmentation, batch, references)
            losses |= masks.losses
            metrics |= masks.metrics
        return StageOutput(losses, metrics)

    def _language(self, hidden: Tensor, batch: ReasoningBatch) -> StageOutput:
        rows = batch.rows
        has_label = rows.labels != IGNORED_LABEL
        labels = rows.labels[has_label]
        logits = self.policy.lm_head(hidden[has_label])
        losses = {"language": token_cross_entropy(logits, labels, self.token_weights)}
        if self._initial_policy is not None:
            chosen = has_label & (rows.truncations == COMPLETE)
            initial, is_chosen = self._initial_policy.logits(batch, chosen), chosen[has_label]
            weights = self.token_weights[labels[is_chosen]]
            losses["kl"] = token_kl_divergence(logits[is_chosen], initial, weights)
        is_location = (self.token_weights[labels] > 1).float()
        is_right = (logits.detach().argmax(-1) == labels).float()
        return StageOutput(
            losses,
            {
                "token_accuracy": Mean.of(is_right),
                "location_accuracy": Mean.of(is_right, is_location),
            },
        )

    def _masks(
        self, model: SegmentationModel, batch: ReasoningBatch, references: Tensor
    ) -> StageOutput:
        chosen, scenes = batch.segmented, batch.scenes
        trains_encoder = torch.is_grad_enabled() and self._settings.train_image_encoder
        with torch.set_grad_enabled(trains_encoder):
            pixels = segmentation_pixels(scenes.images, model.config.geometry)
            embedding = encode_images(model, pixels)
        rows = batch.rows.references[chosen, 0]
        targets = SegmentationBatch(scenes, rows, batch.targets[chosen])
        weights = self._settings.loss_weights
        return mask_output(model, embedding, references[chosen], targets, weights)


class ReasoningStage(TrainingStage[ReasoningSettings]):
    """Supervised responses on packed questions, jointly with the masks where they have a weight."""

    objective: ReasoningObjective

    def __init__(self, name: str, settings: ReasoningSettings, context: CurriculumContext) -> None:
        self.name = name
        self.settings = settings
        segmentation = context.state.segmentation
        freeze_unused(segmentation)
        if not settings.train_image_encoder:
            segmentation.image_encoder.requires_grad_(False)
        self.objective = ReasoningObjective(context, settings)
        self._context = context

    def prepare(self, accelerator: Accelerator) -> dict[str, float]:
        """Initialize the query head, if the recipe says so; return ``query_head_r2``."""
        if not self.settings.init_query_head:
            return {}
        return {"query_head_r2": self._init_query_head(accelerator.device)}

    def batch(self, step: int, rank: int, num_ranks: int) -> ReasoningBatch:
        """See :meth:`TrainingStage.batch`."""
        settings = self.settings
        indices = self._context.training.indices(step, settings.global_batch_size, rank, num_ranks)
        is_initial = step < settings.initial_ratio * settings.max_steps
        weights = (
            settings.initial_question_type_weights if is_initial else settings.question_type_weights
        )
        return self._collect(indices, step, weights)

    def loss_coefficients(self, lr_factor: float) -> dict[str, float]:
        """See :meth:`TrainingStage.loss_coefficients`."""
        settings = self.settings
        weights = msgspec.structs.asdict(settings.loss_weights)
        return {
            "language": settings.language_loss_weight,
            "kl": settings.kl_loss_weight,
            "auxiliary.*": settings.auxiliary_loss_weight * lr_factor,
            "reference_head.*": settings.reference_head_loss_weight,
            **{
                name: settings.segmentation_loss_weight * weight for name, weight in weights.items()
            },
        }

    def evaluate(self, accelerator: Accelerator, num_examples: int) -> dict[str, float]:
        """Evaluate generated responses; their masks too once segmentation losses have a weight."""
        held_out = self._context.held_out
        questions = held_out_questions(
            held_out.preset, held_out.scenes, num_examples, num_examples // 4
        )
        evaluator = self._context.evaluator
        metrics = summarize(evaluator.evaluate(questions, accelerator=accelerator))
        if self.settings.num_truncations and self.settings.segmentation_loss_weight:
            with_target = [each for each in questions if each.targets]
            responses = [evaluator.truncate([], 0)] * len(with_target)
            found = summarize(evaluator.evaluate(with_target, responses, accelerator))
            metrics |= {NO_REASONING + name: found[name] for name in MASK_METRICS}
        if self.settings.segmentation_loss_weight:
            return metrics
        return {k: v for k, v in metrics.items() if k.rpartition(".")[2] in TEXT_METRICS}

    def _init_query_head(self, device: torch.device) -> float:
        """Fit the query head so that states at ``<REF_POS>`` give the oracle's queries.

        The ridge regression is folded into the weight of the head; returns its R2.
        """
        from accelerate.utils import send_to_device

        states, queries = [], []
        oracle = self._context.auxiliary_heads.oracle
        with torch.no_grad():
            size = self.settings.global_batch_size
            for step in range(-(-INIT_SCENES // size)):
                indices = self._context.training.indices(step, size, 0, 1)
                batch = send_to_device(self._collect(indices, step, {}), device)
                rows, columns = batch.rows.references.T
                hidden = self.objective.policy_states(
                    batch.images, batch.rows, self._context.packer.image_start, MIDDLE_LAYER
                ).hidden
                assert hidden is not None
                is_complete = batch.rows.sources[:, 2] == COMPLETE
                states.append(hidden[rows, columns][is_complete])
                attributes = batch.scenes.attributes[rows, batch.targets]
                queries.append(oracle(attributes[is_complete]))
            solution, r2 = ridge_regression(torch.cat(states), torch.cat(queries))
            head = self._context.state.segmentation.prior.q_proj
            head.weight.copy_(head.weight @ solution.T)
        return r2

    def _collect(
        self, indices: list[int], step: int, question_type_weights: dict[str, float]
    ) -> ReasoningBatch:
        source, settings, context = self._context.training, self.settings, self._context
        scenes = source.batch(indices)
        questions = [
            source.questions(index, step, settings.questions_per_image, question_type_weights)
            for index in indices
        ]
        packer = context.packer
        pairs = [
            [(q.instruction, packer.encode_response(q.response + END_TOKEN)) for q in of_image]
            for of_image in questions
        ]
        generators = {index: source.generator(step, index) for index in indices}
        truncations = [
            [
                self._truncations(response, generators[index]) if question.targets else []
                for (_, response), question in zip(*each, strict=True)
            ]
            for index, *each in zip(indices, pairs, questions, strict=True)
        ]
        rows = packer.pack(pairs, settings.max_packed_length or None, truncations)
        sources = [tuple(source) for source in rows.sources.tolist()]
        packed = dict.fromkeys(sources)
        targets = [target for row, q, _ in packed for target in questions[row][q].targets]
        segmented = [
            target
            for target, (row, _, _) in enumerate(sources)
            if generators[indices[row]].random() < settings.segmentation_ratio
        ]
        return ReasoningBatch(
            scenes,
            policy_pixels(scenes.images, context.state.policy.image_processor),
            rows,
            torch.tensor(targets, dtype=torch.int64),
            torch.tensor(segmented, dtype=torch.int64),
            dropped_questions(rows, [len(of_image) for of_image in questions]),
            cell_labels(scenes, packer.grid_size),
        )

    def _truncations(self, response: Sequence[int], generator: np.random.Generator) -> list[int]:
        """Draw numbers of tokens that truncations of the reasoning keep; the first keeps none."""
        count, length = (
            self.settings.num_truncations,
            len(self._context.packer.reasoning_columns(response)),
        )
        if not count or not length:
            return []
        kept = generator.permutation(np.arange(1, length))[: count - 1]
        return [0, *kept.tolist()]


def dropped_questions(rows: PackedRows, counts: Sequence[int]) -> Tensor:
    """Mark the questions, image by image, that are missing in the packed rows, bool (Q,).

    Rows that are too short drop the long questions, and so bias the training. ``counts`` is the
    number of questions of each image.
    """
    return torch.cat(
        [
            ~torch.isin(torch.arange(1, count + 1), blocks)
            for blocks, count in zip(rows.blocks, counts, strict=True)
        ]
    )


def ridge_regression(inputs: Tensor, outputs: Tensor) -> tuple[Tensor, float]:
    """Fit outputs (N, K) as a linear function of inputs (N, D), without intercept.

    Returns:
        The solution (D, K), and R2, the share of the outputs' variance that it explains.
    """
    inputs, outputs = inputs.double(), outputs.double()
    gram = inputs.T @ inputs
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    solution = torch.linalg.solve(gram + ridge.to(gram.device), inputs.T @ outputs)
    residual = (inputs @ solution - outputs).pow(2).sum()
    variance = (outputs - outputs.mean(0)).pow(2).sum()
    return solution.float(), float(1 - residual / variance)


def token_weights(tokenizer: Any, location_token_weight: float) -> Tensor:
    """Return the weight (V,) of each token as a label; others than rows and columns weigh 1."""
    weights = torch.ones(len(tokenizer))
    for number in range(1, vocabulary.GRID_SIZE + 1):
        for word in (f" row{number}", f" col{number}"):
            ids = tokenizer(word)["input_ids"]
            if len(ids) == 1:
                weights[ids[0]] = location_token_weight
    return weights
