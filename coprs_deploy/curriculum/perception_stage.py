"""Perception stage: pre-training of the vision tower and first language layers.

Auxiliary heads predict from each image token what its cell shows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, nn

from coprs_deploy.curriculum.auxiliary_heads import CellLabels, cell_labels
from coprs_deploy.curriculum.context import CurriculumContext
from coprs_deploy.curriculum.packing import PackedRows
from coprs_deploy.curriculum.recipe import PerceptionSettings
from coprs_deploy.curriculum.scenes import SceneSource, policy_pixels
from coprs_deploy.training.stage import StageOutput, TrainingStage, mean_metrics

if TYPE_CHECKING:
    from accelerate import Accelerator


class PerceptionBatch(NamedTuple):
    """Images without questions.

    Attributes:
        images: (B, 3, S, S) normalized pixels.
        rows: rows with the image tokens alone.
        labels: labels of each image token's cell.
    """

    images: Tensor
    rows: PackedRows
    labels: CellLabels


class PerceptionObjective(nn.Module):
    """Cell heads behind the vision tower and behind the first language layers."""

    def __init__(self, context: CurriculumContext, settings: PerceptionSettings) -> None:
        super().__init__()
        model = context.state.policy.model.model
        self.visual = model.visual
        self.embedding = model.language_model.embed_tokens
        self.layers = model.language_model.layers[: settings.num_language_layers]
        self.cell_heads = context.auxiliary_heads.cells
        self._forward = context.forward(settings.torch_compile)
        self._packer = context.packer

    def forward(self, batch: PerceptionBatch) -> StageOutput:
        """Compute the losses of both heads."""
        packer = self._packer
        states = self._forward(
            batch.images, batch.rows, packer.image_start, len(self.layers), stop=True
        )
        tokens = states.middle[:, packer.image_start : packer.image_stop]
        output: StageOutput = self.cell_heads(states.image_features, tokens, batch.labels)
        return output


class PerceptionStage(TrainingStage[PerceptionSettings]):
    """Pre-training of the policy through the cell heads."""

    def __init__(self, name: str, settings: PerceptionSettings, context: CurriculumContext) -> None:
        self.name = name
        self.settings = settings
        self.objective = PerceptionObjective(context, settings)
        self._context = context

    def batch(self, step: int, rank: int, num_ranks: int) -> PerceptionBatch:
        """See :meth:`TrainingStage.batch`."""
        source = self._context.training
        indices = source.indices(step, self.settings.global_batch_size, rank, num_ranks)
        return self._collect(source, indices)

    def loss_coefficients(self, lr_factor: float) -> dict[str, float]:
        """See :meth:`TrainingStage.loss_coefficients`."""
        return {"vision_head.*": 1.0, "language_head.*": 1.0}

    def evaluate(self, accelerator: Accelerator, num_examples: int) -> dict[str, float]:
        """Measure the accuracies of both heads on held-out scenes."""
        return mean_metrics(
            accelerator,
            self.objective,
            lambda indices: self._collect(self._context.held_out, indices),
            min(num_examples, len(self._context.held_out.scenes)),
        )

    def _collect(self, source: SceneSource, indices: list[int]) -> PerceptionBatch:
        context = self._context
        scenes = source.batch(indices)
        images = policy_pixels(scenes.images, context.state.policy.image_processor)
        rows = context.packer.prefix_rows(len(indices))
        labels = cell_labels(scenes, context.packer.grid_size)
        return PerceptionBatch(images, rows, labels)
