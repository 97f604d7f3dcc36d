"""Warm-up: the policy's vision tower and first language layers learn to see."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, nn

from coprs_deploy.training.heads import CellReader, CellTruth, HeadResult, cell_truth
from coprs_deploy.training.packing import PackedRows
from coprs_deploy.training.phase_settings import WarmUpPhase
from coprs_deploy.training.phases.held_out import mean_metrics
from coprs_deploy.training.phases.phase import Outcome, TrainingPhase
from coprs_deploy.training.phases.scene_training import SceneTraining
from coprs_deploy.training.pixels import policy_pixels
from coprs_deploy.training.scene_source import SceneSource

if TYPE_CHECKING:
    from accelerate import Accelerator


class WarmUpBatch(NamedTuple):
    """Normalized pixels (B, 3, S, S), the rows of the prefix, and the truth of each cell."""

    images: Tensor
    rows: PackedRows
    truth: CellTruth


class WarmUpObjective(nn.Module):
    """Heads after the vision tower and after the first language layers."""

    def __init__(self, shared: SceneTraining, settings: WarmUpPhase) -> None:
        super().__init__()
        model = shared.workbench.policy.model.model
        self.visual = model.visual
        self.embedding = model.language_model.embed_tokens
        self.layers = model.language_model.layers[: settings.language_layers]
        self.vision_head: CellReader = shared.heads.vision
        self.language_head: CellReader = shared.heads.language
        self._forward = shared.forward(settings.compile)
        self._packer = shared.packer

    def forward(self, batch: WarmUpBatch) -> Outcome:
        """Read every cell twice."""
        packer = self._packer
        states = self._forward(
            batch.images, batch.rows, packer.image_start, len(self.layers), stop=True
        )
        tokens = states.middle[:, packer.image_start : packer.image_stop]
        return read_cells(
            self.vision_head, self.language_head, states.image_features, tokens, batch.truth
        )


class WarmUp(TrainingPhase[WarmUpPhase]):
    """See the module."""

    def __init__(self, name: str, settings: WarmUpPhase, shared: SceneTraining) -> None:
        self.name = name
        self.settings = settings
        self.objective = WarmUpObjective(shared, settings)
        self._shared = shared

    def batch(self, step: int, rank: int, num_ranks: int) -> WarmUpBatch:
        """See :meth:`TrainingPhase.batch`."""
        indices = self._shared.training.indices(step, self.settings.batch_images, rank, num_ranks)
        return self._collect(self._shared.training, indices)

    def coefficients(self, relative_rate: float) -> dict[str, float]:
        """See :meth:`TrainingPhase.coefficients`."""
        return {}

    def evaluate(self, accelerator: Accelerator, num_scenes: int) -> dict[str, float]:
        """Share of cells and attributes that the language head reads right."""
        return mean_metrics(
            accelerator,
            self.objective,
            lambda indices: self._collect(self._shared.held_out, indices),
            min(num_scenes, len(self._shared.held_out.scenes)),
        )

    def _collect(self, source: SceneSource, indices: list[int]) -> WarmUpBatch:
        scenes = source.batch(indices)
        images = policy_pixels(scenes.images, self._shared.workbench.policy.image_processor)
        rows = self._shared.packer.prefix_rows(len(indices))
        return WarmUpBatch(images, rows, cell_truth(scenes, self._shared.heads.language.grid))


def read_cells(
    vision_head: CellReader,
    language_head: CellReader,
    features: Tensor,
    tokens: Tensor,
    truth: CellTruth,
) -> Outcome:
    """Read what the cells show, from the tower's tokens and from the language model's."""
    results: dict[str, HeadResult] = {
        "vision": vision_head(features, truth),
        "language": language_head(tokens, truth),
    }
    losses = {f"{head}.{k}": v for head, r in results.items() for k, v in r.losses.items()}
    metrics = {f"vision.{k}": v for k, v in results["vision"].accuracies.items()}
    return Outcome(losses, {**metrics, **results["language"].accuracies})
