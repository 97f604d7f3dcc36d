"""Supervised answers on scenes: reasoning by cross-entropy, and masks through ``<REF_POS>``.

Several questions are packed behind each image. Without segmentation losses this is the policy's
phase; with them the whole model is trained together, after the policy's states have been joined to
the queries that the segmentation path already understands.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from coprs_deploy.curriculum.auxiliary_heads import (
    AttributeReader,
    CellReader,
    CellTruth,
    cell_truth,
)
from coprs_deploy.curriculum.context import CurriculumContext
from coprs_deploy.curriculum.evaluation import held_out_questions
from coprs_deploy.curriculum.packing import Answered, PackedRows
from coprs_deploy.curriculum.perception_stage import read_cells
from coprs_deploy.curriculum.scenes import (
    SceneBatch,
    policy_pixels,
    segmentation_pixels,
    target_masks,
)
from coprs_deploy.curriculum.tiny_policy import END_TOKEN
from coprs_deploy.data.synthetic import vocabulary
from coprs_deploy.evaluation.metrics import summarize
from coprs_deploy.training.losses import (
    IGNORED_LABEL,
    Mean,
    segmentation_losses,
    token_cross_entropy,
)
from coprs_deploy.training.mask_decoding import (
    decode_targets,
    encode_images,
    mask_metrics,
    mask_targets,
    whole_images,
)
from coprs_deploy.training.settings import SupervisedSettings
from coprs_deploy.training.stage import StageOutput, TrainingStage
from coprs_deploy.training.state import freeze_unused

if TYPE_CHECKING:
    from accelerate import Accelerator

MIDDLE_LAYER = 2
"""Language layer whose image tokens the dense head reads."""

TEXT_METRICS = ("location_accuracy", "exact_match", "no_match_precision", "no_match_recall")
"""Figures of an answer that need no mask."""

JOIN_SCENES = 512
"""Training scenes whose states and queries the join is solved from."""

JOIN_RIDGE = 1e-3
"""Weight of the squared solution, beside the mean square of the states."""


class AnswerBatch(NamedTuple):
    """Scenes with their packed questions.

    Attributes:
        scenes: B scenes.
        images: (B, 3, S, S) pixels as the policy takes them.
        rows: the questions, packed.
        targets: int64 (N,), the object that each ``<REF_POS>`` stands for.
        segmented: int64 (K,), those of them that segmentation losses are computed on.
        left_out: bool (Q,), of all questions, which did not fit in the row of their image.
        truth: what each image token's cell shows.
    """

    scenes: SceneBatch
    images: Tensor
    rows: PackedRows
    targets: Tensor
    segmented: Tensor
    left_out: Tensor
    truth: CellTruth


class ReasoningObjective(nn.Module):
    """The policy on packed rows; the segmentation path where its losses have a weight."""

    token_weights: Tensor
    vision_head: CellReader
    language_head: CellReader
    reference_head: AttributeReader

    def __init__(self, shared: CurriculumContext, settings: SupervisedSettings) -> None:
        super().__init__()
        workbench = shared.workbench
        self.policy = workbench.policy.model
        self.has_cells = settings.auxiliary_loss_weight > 0
        self.has_readout = settings.reference_head_loss_weight > 0
        self.has_masks = settings.segmentation_loss_weight > 0
        if self.has_cells:
            self.vision_head = shared.heads.vision
            self.language_head = shared.heads.language
        if self.has_readout:
            self.reference_head = shared.heads.reference
        if self.has_masks:
            self.segmentation = workbench.segmentation
        weights = token_weights(workbench.policy.tokenizer, settings.location_token_weight)
        self.register_buffer("token_weights", weights, persistent=False)
        self._settings, self._packer = settings, shared.packer
        self.policy_states = shared.forward(settings.compile)

    def forward(self, batch: AnswerBatch) -> StageOutput:
        """Compute every loss that has a weight."""
        packer, rows = self._packer, batch.rows
        states = self.policy_states(batch.images, rows, packer.image_start, MIDDLE_LAYER)
        assert states.hidden is not None
        losses, metrics = self._reasoning(states.hidden, rows)
        metrics["left_out"] = Mean.of(batch.left_out)
        at_reference = states.hidden[rows.references[:, 0], rows.references[:, 1]]
        if self.has_cells:
            tokens = states.middle[:, packer.image_start : packer.image_stop]
            cells = read_cells(
                self.vision_head, self.language_head, states.image_features, tokens, batch.truth
            )
            losses.update({f"dense.{k}": v for k, v in cells.losses.items()})
            metrics.update(cells.metrics)
        if self.has_readout:
            attributes = batch.scenes.attributes[rows.references[:, 0], batch.targets]
            read = self.reference_head(at_reference, attributes)
            losses.update({f"readout.{k}": v for k, v in read.losses.items()})
            metrics.update({f"readout.{k}": v for k, v in read.accuracies.items()})
        if self.has_masks:
            masks = self._masks(batch, at_reference)
            losses.update({f"masks.{k}": v for k, v in masks.losses.items()})
            metrics.update(masks.metrics)
        return StageOutput(losses, metrics)

    def _reasoning(
        self, hidden: Tensor, rows: PackedRows
    ) -> tuple[dict[str, Mean], dict[str, Mean]]:
        is_learned = rows.labels != IGNORED_LABEL
        labels = rows.labels[is_learned]
        logits = self.policy.lm_head(hidden[is_learned])
        is_place = self.token_weights[labels] > 1
        is_right = (logits.detach().argmax(-1) == labels).float()
        return (
            {"reasoning": token_cross_entropy(logits, labels, self.token_weights)},
            {"tokens": Mean.of(is_right), "places": Mean.of(is_right, is_place.float())},
        )

    def _masks(self, batch: AnswerBatch, at_reference: Tensor) -> StageOutput:
        model, chosen = self.segmentation, batch.segmented
        geometry = model.config.geometry
        rows = batch.rows.references[chosen, 0]
        pixels = segmentation_pixels(batch.scenes.images, geometry)
        learns = torch.is_grad_enabled() and self._settings.train_image_encoder
        with torch.set_grad_enabled(learns):
            embedding = encode_images(model, pixels)
        inside = whole_images(len(chosen), geometry, pixels.device)
        priors, logits = decode_targets(model, embedding[rows], at_reference[chosen], inside)
        truth = target_masks(batch.scenes, rows, batch.targets[chosen])
        target = mask_targets(truth, geometry.mask_size)
        losses = segmentation_losses(priors, logits, target, inside, self._settings.weights)
        return StageOutput(losses, mask_metrics(priors, logits, truth))


class ReasoningStage(TrainingStage[SupervisedSettings]):
    """See the module."""

    objective: ReasoningObjective

    def __init__(self, name: str, settings: SupervisedSettings, shared: CurriculumContext) -> None:
        self.name = name
        self.settings = settings
        segmentation = shared.workbench.segmentation
        freeze_unused(segmentation)
        if not settings.train_image_encoder:
            segmentation.image_encoder.requires_grad_(False)
        self.objective = ReasoningObjective(shared, settings)
        self._shared = shared

    def batch(self, step: int, rank: int, num_ranks: int) -> AnswerBatch:
        """See :meth:`TrainingStage.batch`."""
        settings = self.settings
        indices = self._shared.training.indices(step, settings.global_batch_size, rank, num_ranks)
        is_opening = step < settings.initial_ratio * settings.steps
        kinds = settings.initial_question_type_weights if is_opening else settings.kinds
        return self._collect(indices, step, kinds)

    def coefficients(self, relative_rate: float) -> dict[str, float]:
        """See :meth:`TrainingStage.coefficients`."""
        settings = self.settings
        weights = settings.weights
        return {
            "reasoning": settings.language_loss_weight,
            "dense.*": settings.auxiliary_loss_weight * relative_rate,
            "readout.*": settings.reference_head_loss_weight,
            **{
                f"masks.{name}": settings.segmentation_loss_weight * getattr(weights, name)
                for name in weights.__struct_fields__
            },
        }

    def evaluate(self, accelerator: Accelerator, num_scenes: int) -> dict[str, float]:
        """Judge generated answers; masks only count once segmentation losses do."""
        scenes = self._shared.held_out.scenes
        questions = held_out_questions(
            self._shared.held_out.preset, scenes, num_scenes, num_scenes // 4
        )
        evaluated = self._shared.judge.evaluate(questions, accelerator=accelerator)
        figures = summarize([each.score for each in evaluated])
        if self.settings.segmentation_loss_weight:
            return figures
        return {k: v for k, v in figures.items() if k.rpartition(".")[2] in TEXT_METRICS}

    def prepare(self, accelerator: Accelerator) -> dict[str, float]:
        """Join the policy to the segmentation path, where the recipe asks for it."""
        return {"join_r2": self._join(accelerator.device)} if self.settings.join else {}

    def _join(self, device: torch.device) -> float:
        """Solve for the query head that turns states at ``<REF_POS>`` into the oracle's queries.

        Ridge regression, folded into the head's weight; nothing but this weight changes.

        Returns:
            Share of the queries' variance that the states explain.
        """
        from accelerate.utils import send_to_device

        states, queries = [], []
        oracle = self._shared.heads.oracle
        with torch.no_grad():
            size = self.settings.global_batch_size
            for step in range(-(-JOIN_SCENES // size)):
                indices = self._shared.training.indices(step, size, 0, 1)
                batch = send_to_device(self._collect(indices, step, {}), device)
                references = batch.rows.references
                found = self.objective.policy_states(
                    batch.images, batch.rows, self._shared.packer.image_start, MIDDLE_LAYER
                ).hidden
                assert found is not None
                states.append(found[references[:, 0], references[:, 1]])
                queries.append(oracle(batch.scenes.attributes[references[:, 0], batch.targets]))
            solution, explained = ridge_regression(torch.cat(states), torch.cat(queries))
            head = self._shared.workbench.segmentation.prior.q_proj
            head.weight.copy_(head.weight @ solution.T)
        return explained

    def _collect(self, indices: list[int], step: int, kinds: dict[str, float]) -> AnswerBatch:
        source, settings = self._shared.training, self.settings
        scenes = source.batch(indices)
        asked = [
            source.questions(index, step, settings.questions_per_image, kinds) for index in indices
        ]
        pairs: list[list[Answered]] = [
            [(q.instruction, q.response + END_TOKEN) for q in questions] for questions in asked
        ]
        rows = self._shared.packer.pack(pairs, settings.max_packed_length or None)
        targets, seen = [], dict[tuple[int, int], int]()
        for row, question in rows.sources.tolist():
            number = seen.get((row, question), 0)
            seen[row, question] = number + 1
            targets.append(asked[row][question].targets[number])
        chance = {index: source.generator(step, index) for index in indices}
        chosen = [
            number
            for number, (row, _) in enumerate(rows.sources.tolist())
            if chance[indices[row]].random() < settings.segmentation_ratio
        ]
        return AnswerBatch(
            scenes,
            policy_pixels(scenes.images, self._shared.workbench.policy.image_processor),
            rows,
            torch.tensor(targets, dtype=torch.int64),
            torch.tensor(chosen, dtype=torch.int64),
            left_out_questions(rows, [len(questions) for questions in asked]),
            cell_truth(scenes, self._shared.heads.language.grid),
        )


def left_out_questions(rows: PackedRows, counts: Sequence[int]) -> Tensor:
    """Tell of each question, image by image, whether it is missing in the packed rows.

    Rows that are too short leave out the long questions, and so teach a world without them.

    Args:
        rows: the packed rows.
        counts: questions of each image.
    """
    return torch.cat(
        [
            ~torch.isin(torch.arange(1, count + 1), blocks)
            for blocks, count in zip(rows.blocks, counts, strict=True)
        ]
    )


def ridge_regression(inputs: Tensor, outputs: Tensor) -> tuple[Tensor, float]:
    """Fit outputs (N, K) as a linear function of inputs (N, D), without an intercept.

    Returns:
        The map, (D, K), and the share of the outputs' variance that it explains.
    """
    inputs, outputs = inputs.double(), outputs.double()
    gram = inputs.T @ inputs
    ridge = JOIN_RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    solution = torch.linalg.solve(gram + ridge.to(gram.device), inputs.T @ outputs)
    missed = (inputs @ solution - outputs).pow(2).sum()
    spread = (outputs - outputs.mean(0)).pow(2).sum()
    return solution.float(), float(1 - missed / spread)


def token_weights(tokenizer: object, location_token_weight: float) -> Tensor:
    """Weigh the tokens that name a row or a column, (V,)."""
    weights = torch.ones(len(tokenizer))  # type: ignore[arg-type]
    for number in range(1, vocabulary.GRID_SIZE + 1):
        for word in (f" row{number}", f" col{number}"):
            ids = tokenizer(word)["input_ids"]  # type: ignore[operator]
            if len(ids) == 1:
                weights[ids[0]] = location_token_weight
    return weights
