"""What a batch of prompts is: pictures for both towers, and the masks that are wanted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from coprs_deploy.data.examples import Example
from coprs_deploy.images import fit_pixel_count, prepare_image
from coprs_deploy.training.features import FeatureStore
from coprs_deploy.training.grpo.attachment import SegmentationRequest
from coprs_deploy.training.grpo.processor import PICTURE_KEY
from coprs_deploy.training.losses import inside_image
from coprs_deploy.training.mask_decoding import encode_images, fit_mask
from coprs_deploy.training.state import TrainingState


class PromptItem(NamedTuple):
    """One prompt.

    Attributes:
        example: with its truth.
        picture: as the policy sees it.
    """

    example: Example
    picture: Image.Image

    @property
    def row(self) -> dict[str, Any]:
        """The prompt in the shape that TRL asks for."""
        message = {"role": "user", "content": self.example.instruction}
        return {"prompt": [message], "image": self.picture}


class GroundTruth(NamedTuple):
    """What the segmentation path sees and what it should give, for B rows.

    Attributes:
        image_embedding: (B, C, G, G).
        inside: (B, 1, M, M), 1 for mask cells of the image and 0 for padding.
        masks: (B, K, M, M), share of each cell that a target covers; zeros beyond the last target.
        num_targets: int64 (B,), at most K.
    """

    image_embedding: Tensor
    inside: Tensor
    masks: Tensor
    num_targets: Tensor

    def request(self, first_column: int) -> SegmentationRequest:
        """Ask for the masks of responses that begin in a column."""
        return SegmentationRequest(
            self.image_embedding, self.inside, first_column, self.masks.shape[1]
        )

    def part(self, start: int, stop: int) -> GroundTruth:
        """Take some of the rows."""
        return GroundTruth(*(tensor[start:stop] for tensor in self))

    @property
    def is_target(self) -> Tensor:
        """Bool (B, K): which of the K masks are wanted."""
        slots = torch.arange(self.masks.shape[1], device=self.masks.device)
        return slots < self.num_targets[:, None]


class QuestionCollector:
    """Turns examples into prompts and truth.

    Args:
        workbench: the model; its image encoder stays as it is.
        features: image embeddings that are known already.
        num_targets: K, the most targets of one prompt.
    """

    def __init__(
        self, workbench: TrainingState, features: FeatureStore | None, num_targets: int
    ) -> None:
        self._limits = workbench.image_limits
        self._segmentation = workbench.segmentation
        self.geometry = workbench.segmentation.config.geometry
        self._features = features
        self._num_targets = num_targets

    def question(self, example: Example, key: Any) -> PromptItem:
        """Show an example to the policy.

        Args:
            example: the example.
            key: names its picture among those of the batch.
        """
        limits = (self._limits.min_pixels, self._limits.max_pixels)
        picture = fit_pixel_count(example.image, *limits)
        picture.info[PICTURE_KEY] = key
        return PromptItem(example, picture)

    def truth(self, questions: Sequence[PromptItem], device: torch.device) -> GroundTruth:
        """Collect the truth of some rows; a question that is repeated is looked at once.

        Raises:
            ValueError: an example has more targets than the recipe says.
        """
        places = {id(question): 0 for question in questions}
        distinct = list({id(question): question for question in questions}.values())
        for place, question in enumerate(distinct):
            places[id(question)] = place
        order = torch.tensor([places[id(question)] for question in questions], device=device)
        prepared = [prepare_image(q.example.image, self.geometry) for q in distinct]
        sizes = torch.from_numpy(np.stack([p.unpadded_size for p in prepared]))
        masks = torch.stack(
            [self._masks(q.example, size) for q, size in zip(distinct, sizes, strict=True)]
        )
        if self._features is None:
            pixels = torch.from_numpy(np.concatenate([p.image for p in prepared])).to(device)
            with torch.no_grad():
                embedding = encode_images(self._segmentation, pixels)
        else:
            stored = [self._features.embedding(q.example.image) for q in distinct]
            embedding = torch.stack(stored).to(device)
        inside = inside_image(sizes, self.geometry.mask_size, self.geometry.mask_stride)
        counts = torch.tensor([len(q.example.masks) for q in distinct])
        parts = (embedding, inside.to(device), masks.to(device), counts.to(device))
        return GroundTruth(*(part[order] for part in parts))

    def _masks(self, example: Example, size: Tensor) -> Tensor:
        count, most = len(example.masks), self._num_targets
        if count > most:
            raise ValueError(
                f"the example {example.id} has {count} targets, and targets is {most}: raise it "
                "in the recipe, or leave the example out"
            )
        grid = self.geometry.mask_size
        masks = torch.zeros(most, grid, grid)
        for number, mask in enumerate(example.masks):
            masks[number] = fit_mask(mask, (int(size[0]), int(size[1])), self.geometry)[0]
        return masks
