"""Supervised answers on examples from files, for a policy of any size and family.

The policy runs its own forward pass, one question a row; the segmentation path sees each picture
fitted to its padded square. Targets follow the ``<REF_POS>`` of the response in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from coprs_deploy.data.examples import Example
from coprs_deploy.images import PreparedImage, fit_pixel_count, prepare_image
from coprs_deploy.policy.vision_inputs import VisionProcessor
from coprs_deploy.prompts import REFERENCE_TOKEN, encode_prompt
from coprs_deploy.training.batches import EpochOrder
from coprs_deploy.training.features import FeatureStore
from coprs_deploy.training.losses import (
    IGNORED_LABEL,
    inside_image,
    segmentation_losses,
    token_cross_entropy,
)
from coprs_deploy.training.mask_decoding import (
    decode_targets,
    encode_images,
    fit_mask,
    mask_metrics,
)
from coprs_deploy.training.settings import SupervisedSettings
from coprs_deploy.training.stage import StageOutput, TrainingStage, mean_metrics
from coprs_deploy.training.state import TrainingState, freeze_unused

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class ExampleSets:
    """What is learned from and judged on.

    Attributes:
        training: examples to learn from.
        held_out: examples to be judged on.
        vision: the policy's image side.
        seed: of the order.
        features: image embeddings that are known already.
    """

    training: Sequence[Example]
    held_out: Sequence[Example]
    vision: VisionProcessor
    seed: int
    features: FeatureStore | None = None


class ExampleBatch(NamedTuple):
    """Examples as tensors.

    Attributes:
        inputs: keyword arguments of the policy's forward pass.
        labels: int64 (B, L), the token that follows, where it is to be learned.
        references: int64 (N, 2), row and column of each ``<REF_POS>`` that is fed.
        images: (B, 3, S, S) float32, padded and normalized for the image encoder; where
            ``is_encoded``, (B, C, G, G) float16, what the encoder made of them.
        masks: (N, 1, M, M), share of each mask cell that the target covers.
        unpadded_sizes: int64 (B, 2), height and width in pixels of each padded image.
        is_encoded: whether ``images`` holds embeddings.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    references: Tensor
    images: Tensor
    masks: Tensor
    unpadded_sizes: Tensor
    is_encoded: bool = False


class ExampleObjective(nn.Module):
    """The policy's own forward pass, then the segmentation path from its states."""

    def __init__(self, workbench: TrainingState, settings: SupervisedSettings) -> None:
        super().__init__()
        self.policy = workbench.policy.model
        self.segmentation = workbench.segmentation
        self._settings = settings

    def forward(self, batch: ExampleBatch) -> StageOutput:
        """Compute cross-entropy and segmentation losses."""
        hidden = self.policy.model(**batch.inputs, use_cache=False).last_hidden_state
        is_learned = batch.labels != IGNORED_LABEL
        logits = self.policy.get_output_embeddings()(hidden[is_learned])
        even = torch.ones(logits.shape[-1], device=logits.device)
        losses = {"reasoning": token_cross_entropy(logits, batch.labels[is_learned], even)}
        if not self._settings.segmentation_loss_weight:
            return StageOutput(losses, {})
        model, rows = self.segmentation, batch.references[:, 0]
        geometry = model.config.geometry
        learns = torch.is_grad_enabled() and self._settings.train_image_encoder
        with torch.set_grad_enabled(learns):
            embedding = self._embed(batch)
        inside = inside_image(batch.unpadded_sizes[rows], geometry.mask_size, geometry.mask_stride)
        states = hidden[rows, batch.references[:, 1]].to(embedding.dtype)
        priors, masks = decode_targets(model, embedding[rows], states, inside)
        parts = segmentation_losses(priors, masks, batch.masks, inside, self._settings.weights)
        losses.update({f"masks.{name}": mean for name, mean in parts.items()})
        truth = (batch.masks[:, 0] > 0.5) & (inside[:, 0] > 0)
        far_outside = -torch.finfo(torch.float32).max
        shown = [torch.where(inside > 0, x.float(), far_outside) for x in (priors, masks)]
        return StageOutput(losses, mask_metrics(shown[0], shown[1], truth))

    def _embed(self, batch: ExampleBatch) -> Tensor:
        """Run the image encoder, unless the batch holds embeddings already."""
        if batch.is_encoded:
            return batch.images.float()
        return encode_images(self.segmentation, batch.images)


