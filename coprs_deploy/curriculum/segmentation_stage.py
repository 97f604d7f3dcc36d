"""Segmentation stage: the segmentation path alone, with an oracle query for each target."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import msgspec
import torch
from torch import Tensor, nn

from coprs_deploy.curriculum.auxiliary_heads import prefixed
from coprs_deploy.curriculum.context import CurriculumContext
from coprs_deploy.curriculum.recipe import SegmentationSettings
from coprs_deploy.curriculum.scenes import (
    SceneBatch,
    SceneSource,
    segmentation_pixels,
    target_masks,
)
from coprs_deploy.models import SegmentationModel
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

APPEARANCE_WEIGHT = 0.25
"""Weight of a patch's appearance, relative to the foreground."""


class SegmentationBatch(NamedTuple):
    """Scenes and their targets.

    Attributes:
        scenes: B scenes.
        rows: int64 (N,), scene of each target.
        targets: int64 (N,), number of the target in its scene.
    """

    scenes: SceneBatch
    rows: Tensor
    targets: Tensor


class SegmentationObjective(nn.Module):
    """The segmentation path with the oracle query in place of the policy."""

    def __init__(self, context: CurriculumContext, weights: SegmentationLossWeights) -> None:
        super().__init__()
        self.segmentation = context.state.segmentation
        self.oracle = context.auxiliary_heads.oracle
        self.patches = context.auxiliary_heads.patches
        self._weights = weights

    def forward(self, batch: SegmentationBatch) -> StageOutput:
        """Decode every target."""
        scenes, rows, targets = batch
        pixels = segmentation_pixels(scenes.images, self.segmentation.config.geometry)
        embedding = encode_images(self.segmentation, pixels)
        queries = self.oracle(scenes.attributes[rows, targets])
        output = mask_output(self.segmentation, embedding, queries, batch, self._weights)
        auxiliary = self.patches(embedding, scenes).losses
        return output._replace(losses=output.losses | prefixed("auxiliary", auxiliary))


def mask_output(
    model: SegmentationModel,
    embedding: Tensor,
    queries: Tensor,
    batch: SegmentationBatch,
    weights: SegmentationLossWeights,
) -> StageOutput:
    """Decode every target of a batch; compute the segmentation losses and the IoU.

    Args:
        model: the segmentation path.
        embedding: (B, C, G, G), image embedding of each scene.
        queries: (N, D), hidden state or oracle query of each target.
        batch: scenes and targets.
        weights: weights of the losses; those without a weight are not computed.
    """
    geometry = model.config.geometry
    masks = target_masks(batch.scenes, batch.rows, batch.targets)
    inside = whole_images(len(masks), geometry, masks.device)
    priors, logits = decode_targets(model, embedding[batch.rows], queries, inside)
    target = mask_targets(masks, geometry.mask_size)
    losses = segmentation_losses(priors, logits, target, inside, weights)
    return StageOutput(losses, mask_metrics(priors, logits, masks))


class SegmentationStage(TrainingStage[SegmentationSettings]):
    """Training of the segmentation path with the oracle query."""

    def __init__(
        self, name: str, settings: SegmentationSettings, context: CurriculumContext
    ) -> None:
        self.name = name
        self.settings = settings
        self.objective = SegmentationObjective(context, settings.loss_weights)
        freeze_unused(context.state.segmentation)
        self._training, self._held_out = context.training, context.held_out

    def batch(self, step: int, rank: int, num_ranks: int) -> SegmentationBatch:
        """See :meth:`TrainingStage.batch`."""
        source = self._training
        indices = source.indices(step, self.settings.global_batch_size, rank, num_ranks)
        targets = []
        for index in indices:
            order = source.generator(step, index).permutation(len(source.scenes.objects[index]))
            targets.append(order[: self.settings.targets_per_image].tolist())
        return _batch(source, indices, targets)

    def loss_coefficients(self, lr_factor: float) -> dict[str, float]:
        """See :meth:`TrainingStage.loss_coefficients`."""
        weights, auxiliary = self.settings.loss_weights, self.settings.auxiliary_loss_weight
        return {
            **msgspec.structs.asdict(weights),
            "auxiliary.foreground": auxiliary,
            "auxiliary.*": APPEARANCE_WEIGHT * auxiliary,
        }

    def evaluate(self, accelerator: Accelerator, num_examples: int) -> dict[str, float]:
        """Measure the IoU of prior and mask over all objects of held-out scenes."""
        source = self._held_out

        def collect(indices: list[int]) -> SegmentationBatch:
            all_objects = [list(range(len(source.scenes.objects[i]))) for i in indices]
            return _batch(source, indices, all_objects)

        return mean_metrics(
            accelerator, self.objective, collect, min(num_examples, len(source.scenes))
        )


def _batch(source: SceneSource, indices: list[int], targets: list[list[int]]) -> SegmentationBatch:
    rows = [row for row, numbers in enumerate(targets) for _ in numbers]
    flat = [target for numbers in targets for target in numbers]
    return SegmentationBatch(source.batch(indices), torch.tensor(rows), torch.tensor(flat))
