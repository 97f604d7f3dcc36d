"""Segmentation model: image encoder, prior and mask decoder, and its three exported graphs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from coprs_deploy.model_config import SegmentationConfig
from coprs_deploy.models.image_encoder import ImageEncoder, build_image_encoder
from coprs_deploy.models.layers import fold_batch_norms
from coprs_deploy.models.mask_decoder import MaskDecoder, PromptEncoder
from coprs_deploy.models.prior import PositionalPrior
from coprs_deploy.specs import IMAGE_ENCODER, MASK_DECODER, OUTSIDE_IMAGE_LOGIT, PRIOR, Geometry


def mask_padding(prior_logits: Tensor, unpadded_size: Tensor, geometry: Geometry) -> Tensor:
    """Set the prior logits of the padding to a strongly negative value.

    A cell belongs to the image if its first pixel does, which keeps
    ``ceil(size / mask_stride)`` cells (public code).

    Args:
        prior_logits: (N, 1, 4 G, 4 G); the result has the same shape.
        unpadded_size: int64 (2,), height and width in pixels of the padded image.
        geometry: sizes of the model.
    """
    first_pixel = geometry.mask_stride * torch.arange(
        geometry.mask_size, device=prior_logits.device
    )
    inside = (first_pixel < unpadded_size[0])[:, None] & (first_pixel < unpadded_size[1])
    return torch.where(inside, prior_logits, OUTSIDE_IMAGE_LOGIT)


class MaskDecoderGraph(nn.Module):
    """Prompt encoder and mask decoder as one graph: prior logits in, mask logits out."""

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
        """Decode prior logits to mask logits.

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
    """Image encoder, prior, prompt encoder and mask decoder under the checkpoint's names."""

    image_encoder: ImageEncoder

    def __init__(self, config: SegmentationConfig) -> None:
        super().__init__()
        self.config = config
        self.image_encoder = build_image_encoder(config.sam)
        self.prior = PositionalPrior(config)
        self.prompt_encoder = PromptEncoder(config.sam)
        self.mask_decoder = MaskDecoder(config.sam)

    def fold_batch_norms(self) -> None:
        """Fold the image encoder's batch normalizations into its convolutions, for export."""
        fold_batch_norms(self.image_encoder)

    def graph_modules(self) -> dict[str, nn.Module]:
        """Return the modules of the three graphs by name, in execution order.

        They share this model's parameters. Each takes and returns the tensors of
        :func:`coprs_deploy.specs.graph_specs`.
        """
        decoder = MaskDecoderGraph(self.prompt_encoder, self.mask_decoder, self.config.geometry)
        return {IMAGE_ENCODER: self.image_encoder, PRIOR: self.prior, MASK_DECODER: decoder}

    def forward(
        self, image: Tensor, concentration: Tensor, unpadded_size: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Decode N concentrations on one image.

        Args:
            image: (1, 3, S, S) float, normalized RGB, zero where padded.
            concentration: (N, D) hidden states of <REF_POS>.
            unpadded_size: int64 (2,), height and width in pixels of the padded image.

        Returns:
            Prior logits and mask logits, each (N, 1, 4 G, 4 G).
        """
        graphs = self.graph_modules()
        embedding = graphs[IMAGE_ENCODER](image)
        prior_logits = graphs[PRIOR](embedding, concentration)
        return prior_logits, graphs[MASK_DECODER](embedding, prior_logits, unpadded_size)
