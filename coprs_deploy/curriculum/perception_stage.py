"""Warm-up: the policy's vision tower and first language layers learn to see."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, nn

from coprs_deploy.curriculum.auxiliary_heads import CellReader, CellTruth, HeadResult, cell_truth
from coprs_deploy.curriculum.context import CurriculumContext
from coprs_deploy.curriculum.packing import PackedRows
from coprs_deploy.curriculum.recipe import PerceptionSettings
from coprs_deploy.curriculum.scenes import SceneSource, policy_pixels
from coprs_deploy.training.stage import StageOutput, TrainingStage, mean_metrics

if TYPE_CHECKING:
    from accelerate import Accelerator


class PerceptionBatch(NamedTuple):
    """Normalized pixels (B, 3, S, S), the rows of the prefix, and the truth of each cell."""

    images: Tensor
    rows: PackedRows
    truth: CellTruth


class PerceptionObjective(nn.Module):
    """Heads after the vision tower and after the first language layers."""

    def __init__(self, shared: CurriculumContext, settings: PerceptionSettings) -> None:
        super().__init__()
        model = shared.workbench.policy.model.model
        self.visual = model.visual
        self.embedding = model.language_model.embed_tokens
        self.layers = model.language_model.layers[: settings.num_language_layers]
        self.vision_head: CellReader = shared.heads.vision
        self.language_head: CellReader = shared.heads.language
        self._forward = shared.forward(settings.compile)
        self._packer = shared.packer

    def forward(self, batch: PerceptionBatch) -> StageOutput:
        """Read every cell twice."""
        packer = self._packer
        states = self._forward(
            batch.images, batch.rows, packer.image_start, len(self.layers), stop=True
        )
        tokens = states.middle[:, packer.image_start : packer.image_stop]
        return read_cells(
            self.vision_head, self.language_head, states.image_features, tokens, batch.truth
        )


class PerceptionStage(TrainingStage[PerceptionSettings]):
    """See the module."""

    def __init__(self, name: str, settings: PerceptionSettings, shared: CurriculumContext) -> None:
        self.name = name
        self.settings = settings
        self.objective = PerceptionObjective(shared, settings)
        self._shared = shared

    def batch(self, step: int, rank: int, num_ranks: int) -> PerceptionBatch:
        """See :meth:`TrainingStage.batch`."""
        indices = self._shared.training.indices(
            step, self.settings.global_batch_size, rank, num_ranks
        )
        return self._collect(self._shared.training, indices)

    def coefficients(self, relative_rate: float) -> dict[str, float]:
        """See :meth:`TrainingStage.coefficients`."""
        return {}

    def evaluate(self, accelerator: Accelerator, num_scenes: int) -> dict[str, float]:
        """Share of cells and attributes that the language head reads right."""
        return mean_metrics(
            accelerator,
            self.objective,
            lambda indices: self._collect(self._shared.held_out, indices),
            min(num_scenes, len(self._shared.held_out.scenes)),
        )

    def _collect(self, source: SceneSource, indices: list[int]) -> PerceptionBatch:
        scenes = source.batch(indices)
        images = policy_pixels(scenes.images, self._shared.workbench.policy.image_processor)
        rows = self._shared.packer.prefix_rows(len(indices))
        return PerceptionBatch(images, rows, cell_truth(scenes, self._shared.heads.language.grid))


def read_cells(
    vision_head: CellReader,
    language_head: CellReader,
    features: Tensor,
    tokens: Tensor,
    truth: CellTruth,
) -> StageOutput:
    """Read what the cells show, from the tower's tokens and from the language model's."""
    results: dict[str, HeadResult] = {
        "vision": vision_head(features, truth),
        "language": language_head(tokens, truth),
    }
    losses = {f"{head}.{k}": v for head, r in results.items() for k, v in r.losses.items()}
    metrics = {f"vision.{k}": v for k, v in results["vision"].accuracies.items()}
    return StageOutput(losses, {**metrics, **results["language"].accuracies})
