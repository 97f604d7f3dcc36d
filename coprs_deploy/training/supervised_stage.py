"""Supervised stage on examples, for a policy of any size and family.

The policy runs its own forward pass, one example per row; the segmentation path takes each image
resized and padded. Targets follow the ``<REF_POS>`` tokens of the response in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from coprs_deploy.data.examples import Example
from coprs_deploy.images import fit_pixel_count
from coprs_deploy.policy.vision_inputs import VisionProcessor
from coprs_deploy.prompts import REFERENCE_TOKEN, encode_prompt
from coprs_deploy.training.batches import EpochOrder, pad_tokens
from coprs_deploy.training.examples import ExampleSets
from coprs_deploy.training.features import FeatureStore, load_images
from coprs_deploy.training.generation import respond
from coprs_deploy.training.losses import (
    IGNORED_LABEL,
    inside_image,
    segmentation_losses,
    token_cross_entropy,
)
from coprs_deploy.training.mask_decoding import (
    decode_targets,
    encode_images,
    fit_ignore_mask,
    fit_mask,
    mask_metrics,
)
from coprs_deploy.training.runs.gallery import Sample, spread_indices
from coprs_deploy.training.settings import TEACHER_FORCED, SupervisedSettings
from coprs_deploy.training.stage import StageOutput, TrainingStage, mean_metrics
from coprs_deploy.training.state import TrainingState, freeze_unused
from coprs_deploy.training.truncation import ReasoningTruncator, truncation_generator

if TYPE_CHECKING:
    from accelerate import Accelerator

    from coprs_deploy.models import SegmentationModel


class ExampleBatch(NamedTuple):
    """Examples as tensors.

    Attributes:
        inputs: keyword arguments of the policy's forward pass.
        labels: int64 (B, L), next token, or ``IGNORED_LABEL``.
        references: int64 (N, 2), row and column of each ``<REF_POS>`` in the input.
        images: (B, 3, S, S) float32, padded and normalized for the image encoder; with
            ``is_encoded``, their embeddings (B, C, G, G) float16.
        masks: (N, 1, M, M), share of each mask cell that the target covers, in [0, 1].
        unpadded_sizes: int64 (B, 2), height and width in pixels of each padded image.
        ignored: (B, 1, M, M), share of each mask cell that no loss and no metric counts.
        is_encoded: whether ``images`` holds embeddings.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    references: Tensor
    images: Tensor
    masks: Tensor
    unpadded_sizes: Tensor
    ignored: Tensor
    is_encoded: bool = False


class ExampleObjective(nn.Module):
    """The policy's own forward pass, then the segmentation path from its hidden states."""

    def __init__(self, state: TrainingState, settings: SupervisedSettings) -> None:
        super().__init__()
        self.policy = state.policy.model
        self.segmentation = state.segmentation
        self._settings = settings

    def forward(self, batch: ExampleBatch) -> StageOutput:
        """Compute cross-entropy and segmentation losses."""
        hidden = self.policy.model(**batch.inputs, use_cache=False).last_hidden_state
        has_label = batch.labels != IGNORED_LABEL
        logits = self.policy.get_output_embeddings()(hidden[has_label])
        losses = {"language": token_cross_entropy(logits, batch.labels[has_label])}
        if not self._settings.segmentation_loss_weight:
            return StageOutput(losses, {})
        model, rows = self.segmentation, batch.references[:, 0]
        geometry, embedding = model.config.geometry, batch.images.float()
        if not batch.is_encoded:
            trains_encoder = torch.is_grad_enabled() and self._settings.train_image_encoder
            with torch.set_grad_enabled(trains_encoder):
                embedding = encode_images(model, batch.images)
        inside = inside_image(batch.unpadded_sizes[rows], geometry.mask_size, geometry.mask_stride)
        states = hidden[rows, batch.references[:, 1]].to(embedding.dtype)
        priors, masks = decode_targets(model, embedding[rows], states, inside)
        counted = inside * (1 - batch.ignored[rows])
        loss_weights = self._settings.loss_weights
        losses.update(segmentation_losses(priors, masks, batch.masks, counted, loss_weights))
        ground_truth = (batch.masks[:, 0] > 0.5) & (counted[:, 0] > 0.5)
        background = -torch.finfo(torch.float32).max
        valid = [torch.where(counted > 0.5, x.float(), background) for x in (priors, masks)]
        metrics = mask_metrics(valid[0], valid[1], ground_truth)
        return StageOutput(losses, {TEACHER_FORCED + name: m for name, m in metrics.items()})


