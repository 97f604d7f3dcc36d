"""The whole segmentation path, and its cut into the three stages that are exported."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from coprs_deploy.model_config import SegmentationConfig
from coprs_deploy.models.mask_decoder import MaskDecoder, PromptEncoder
from coprs_deploy.models.prior import PositionalPrior
from coprs_deploy.models.sam_encoder import SamImageEncoder
from coprs_deploy.specs import IMAGE_ENCODER, MASK_DECODER, OUTSIDE_IMAGE_LOGIT, PRIOR, Geometry


def mask_padding(prior_logits: Tensor, unpadded_size: Tensor, geometry: Geometry) -> Tensor:
    """Overwrite the padding with a logit that no convolution mistakes for evidence.

    A cell belongs to the image when its first pixel does, which keeps
    ``ceil(size / mask_stride)`` cells (public code).

    Args:
        prior_logits: (N, 1, 4 G, 4 G).
        unpadded_size: int64 (2,), height and width in pixels of the padded image.
        geometry: sizes of the model.

    Returns:
        (N, 1, 4 G, 4 G) logits, -50 in the padding.
    """
    first_pixel = geometry.mask_stride * torch.arange(
        geometry.mask_size, device=prior_logits.device
    )
    inside = (first_pixel < unpadded_size[0])[:, None] & (first_pixel < unpadded_size[1])
    return torch.where(inside, prior_logits, OUTSIDE_IMAGE_LOGIT)


class MaskDecoderStage(nn.Module):
    """Prompt encoder and mask decoder as one stage: prior logits in, mask logits out."""

    def __init__(
        self, prompt_encoder: PromptEncoder, mask_decoder: MaskDecoder, geometry: Geometry
    ) -> None:
        super().__init__()
        self.prompt_encoder = prompt_encoder
        self.mask_decoder = mask_decoder
        self.geometry = geometry

    def forward(
        self, image_embedding: Tensor, prior_logits: Tensor, unpadded_size: Tensor
    ) -> Tensor:
        """Turn prior logits into mask logits.

        Args:
            image_embedding: (1, C, G, G) or (N, C, G, G).
            prior_logits: (N, 1, 4 G, 4 G).
            unpadded_size: int64 (2,), height and width in pixels of the padded image.

        Returns:
            (N, 1, 4 G, 4 G) mask logits.
        """
        prompt = mask_padding(prior_logits, unpadded_size, self.geometry)
        positions = self.prompt_encoder.image_positions()
        return self.mask_decoder(image_embedding, positions, self.prompt_encoder(prompt))


class SegmentationModel(nn.Module):
    """Image encoder, prior, prompt encoder and mask decoder under a checkpoint's names."""

    def __init__(self, config: SegmentationConfig) -> None:
        super().__init__()
        self.config = config
        self.image_encoder = SamImageEncoder(config.sam)
        self.prior = PositionalPrior(config)
        self.prompt_encoder = PromptEncoder(config.sam)
        self.mask_decoder = MaskDecoder(config.sam)

    def stages(self) -> dict[str, nn.Module]:
        """Cut the model into the three stages, in the order in which they run.

        The stages share this model's parameters; each takes and returns the tensors that
        :func:`coprs_deploy.specs.graph_specs` names.
        """
        decoder = MaskDecoderStage(self.prompt_encoder, self.mask_decoder, self.config.geometry)
        return {IMAGE_ENCODER: self.image_encoder, PRIOR: self.prior, MASK_DECODER: decoder}

    def forward(
        self, image: Tensor, concentration: Tensor, unpadded_size: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Answer N concentrations on one image.

        Args:
            image: (1, 3, S, S) float, normalized RGB, zero where padded.
            concentration: (N, D) hidden states of <REF_POS>.
            unpadded_size: int64 (2,), height and width in pixels of the padded image.

        Returns:
            Prior logits and mask logits, each (N, 1, 4 G, 4 G).
        """
        stages = self.stages()
        embedding = stages[IMAGE_ENCODER](image)
        prior_logits = stages[PRIOR](embedding, concentration)
        return prior_logits, stages[MASK_DECODER](embedding, prior_logits, unpadded_size)
