"""Distillation stage: the student's embedding, and masks behind the frozen decoder.

The teacher's embedding is computed in float32, or read from precomputed features. Priors and masks
of both come from the same frozen prior and decoder and the same concentrations, so that they differ
by the image encoder alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coprs_deploy.data.examples import Example
from coprs_deploy.images import RgbArray
from coprs_deploy.models import SegmentationModel
from coprs_deploy.specs import Geometry
from coprs_deploy.training.batches import EpochOrder
from coprs_deploy.training.distillation.recipe import (
    AGREEMENT,
    EMBEDDING_COSINE,
    EMBEDDING_ERROR,
    TEACHER,
    DistillationSettings,
)
from coprs_deploy.training.features import FeatureStore, load_images
from coprs_deploy.training.losses import Mean, inside_image, segmentation_losses
from coprs_deploy.training.mask_decoding import (
    decode_targets,
    encode_images,
    fit_ignore_mask,
    fit_mask,
    intersection_over_union,
    mask_metrics,
)
from coprs_deploy.training.settings import SegmentationLossWeights
from coprs_deploy.training.stage import StageOutput, TrainingStage, mean_metrics
from coprs_deploy.training.state import TrainingState

if TYPE_CHECKING:
    from accelerate import Accelerator

NUM_DRAWS = 16
"""Concentrations drawn for a held-out image without an instruction, of which one is chosen."""

PREFERRED_MASK_RATIO = 0.25
"""Share of the mask cells that the chosen concentration's mask comes closest to."""

_BACKGROUND = -torch.finfo(torch.float32).max


class DistillationBatch(NamedTuple):
    """Images, and targets of some of them, as tensors.

    Attributes:
        images: (B, 3, S, S) float32, input of the student's image encoder.
        teacher: the teacher's embeddings (B, C, G, G) float16, its input (B, 3, S', S'), or None
            where that is ``images``.
        unpadded_sizes: int64 (B, 2), height and width in pixels of each padded image.
        rows: int64 (N,), image of each target.
        concentrations: (N, D), of the teacher's policy.
        masks: (N, 1, M, M), ground truth: share of each mask cell that the target covers; without
            ``has_masks`` all zero.
        ignored: (B, 1, M, M), share of each mask cell that no comparison with ground truth counts.
        is_encoded: whether ``teacher`` holds embeddings.
        has_masks: whether there is ground truth.
    """

    images: Tensor
    teacher: Tensor | None
    unpadded_sizes: Tensor
    rows: Tensor
    concentrations: Tensor
    masks: Tensor
    ignored: Tensor
    is_encoded: bool
    has_masks: bool


@dataclass(frozen=True)
class DistillationSets:
    """Images and examples of a distillation.

    Attributes:
        images: unlabeled training images.
        examples: training examples of stages behind the decoder; empty without such stages.
        held_out: held-out examples, or images without instruction.
        concentrations: of each of ``examples``, (N, D) float32.
        held_out_concentrations: of each of ``held_out``; None where the images have no
            instructions, so that concentrations are drawn.
        teacher_geometry: input of the teacher's image encoder.
        seed: seed of the order of the images.
        features: the teacher's embeddings; None computes them.
    """

    images: Sequence[Example]
    examples: Sequence[Example]
    held_out: Sequence[Example]
    concentrations: Sequence[Tensor]
    held_out_concentrations: Sequence[Tensor] | None
    teacher_geometry: Geometry
    seed: int
    features: FeatureStore | None = None
    drawn: dict[int, Tensor] = field(default_factory=dict)


