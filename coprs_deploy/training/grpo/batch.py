"""Batches of prompts: images for both encoders, and ground-truth masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from coprs_deploy.data.examples import Example
from coprs_deploy.images import fit_pixel_count
from coprs_deploy.training.features import FeatureStore, load_images
from coprs_deploy.training.grpo.attachment import SegmentationRequest
from coprs_deploy.training.grpo.processor import IMAGE_KEY
from coprs_deploy.training.losses import inside_image
from coprs_deploy.training.mask_decoding import encode_images, fit_ignore_mask, fit_mask
from coprs_deploy.training.state import TrainingState


class PromptItem(NamedTuple):
    """One prompt: an example, and its image at the policy's size."""

    example: Example
    image: Image.Image

    @property
    def row(self) -> dict[str, Any]:
        """The prompt as a row of a TRL data set."""
        message = {"role": "user", "content": self.example.instruction}
        return {"prompt": [message], "image": self.image}


class GroundTruth(NamedTuple):
    """Inputs of the segmentation path and ground-truth masks of B rows.

    Attributes:
        image_embedding: (B, C, G, G).
        inside: (B, 1, M, M), 1 for mask cells of the image and 0 for padding.
        masks: (B, K, M, M), share of each cell covered by a target; zeros beyond the last target.
        num_targets: int64 (B,), at most K.
        counted: (B, 1, M, M), ``inside`` without the share of each cell that is ignored: the weight
            of a cell in losses and scores.
    """

    image_embedding: Tensor
    inside: Tensor
    masks: Tensor
    num_targets: Tensor
    counted: Tensor

    def request(self, first_column: int) -> SegmentationRequest:
        """Build the request for the masks of completions that start in ``first_column``."""
        return SegmentationRequest(
            self.image_embedding, self.inside, first_column, self.masks.shape[1]
        )

    def rows(self, chosen: slice) -> GroundTruth:
        """Return some rows."""
        return GroundTruth(*(tensor[chosen] for tensor in self))

    @property
    def is_target(self) -> Tensor:
        """Which of the K masks are targets, bool (B, K)."""
        slots = torch.arange(self.masks.shape[1], device=self.masks.device)
        return slots < self.num_targets[:, None]


class PromptCollator:
    """Convert examples to prompts and ground truth with at most ``max_targets`` masks each.

    Image embeddings come from ``features``, or from the frozen image encoder.
    """

    def __init__(
        self, state: TrainingState, features: FeatureStore | None, max_targets: int
    ) -> None:
        self._limits = (state.image_limits.min_pixels, state.image_limits.max_pixels)
        self._segmentation = state.segmentation
        self.geometry = state.segmentation.config.geometry
        self._features, self._max_targets = features, max_targets

    def item(self, example: Example, key: Any) -> PromptItem:
        """Resize the image of an example for the policy; ``key`` identifies it in the batch."""
        image = fit_pixel_count(example.image, *self._limits)
        image.info[IMAGE_KEY] = key
        return PromptItem(example, image)

    def ground_truth(self, items: Sequence[PromptItem], device: torch.device) -> GroundTruth:
        """Build the ground truth of some rows; repeated items are encoded once.

        Raises:
            ValueError: an example has more targets than ``max_targets``.
        """
        distinct = list({id(item): item for item in items}.values())
        index = {id(item): number for number, item in enumerate(distinct)}
        order = torch.tensor([index[id(item)] for item in items], device=device)
        images = [item.example.image for item in distinct]
        embedding, sizes = load_images(images, self.geometry, self._features)
        embedding = embedding.to(device)
        if self._features is None:
            with torch.no_grad():
                embedding = encode_images(self._segmentation, embedding)
        pairs = zip(distinct, sizes, strict=True)
        masks = torch.stack([self._masks(item.example, size) for item, size in pairs])
        inside = inside_image(sizes, self.geometry.mask_size, self.geometry.mask_stride)
        counts = torch.tensor([len(item.example.masks) for item in distinct])
        pairs = zip(distinct, sizes, strict=True)
        ignored = [fit_ignore_mask(i.example.ignore_mask, s, self.geometry) for i, s in pairs]
        counted = inside * (1 - torch.stack(ignored))
        parts = (embedding, *(part.to(device) for part in (inside, masks, counts, counted)))
        return GroundTruth(*(part[order] for part in parts))

    def _masks(self, example: Example, size: Tensor) -> Tensor:
        count, most = len(example.masks), self._max_targets
        if count > most:
            raise ValueError(
                f"max_targets is {most}; example {example.id} has {count} targets; raise "
                "max_targets in the recipe, or remove the example"
            )
        masks = torch.zeros(most, self.geometry.mask_size, self.geometry.mask_size)
        for number, mask in enumerate(example.masks):
            masks[number] = fit_mask(mask, size, self.geometry)[0]
        return masks
