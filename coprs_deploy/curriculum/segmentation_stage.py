"""Segmentation alone: the whole path from pixels to masks, asked by a query that knows."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from coprs_deploy.curriculum.context import CurriculumContext
from coprs_deploy.curriculum.recipe import SegmentationSettings
from coprs_deploy.curriculum.scenes import (
    SceneBatch,
    SceneSource,
    segmentation_pixels,
    target_masks,
)
from coprs_deploy.training.losses import segmentation_losses
from coprs_deploy.training.mask_decoding import (
    decode_targets,
    encode_images,
    mask_metrics,
    mask_targets,
    whole_images,
)
from coprs_deploy.training.settings import SegmentationLossWeights
from coprs_deploy.training.stage import StageOutput, TrainingStage, mean_metrics
from coprs_deploy.training.state import freeze_unused

if TYPE_CHECKING:
    from accelerate import Accelerator

LOOKS_WEIGHT = 0.25
"""Weight of what a patch's owner looks like, beside where the foreground is."""


class SegmentationBatch(NamedTuple):
    """Scenes and the targets that are asked for.

    Attributes:
        scenes: B scenes.
        rows: int64 (N,), the scene of each target.
        targets: int64 (N,), its number in the scene's table.
    """

    scenes: SceneBatch
    rows: Tensor
    targets: Tensor


class SegmentationObjective(nn.Module):
    """The segmentation path with the oracle in the policy's place."""

    def __init__(self, shared: CurriculumContext, weights: SegmentationLossWeights) -> None:
        super().__init__()
        self.segmentation = shared.workbench.segmentation
        self.oracle = shared.heads.oracle
        self.patches = shared.heads.patches
        self._weights = weights

    def forward(self, batch: SegmentationBatch) -> StageOutput:
        """Decode every target."""
        scenes, rows, targets = batch
        geometry = self.segmentation.config.geometry
        embedding = encode_images(self.segmentation, segmentation_pixels(scenes.images, geometry))
        query = self.oracle(scenes.attributes[rows, targets])
        masks = target_masks(scenes, rows, targets)
        inside = whole_images(len(rows), geometry, masks.device)
        prior_logits, mask_logits = decode_targets(
            self.segmentation, embedding[rows], query, inside
        )
        target = mask_targets(masks, geometry.mask_size)
        losses = segmentation_losses(prior_logits, mask_logits, target, inside, self._weights)
        dense = self.patches(embedding, scenes)
        losses.update({f"dense.{name}": mean for name, mean in dense.losses.items()})
        metrics = mask_metrics(prior_logits, mask_logits, masks)
        return StageOutput(losses, metrics)


class SegmentationStage(TrainingStage[SegmentationSettings]):
    """See the module."""

    def __init__(
        self, name: str, settings: SegmentationSettings, shared: CurriculumContext
    ) -> None:
        self.name = name
        self.settings = settings
        self.objective = SegmentationObjective(shared, settings.weights)
        freeze_unused(shared.workbench.segmentation)
        self._training, self._held_out = shared.training, shared.held_out

    def batch(self, step: int, rank: int, num_ranks: int) -> SegmentationBatch:
        """See :meth:`TrainingStage.batch`."""
        source = self._training
        indices = source.indices(step, self.settings.global_batch_size, rank, num_ranks)
        targets = []
        for index in indices:
            order = source.generator(step, index).permutation(len(source.scenes.objects[index]))
            targets.append(order[: self.settings.targets_per_image].tolist())
        return _batch(source, indices, targets)

    def coefficients(self, relative_rate: float) -> dict[str, float]:
        """See :meth:`TrainingStage.coefficients`."""
        weights, dense = self.settings.weights, self.settings.auxiliary_loss_weight
        return {
            **{name: getattr(weights, name) for name in weights.__struct_fields__},
            "dense.foreground": dense,
            "dense.*": LOOKS_WEIGHT * dense,
        }

    def evaluate(self, accelerator: Accelerator, num_scenes: int) -> dict[str, float]:
        """IoU of prior and mask with the truth over all objects of held-out scenes."""
        source = self._held_out

        def collect(indices: list[int]) -> SegmentationBatch:
            everything = [list(range(len(source.scenes.objects[i]))) for i in indices]
            return _batch(source, indices, everything)

        return mean_metrics(
            accelerator, self.objective, collect, min(num_scenes, len(source.scenes))
        )


def _batch(source: SceneSource, indices: list[int], targets: list[list[int]]) -> SegmentationBatch:
    rows = [row for row, chosen in enumerate(targets) for _ in chosen]
    flat = [target for chosen in targets for target in chosen]
    return SegmentationBatch(source.batch(indices), torch.tensor(rows), torch.tensor(flat))