class DistillationObjective(nn.Module):
    """The student with the teacher's frozen prior and decoder.

    The teacher's encoder is no part of this module: it has no place in the states of a run, and
    its batch normalizations stay as they are.
    """

    def __init__(
        self, state: TrainingState, teacher: nn.Module, settings: DistillationSettings
    ) -> None:
        super().__init__()
        self.segmentation = state.segmentation
        self._teacher = (teacher.eval(),)
        self._settings = settings

    @torch.no_grad()
    def teacher_embedding(self, batch: DistillationBatch) -> Tensor:
        """Return the teacher's embeddings (B, C, G, G) in float32."""
        if batch.is_encoded:
            assert batch.teacher is not None, "embeddings were read"
            return batch.teacher.float()
        images = batch.images if batch.teacher is None else batch.teacher
        with torch.autocast(images.device.type, enabled=False):
            embedding: Tensor = self._teacher[0](images)
        return embedding

    def forward(self, batch: DistillationBatch) -> StageOutput:
        """Compare embeddings, and the priors and masks of all concentrations."""
        model, settings = self.segmentation, self._settings
        target = self.teacher_embedding(batch)
        embedding = encode_images(model, batch.images).float()
        geometry = model.config.geometry
        cells = inside_image(batch.unpadded_sizes, geometry.grid_size, geometry.patch_size)
        is_training = torch.is_grad_enabled()
        losses = {"embedding": Mean.of(self._embedding_loss(embedding, target, cells))}
        metrics = {} if is_training else embedding_metrics(embedding, target, cells)
        # Also without targets: all processes must have the same losses and metrics.
        if settings.decoding_loss_weight or not is_training:
            of_student, of_teacher, inside = self._decode(batch, embedding, target)
            losses |= self._decoding_losses(of_student, of_teacher, inside)
            if not is_training:
                metrics |= _mask_metrics(batch, of_student, of_teacher, inside)
        return StageOutput(losses, metrics)

    def _embedding_loss(self, embedding: Tensor, target: Tensor, cells: Tensor) -> Tensor:
        """Return the loss of each image, (B,), the mean over the cells inside."""
        function = F.mse_loss if self._settings.embedding_loss == "mse" else F.huber_loss
        loss: Tensor = function(embedding, target, reduction="none")
        total: Tensor = (loss * cells).flatten(1).sum(1)
        return total / (cells.flatten(1).sum(1) * embedding.shape[1])

    def _decode(
        self, batch: DistillationBatch, embedding: Tensor, target: Tensor
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor]:
        """Return priors and masks of student and teacher, and the cells inside the images."""
        model, rows = self.segmentation, batch.rows
        geometry = model.config.geometry
        inside = inside_image(batch.unpadded_sizes[rows], geometry.mask_size, geometry.mask_stride)
        states = batch.concentrations
        with torch.no_grad():
            of_teacher = decode_targets(model, target[rows], states, inside)
        return decode_targets(model, embedding[rows], states, inside), of_teacher, inside

    def _decoding_losses(
        self, found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], inside: Tensor
    ) -> dict[str, Mean]:
        """Compare with the teacher's probabilities, those of the prior and those of the mask."""
        losses: dict[str, Mean] = {}
        for start, logits in zip(("prior_", "mask_"), expected, strict=True):
            weights = _only(self._settings.loss_weights, start)
            probability = logits.float().sigmoid()
            losses |= segmentation_losses(*found, probability, inside, weights)
        return losses


def embedding_metrics(embedding: Tensor, target: Tensor, cells: Tensor) -> dict[str, Mean]:
    """Return the error relative to the norm, and the cosine, both inside the images."""
    found, expected = ((each * cells).flatten(1) for each in (embedding, target))
    error = (found - expected).norm(dim=1) / expected.norm(dim=1)
    cosine = F.cosine_similarity(found, expected, dim=1)
    return {EMBEDDING_ERROR: Mean.of(error), EMBEDDING_COSINE: Mean.of(cosine)}


def _mask_metrics(
    batch: DistillationBatch,
    of_student: tuple[Tensor, Tensor],
    of_teacher: tuple[Tensor, Tensor],
    inside: Tensor,
) -> dict[str, Mean]:
    """Measure the IoU of priors and masks with the teacher's, and of both with ground truth."""
    visible = inside > 0.5
    student, teacher = (
        [torch.where(visible, logits.float(), _BACKGROUND) for logits in each]
        for each in (of_student, of_teacher)
    )
    metrics = {
        f"{AGREEMENT}{name}": Mean.of(_agreement(*logits))
        for name, logits in zip(
            ("prior_giou", "giou"), zip(student, teacher, strict=True), strict=True
        )
    }
    if not batch.has_masks:
        return metrics
    counted = (inside * (1 - batch.ignored[batch.rows])) > 0.5
    gt = (batch.masks > 0.5)[:, 0] & counted[:, 0]
    for start, logits in (("", student), (TEACHER, teacher)):
        counts = [torch.where(counted, each, _BACKGROUND) for each in logits]
        found = mask_metrics(counts[0], counts[1], gt)
        metrics |= {start + name: mean for name, mean in found.items()}
    return metrics


def _agreement(logits: Tensor, others: Tensor) -> Tensor:
    """Return the IoU (N,) of thresholded logits (N, 1, M, M); 1 where both masks are empty."""
    iou = intersection_over_union(logits, others[:, 0] > 0)
    is_empty = ~((logits > 0) | (others > 0)).flatten(1).any(1)
    return torch.where(is_empty, torch.ones_like(iou), iou)


def _only(weights: SegmentationLossWeights, start: str) -> SegmentationLossWeights:
    """Keep the weights of one part, ``prior_`` or ``mask_``."""
    zeros = {name: 0.0 for name in weights.__struct_fields__ if not name.startswith(start)}
    return msgspec.structs.replace(weights, **zeros)