class ExampleCollector:
    """Turns examples into batches for one policy and one segmentation path.

    Args:
        workbench: the model.
        vision: the policy's image side.
        features: image embeddings that are known already.
    """

    def __init__(
        self,
        workbench: TrainingState,
        vision: VisionProcessor,
        features: FeatureStore | None = None,
    ) -> None:
        self._features = features
        self._tokenizer = workbench.policy.tokenizer
        self._prompt = workbench.policy.prompt
        self._limits = workbench.image_limits
        self._geometry = workbench.segmentation.config.geometry
        self._vision = vision
        self._reference_id = self._tokenizer.convert_tokens_to_ids(REFERENCE_TOKEN)
        self._image_id = self._tokenizer.convert_tokens_to_ids(self._prompt.image_token)

    def __call__(self, examples: Sequence[Example]) -> ExampleBatch:
        """Collect some examples; each keeps its whole response."""
        limits = (self._limits.min_pixels, self._limits.max_pixels)
        seen = [self._vision(fit_pixel_count(example.image, *limits)) for example in examples]
        encoded = [
            self._encode(example, vision.num_tokens)
            for example, vision in zip(examples, seen, strict=True)
        ]
        width = max(len(ids) for ids, _ in encoded)
        shape = (len(examples), width)
        ids = torch.full(shape, int(self._tokenizer.pad_token_id))
        labels = torch.full(shape, IGNORED_LABEL)
        attended = torch.zeros(shape, dtype=torch.int64)
        references = []
        for row, (tokens, num_prompt) in enumerate(encoded):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            labels[row, num_prompt - 1 : len(tokens) - 1] = torch.tensor(tokens[num_prompt:])
            attended[row, : len(tokens)] = 1
            references += [
                (row, column)
                for column, token in enumerate(tokens)
                if token == self._reference_id and column >= num_prompt
            ]
        inputs = {"input_ids": ids, "attention_mask": attended}
        for name in seen[0].tensors:
            inputs[name] = torch.cat([vision.tensors[name] for vision in seen])
        if seen[0].marks_image_tokens:
            inputs["mm_token_type_ids"] = (ids == self._image_id).int()
        prepared = [prepare_image(example.image, self._geometry) for example in examples]
        sizes = torch.from_numpy(np.stack([p.unpadded_size for p in prepared]))
        masks = [
            fit_mask(mask, (int(size[0]), int(size[1])), self._geometry)
            for example, size in zip(examples, sizes, strict=True)
            for mask in example.masks
        ]
        grid = self._geometry.mask_size
        return ExampleBatch(
            inputs,
            labels,
            torch.tensor(references, dtype=torch.int64).reshape(-1, 2),
            self._images(examples, prepared),
            torch.stack(masks) if masks else torch.zeros(0, 1, grid, grid),
            sizes,
            is_encoded=self._features is not None,
        )

    def _images(self, examples: Sequence[Example], prepared: Sequence[PreparedImage]) -> Tensor:
        if self._features is None:
            return torch.from_numpy(np.concatenate([p.image for p in prepared]))
        return torch.stack([self._features.embedding(example.image) for example in examples])

    def _encode(self, example: Example, num_image_tokens: int) -> tuple[list[int], int]:
        """Encode prompt and response; the latter's tokens start at the number returned."""
        prompt = encode_prompt(self._prompt, self._tokenizer, example.instruction, num_image_tokens)
        response = example.response or " ".join([REFERENCE_TOKEN] * len(example.masks))
        ids = self._tokenizer(response, add_special_tokens=False)["input_ids"]
        return [*prompt, *ids, int(self._tokenizer.eos_token_id)], len(prompt)


class SupervisedStage(TrainingStage[SupervisedSettings]):
    """See the module."""

    def __init__(
        self,
        name: str,
        settings: SupervisedSettings,
        workbench: TrainingState,
        examples: ExampleSets,
    ) -> None:
        self.name = name
        self.settings = settings
        freeze_unused(workbench.segmentation)
        if not settings.train_image_encoder:
            workbench.segmentation.image_encoder.requires_grad_(False)
        if not settings.segmentation_loss_weight:
            workbench.segmentation.requires_grad_(False)
        if settings.train_image_encoder and examples.features is not None:
            raise ValueError(
                f"phases.{name}.train_image_encoder is set, and data.features holds what the "
                "encoder gave before it: leave one of them out"
            )
        self.objective = ExampleObjective(workbench, settings)
        self._collect = ExampleCollector(workbench, examples.vision, examples.features)
        self._training, self._held_out = examples.training, examples.held_out
        self._order = EpochOrder(len(examples.training), examples.seed)

    def batch(self, step: int, rank: int, num_ranks: int) -> ExampleBatch:
        """See :meth:`TrainingStage.batch`."""
        size = self.settings.global_batch_size
        positions = range(step * size + rank, (step + 1) * size, num_ranks)
        return self._collect([self._training[self._order[position]] for position in positions])

    def coefficients(self, relative_rate: float) -> dict[str, float]:
        """See :meth:`TrainingStage.coefficients`."""
        weights, factor = self.settings.weights, self.settings.segmentation_loss_weight
        return {
            "reasoning": self.settings.language_loss_weight,
            **{f"masks.{n}": factor * getattr(weights, n) for n in weights.__struct_fields__},
        }

    def evaluate(self, accelerator: Accelerator, num_scenes: int) -> dict[str, Any]:
        """IoU of prior and mask on held-out examples, their responses given."""
        return mean_metrics(
            accelerator,
            self.objective,
            lambda indices: self._collect([self._held_out[i] for i in indices]),
            min(num_scenes, len(self._held_out)),
            rows_at_once=self.settings.global_batch_size,
        )
