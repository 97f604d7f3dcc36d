"""What all light image encoders have: the input, the valid region, and their export.

Families are in :mod:`coprs_deploy.models.tiny_vit`, :mod:`coprs_deploy.models.efficientvit` and
:mod:`coprs_deploy.models.resnet`; each embeds an image whose sides are multiples of its stride.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

from coprs_deploy.model_config import SamConfig
from coprs_deploy.specs import ValidRegion


class LightEncoder(nn.Module):
    """Image encoder distilled to the embedding of SAM's.

    Attributes:
        int8_operators: ONNX operators whose products with a learned weight an int8 export
            quantizes.
    """

    int8_operators = ("MatMul", "Conv")
    padding_below: Tensor
    padding_right: Tensor

    def __init__(self, config: SamConfig) -> None:
        super().__init__()
        self.config = config
        self.valid_region: ValidRegion | None = None

    @abstractmethod
    def embed(self, image: Tensor) -> Tensor:
        """Map (B, 3, H, W) pixels to the (B, C, R, K) embedding of their cells."""

    def set_valid_region(self, valid_region: ValidRegion | None) -> None:
        """Compute the embedding of a valid region alone; the padding's is that of a blank image.

        This is another function than that of the whole square, where convolutions mix image and
        padding at the border between them. None selects the whole square.
        """
        self.valid_region = None
        if valid_region is None:
            return
        assert valid_region.drops_padding, "only SAM's own encoder skips padding exactly"
        geometry = self.config.geometry
        rows = valid_region.height // geometry.patch_size
        columns = valid_region.width // geometry.patch_size
        parameter = next(self.parameters())
        with torch.no_grad():
            blank = self.embed(parameter.new_zeros(1, 3, geometry.image_size, geometry.image_size))
        below, right = blank[:, :, rows:], blank[:, :, :rows, columns:]
        self.register_buffer("padding_below", below.clone(), persistent=False)
        self.register_buffer("padding_right", right.clone(), persistent=False)
        self.valid_region = valid_region

    def forward(self, image: Tensor) -> Tensor:
        """Encode padded images.

        Args:
            image: (B, 3, S, S) float, normalized RGB, zero where padded.

        Returns:
            (B, C, G, G) image embeddings.
        """
        if self.valid_region is None:
            return self.embed(image)
        x = self.embed(image[:, :, : self.valid_region.height, : self.valid_region.width])
        for padding, dimension in ((self.padding_right, 3), (self.padding_below, 2)):
            if padding.shape[dimension]:
                x = torch.cat([x, padding.expand(x.shape[0], -1, -1, -1)], dim=dimension)
        return x