class DistillationStage(TrainingStage[DistillationSettings]):
    """Training of the student's image encoder."""

    def __init__(
        self,
        name: str,
        settings: DistillationSettings,
        state: TrainingState,
        teacher: nn.Module,
        sets: DistillationSets,
    ) -> None:
        self.name = name
        self.settings = settings
        self.objective: DistillationObjective = DistillationObjective(state, teacher, settings)
        self._sets = sets
        self._geometry = state.segmentation.config.geometry
        self._hidden_size = state.segmentation.config.policy_hidden_size
        self._training = sets.examples if settings.decoding_loss_weight else sets.images
        self._order = EpochOrder(len(self._training), sets.seed)

    def batch(self, step: int, rank: int, num_ranks: int) -> DistillationBatch:
        """See :meth:`TrainingStage.batch`."""
        size = self.settings.global_batch_size
        positions = range(step * size + rank, (step + 1) * size, num_ranks)
        indices = [self._order[position] for position in positions]
        examples = [self._training[index] for index in indices]
        if not self.settings.decoding_loss_weight:
            return self._collect(examples, [self._no_concentration()] * len(examples))
        return self._collect(examples, [self._sets.concentrations[index] for index in indices])

    def loss_coefficients(self, lr_factor: float) -> dict[str, float]:
        """See :meth:`TrainingStage.loss_coefficients`."""
        weights, factor = self.settings.loss_weights, self.settings.decoding_loss_weight
        return {
            "embedding": self.settings.embedding_loss_weight,
            **{name: factor * getattr(weights, name) for name in weights.__struct_fields__},
        }

    def evaluate(self, accelerator: Accelerator, num_examples: int) -> dict[str, float]:
        """Measure errors of the embedding, and the IoU of priors and masks, on held-out images."""
        held_out, known = self._sets.held_out, self._sets.held_out_concentrations

        def collect(indices: list[int]) -> DistillationBatch:
            examples = [held_out[index] for index in indices]
            if known is not None:
                found = [known[index] for index in indices]
                return self._collect(examples, found, with_masks=True)
            missing = [i for i in indices if i not in self._sets.drawn]
            for index in missing:
                self._sets.drawn[index] = self._draw(held_out[index], index, accelerator.device)
            return self._collect(examples, [self._sets.drawn[index] for index in indices])

        return mean_metrics(
            accelerator,
            self.objective,
            collect,
            min(num_examples, len(held_out)),
            self.settings.global_batch_size,
        )

    def _collect(
        self,
        examples: Sequence[Example],
        concentrations: Sequence[Tensor],
        *,
        with_masks: bool = False,
    ) -> DistillationBatch:
        """Collect examples and their concentrations, of which a part may have none."""
        geometry, images = self._geometry, [example.image for example in examples]
        inputs, sizes = load_images(images, geometry, None)
        counts = torch.tensor([len(each) for each in concentrations])
        rows = torch.repeat_interleave(torch.arange(len(examples)), counts)
        grid = geometry.mask_size
        masks = torch.zeros(int(counts.sum()), 1, grid, grid)
        if with_masks:
            pairs = zip(examples, counts.tolist(), strict=True)
            decoded = [mask for example, count in pairs if count for mask in example.masks]
            for number, (mask, row) in enumerate(zip(decoded, rows, strict=True)):
                masks[number] = fit_mask(mask, sizes[row], geometry)
        ignored = [
            fit_ignore_mask(example.ignore_mask, size, geometry)
            for example, size in zip(examples, sizes, strict=True)
        ]
        return DistillationBatch(
            inputs,
            self._teacher_input(images),
            sizes,
            rows,
            torch.cat(list(concentrations)),
            masks,
            torch.stack(ignored),
            is_encoded=self._sets.features is not None,
            has_masks=with_masks,
        )

    def _teacher_input(self, images: Sequence[RgbArray]) -> Tensor | None:
        """Return the teacher's embeddings or its input; None where the student's is the same."""
        geometry = self._sets.teacher_geometry
        if self._sets.features is None and geometry == self._geometry:
            return None
        return load_images(images, geometry, self._sets.features)[0]

    def _no_concentration(self) -> Tensor:
        return torch.zeros(0, self._hidden_size)

    @torch.no_grad()
    def _draw(self, example: Example, index: int, device: torch.device) -> Tensor:
        """Draw a concentration (1, D) whose mask has a usual size with the teacher's embedding."""
        from accelerate.utils import send_to_device

        generator = torch.Generator().manual_seed(index)
        drawn = torch.randn(NUM_DRAWS, self._hidden_size, generator=generator)
        batch = send_to_device(self._collect([example], [drawn]), device)
        model: SegmentationModel = self.objective.segmentation
        target = self.objective.teacher_embedding(batch)[batch.rows]
        sizes = batch.unpadded_sizes[batch.rows]
        inside = inside_image(sizes, self._geometry.mask_size, self._geometry.mask_stride)
        _, masks = decode_targets(model, target, batch.concentrations, inside)
        area = ((masks > 0) * inside).flatten(1).sum(1) / inside.flatten(1).sum(1)
        best = int((area - PREFERRED_MASK_RATIO).abs().argmin())
        return drawn[best : best + 1]
