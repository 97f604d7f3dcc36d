"""The sizes of a segmentation model as plain data: what a checkpoint's ``config.json`` records.

The modules that these numbers build are in :mod:`coprs_deploy.models`.
"""

from __future__ import annotations

from collections.abc import Mapping

from coprs_deploy.images import unpadded_size
from coprs_deploy.specs import Geometry, Record, ValidRegion


class SamConfig(Record, frozen=True):
    """Sizes of SAM's three parts; the defaults are those of the public ViT-B.

    Attributes:
        encoder_embed_dim: channels inside the image encoder.
        encoder_depth: number of transformer blocks.
        encoder_num_heads: attention heads of each block.
        encoder_global_attn_indexes: blocks that attend over the whole grid; the others use windows.
        window_size: side of an attention window in cells.
        mlp_ratio: hidden width of a block's MLP, in multiples of ``encoder_embed_dim``.
        use_rel_pos: whether attention adds SAM's decomposed relative positions.
        mask_in_chans: channels of the mask prompt before its last convolution.
        decoder_depth: two-way blocks of the mask decoder.
        decoder_num_heads: attention heads of the mask decoder.
        decoder_mlp_dim: hidden width of the mask decoder's MLP.
        num_mask_tokens: masks that the decoder has tokens for; only the first is used.
        iou_head_hidden_dim: hidden width of the IoU head (kept so that SAM's weights load strictly).
        geometry: image sizes and pixel normalization.
    """

    encoder_embed_dim: int = 768
    encoder_depth: int = 12
    encoder_num_heads: int = 12
    encoder_global_attn_indexes: tuple[int, ...] = (2, 5, 8, 11)
    window_size: int = 14
    mlp_ratio: float = 4.0
    use_rel_pos: bool = True
    mask_in_chans: int = 16
    decoder_depth: int = 2
    decoder_num_heads: int = 8
    decoder_mlp_dim: int = 2048
    num_mask_tokens: int = 4
    iou_head_hidden_dim: int = 256
    geometry: Geometry = Geometry()

    def __post_init__(self) -> None:
        for name in (
            "encoder_embed_dim",
            "encoder_depth",
            "encoder_num_heads",
            "mask_in_chans",
            "decoder_depth",
            "decoder_num_heads",
            "decoder_mlp_dim",
            "num_mask_tokens",
            "iou_head_hidden_dim",
            "window_size",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        channels = self.geometry.out_chans
        for name, width, divisor in (
            ("encoder_embed_dim", self.encoder_embed_dim, self.encoder_num_heads),
            ("geometry.out_chans", channels, 2 * self.decoder_num_heads),
            ("geometry.out_chans", channels, 8),
            ("mask_in_chans", self.mask_in_chans, 4),
        ):
            if width % divisor:
                raise ValueError(f"{name} is {width}; it must be a multiple of {divisor}")
        outside = [b for b in self.encoder_global_attn_indexes if not 0 <= b < self.encoder_depth]
        if outside:
            raise ValueError(
                f"encoder_global_attn_indexes names block {outside[0]}; "
                f"the encoder has blocks 0 to {self.encoder_depth - 1}"
            )

    def picture_extent(
        self, aspect_ratio: tuple[int, int], *, drops_padding: bool = False
    ) -> ValidRegion:
        """Say what an image encoder computes for pictures at least as long as an aspect.

        Args:
            aspect_ratio: width and height, as in (16, 9).
            drops_padding: whether padding is left out altogether, cell by cell; else window by
                window up to the first block that attends globally, which changes nothing.

        Raises:
            ValueError: nothing would be saved.
        """
        if not drops_padding and not self.exact_blocks:
            raise ValueError(
                "this encoder attends globally from its first block on, so that no padding can be "
                "left out without changing its function; accepted: no aspect, or one with "
                "drop_padding"
            )
        grid, patch = self.geometry.grid_size, self.geometry.patch_size
        unit = patch if drops_padding else patch * self.window_size
        width, height = aspect_ratio
        inside = unpadded_size(height, width, self.geometry.image_size)
        rows, columns = (min(grid * patch, -(-side // unit) * unit) for side in inside)
        if rows == columns:
            remedy = "none" if drops_padding else "none, or drop_padding, which goes by cells"
            raise ValueError(
                f"nothing is saved for {width}:{height}: such pictures reach into every "
                f"{'cell' if drops_padding else 'attention window'} of the square; accepted: a "
                f"longer aspect, or {remedy}"
            )
        return ValidRegion(aspect_ratio, rows, columns, drops_padding)

    @property
    def exact_blocks(self) -> int:
        """How many blocks come before the first in which a cell sees beyond its window."""
        if self.window_size >= self.geometry.grid_size:
            return 0
        return min(self.encoder_global_attn_indexes, default=self.encoder_depth)


SAM_SIZES: Mapping[str, SamConfig] = {
    "vit_b": SamConfig(),
    "vit_l": SamConfig(
        encoder_embed_dim=1024,
        encoder_depth=24,
        encoder_num_heads=16,
        encoder_global_attn_indexes=(5, 11, 17, 23),
    ),
    "vit_h": SamConfig(
        encoder_embed_dim=1280,
        encoder_depth=32,
        encoder_num_heads=16,
        encoder_global_attn_indexes=(7, 15, 23, 31),
    ),
    "tiny": SamConfig(
        encoder_embed_dim=96,
        encoder_depth=3,
        encoder_num_heads=3,
        encoder_global_attn_indexes=(2,),
        window_size=6,
        mlp_ratio=2.0,
        decoder_num_heads=2,
        decoder_mlp_dim=128,
        iou_head_hidden_dim=64,
        geometry=Geometry(image_size=128, patch_size=8, out_chans=64),
    ),
}
"""Named sizes: the three public ones, and a tiny one for tests and demonstrations."""


class SegmentationConfig(Record, frozen=True):
    """A whole segmentation path: SAM's parts and the prior that queries them.

    Attributes:
        policy_hidden_size: D, the width of the policy's hidden state.
        prior_num_heads: heads of the positional prior; divides the embedding channels.
        sam: sizes of the image encoder, the prompt encoder and the mask decoder.
    """

    policy_hidden_size: int
    prior_num_heads: int = 4
    sam: SamConfig = SamConfig()

    def __post_init__(self) -> None:
        if self.policy_hidden_size < 1:
            raise ValueError(
                f"policy_hidden_size is {self.policy_hidden_size}; it must be at least 1"
            )
        if self.prior_num_heads < 1 or self.geometry.out_chans % self.prior_num_heads:
            raise ValueError(
                f"prior_num_heads is {self.prior_num_heads}; it must divide the "
                f"{self.geometry.out_chans} embedding channels"
            )

    @property
    def geometry(self) -> Geometry:
        """Image sizes and pixel normalization."""
        return self.sam.geometry