class ExampleCollector:
    """Collects examples into batches for one policy and one segmentation path."""

    def __init__(
        self, state: TrainingState, vision: VisionProcessor, features: FeatureStore | None = None
    ) -> None:
        self._features, self._vision = features, vision
        self._tokenizer, self._prompt = state.policy.tokenizer, state.policy.prompt
        self._truncator = ReasoningTruncator(self._tokenizer, self._prompt)
        self._limits = (state.image_limits.min_pixels, state.image_limits.max_pixels)
        self._geometry = state.segmentation.config.geometry
        self._reference_id, self._image_id = self._tokenizer.convert_tokens_to_ids(
            [REFERENCE_TOKEN, self._prompt.image_token]
        )

    def __call__(
        self, examples: Sequence[Example], generators: Sequence[np.random.Generator | None] = ()
    ) -> ExampleBatch:
        """Collect examples.

        Args:
            examples: examples.
            generators: for each example, the random generator of the length at which its reasoning
                is truncated, None if it is not; empty truncates none.
        """
        inputs_of = [self._vision(fit_pixel_count(e.image, *self._limits)) for e in examples]
        parts = zip(examples, inputs_of, generators or [None] * len(examples), strict=True)
        encoded = [self._encode(e, vision.num_tokens, generator) for e, vision, generator in parts]
        rows = [tokens for tokens, _, _ in encoded]
        ids, attended = pad_tokens(rows, self._tokenizer.pad_token_id)
        next_tokens = [
            [IGNORED_LABEL] * (start - 1) + tokens[start:] + [IGNORED_LABEL]
            for tokens, start, _ in encoded
        ]
        for labels, (_, _, cut) in zip(next_tokens, encoded, strict=True):
            if cut is not None:
                labels[cut - 1] = IGNORED_LABEL
        references = [
            (row, column)
            for row, (tokens, start, _) in enumerate(encoded)
            for column in range(start, len(tokens))
            if tokens[column] == self._reference_id
        ]
        inputs = {"input_ids": ids, "attention_mask": attended}
        for name in inputs_of[0].tensors:
            inputs[name] = torch.cat([vision.tensors[name] for vision in inputs_of])
        if inputs_of[0].marks_image_tokens:
            inputs["mm_token_type_ids"] = (ids == self._image_id).int()
        images, sizes = load_images([e.image for e in examples], self._geometry, self._features)
        masks = [
            fit_mask(mask, size, self._geometry)
            for example, size in zip(examples, sizes, strict=True)
            for mask in example.masks
        ]
        ignored = [
            fit_ignore_mask(example.ignore_mask, size, self._geometry)
            for example, size in zip(examples, sizes, strict=True)
        ]
        grid = self._geometry.mask_size
        return ExampleBatch(
            inputs,
            pad_tokens(next_tokens, IGNORED_LABEL)[0],
            torch.tensor(references, dtype=torch.int64).reshape(-1, 2),
            images,
            torch.stack(masks) if masks else torch.zeros(0, 1, grid, grid),
            sizes,
            torch.stack(ignored),
            is_encoded=self._features is not None,
        )

    def _encode(
        self, example: Example, num_image_tokens: int, generator: np.random.Generator | None
    ) -> tuple[list[int], int, int | None]:
        """Encode prompt and response.

        Returns:
            The tokens, the length of the prompt, and the column of the first token behind the
            reasoning if that is truncated.
        """
        prompt = encode_prompt(self._prompt, self._tokenizer, example.instruction, num_image_tokens)
        response = example.response or " ".join([REFERENCE_TOKEN] * len(example.masks))
        ids = self._tokenizer(response, add_special_tokens=False)["input_ids"]
        cut = None
        has_targets = len(example.masks) > 0
        if generator is not None and has_targets and (columns := self._truncator.columns(ids)):
            kept = columns.start + int(generator.integers(len(columns)))
            ids = [*ids[:kept], *ids[columns.stop :]]
            cut = len(prompt) + kept
        return [*prompt, *ids, int(self._tokenizer.eos_token_id)], len(prompt), cut


def freeze_untrained(model: SegmentationModel, settings: SupervisedSettings) -> None:
    """Freeze the segmentation weights that a supervised stage does not train."""
    freeze_unused(model)
    if not settings.train_image_encoder:
        model.image_encoder.requires_grad_(False)
    if not settings.segmentation_loss_weight:
        model.requires_grad_(False)


class SupervisedStage(TrainingStage[SupervisedSettings]):
    """Cross-entropy on the response, and segmentation losses where they have a weight."""

    def __init__(
        self, name: str, settings: SupervisedSettings, state: TrainingState, examples: ExampleSets
    ) -> None:
        self.name = name
        self.settings = settings
        freeze_untrained(state.segmentation, settings)
        if settings.train_image_encoder and examples.features is not None:
            raise ValueError(
                f"stages.{name}.train_image_encoder is set, and data.features holds embeddings of "
                "the encoder before training: leave one of them out"
            )
        self.objective = ExampleObjective(state, settings)
        self._collect = ExampleCollector(state, examples.vision, examples.features)
        self._state, self._examples = state, examples
        self._training, self._held_out = examples.training, examples.held_out
        self._order = EpochOrder(len(examples.training), examples.seed)

    def batch(self, step: int, rank: int, num_ranks: int) -> ExampleBatch:
        """See :meth:`TrainingStage.batch`."""
        size = self.settings.global_batch_size
        positions = range(step * size + rank, (step + 1) * size, num_ranks)
        ratio, seed = self.settings.truncation_ratio, self._examples.seed
        generators = [truncation_generator(ratio, seed, position) for position in positions]
        examples = [self._training[self._order[position]] for position in positions]
        return self._collect(examples, generators)

    def held_out_samples(self) -> list[Sample]:
        """See :meth:`TrainingStage.held_out_samples`."""
        shown = spread_indices(len(self._held_out), self.settings.num_completions_to_print)
        if not shown:
            return []
        examples = [self._held_out[index] for index in shown]
        return respond(self._state, self._examples, examples)

    def loss_coefficients(self, lr_factor: float) -> dict[str, float]:
        """See :meth:`TrainingStage.loss_coefficients`."""
        weights, factor = self.settings.loss_weights, self.settings.segmentation_loss_weight
        return {
            "language": self.settings.language_loss_weight,
            **{name: factor * getattr(weights, name) for name in weights.__struct_fields__},
        }

    def evaluate(self, accelerator: Accelerator, num_examples: int) -> dict[str, Any]:
        """Measure the IoU of prior and mask on held-out examples, teacher-forced."""
        return mean_metrics(
            accelerator,
            self.objective,
            lambda indices: self._collect([self._held_out[i] for i in indices]),
            min(num_examples, len(self._held_out)),
            self.settings.global_batch_size,
        )
