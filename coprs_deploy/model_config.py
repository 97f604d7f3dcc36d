"""Sizes of a segmentation model, as recorded in a checkpoint's ``config.json``.

Names follow segment-anything. The modules are in :mod:`coprs_deploy.models`, sizes of light image
encoders in :mod:`coprs_deploy.encoder_config`.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from coprs_deploy.encoder_config import ENCODERS, LightEncoderConfig
from coprs_deploy.errors import check_number
from coprs_deploy.specs import Geometry, Record, ValidRegion

MAX_LAYERS = 1000
"""Largest number of blocks or mask tokens: each costs memory before it has any weights."""


class SamConfig(Record, frozen=True):
    """Sizes of SAM's image encoder, prompt encoder and mask decoder; defaults: public ViT-B.

    Attributes:
        encoder_embed_dim: token width of the image encoder.
        encoder_depth: number of transformer blocks.
        encoder_num_heads: attention heads per block.
        encoder_global_attn_indexes: indexes of the blocks with global attention; the others use
            windows.
        window_size: side of an attention window in cells.
        mlp_ratio: hidden width of the MLP over ``encoder_embed_dim``.
        use_rel_pos: whether attention adds SAM's decomposed relative positions.
        mask_in_chans: channels of the mask prompt before its last convolution.
        decoder_depth: number of two-way blocks in the mask decoder.
        decoder_num_heads: attention heads of the mask decoder.
        decoder_mlp_dim: hidden width of the mask decoder's MLP.
        num_mask_tokens: mask tokens of the decoder; only the first mask is used.
        iou_head_hidden_dim: hidden width of the IoU head (unused; SAM's weights load strictly).
        geometry: image sizes and pixel normalization.
        image_encoder: sizes of a light image encoder in place of SAM's own; then the ``encoder_``
            sizes, ``window_size``, ``mlp_ratio`` and ``use_rel_pos`` are those of the SAM whose
            decoder this is, and have no effect.
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
    image_encoder: LightEncoderConfig | None = None

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if type(value) is int and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        for name in ("encoder_depth", "decoder_depth", "num_mask_tokens"):
            check_number(name, getattr(self, name), most=MAX_LAYERS)
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
                f"accepted: 0 to {self.encoder_depth - 1}"
            )
        if self.image_encoder is not None:
            self.image_encoder.check_geometry(self.geometry)

    def with_image_encoder(self, encoder: LightEncoderConfig) -> SamConfig:
        """Replace the image encoder; the embedding keeps its size, the input gets the encoder's.

        Padding follows SAM for every encoder: the longer side fills the square, and the rest is
        zero after normalization. Only the side of the square differs.
        """
        patch = encoder.patch_size
        geometry = msgspec.structs.replace(
            self.geometry, patch_size=patch, image_size=self.geometry.grid_size * patch
        )
        return msgspec.structs.replace(self, geometry=geometry, image_encoder=encoder)

    @property
    def encoder_name(self) -> str:
        """Title of the image encoder, such as ``SAM ViT-H`` or ``TinyViT-5M``."""
        if self.image_encoder is not None:
            return self.image_encoder.title
        size = (self.encoder_embed_dim, self.encoder_depth)
        names = {(768, 12): "ViT-B", (1024, 24): "ViT-L", (1280, 32): "ViT-H"}
        return f"SAM {names.get(size, 'ViT, width {}, {} blocks'.format(*size))}"

    def valid_region(
        self, aspect_ratio: tuple[int, int], *, drops_padding: bool = False
    ) -> ValidRegion:
        """Compute the region that an image encoder processes for a fixed aspect ratio.

        Args:
            aspect_ratio: width and height of the least elongated accepted shape, such as (16, 9).
            drops_padding: whether every block skips the padding, cell by cell; else the padding
                is skipped window by window before the first global block, which is exact.

        Raises:
            ValueError: nothing would be saved.
        """
        if not drops_padding and self.image_encoder is not None:
            raise ValueError(
                f"aspect_ratio is {aspect_ratio}, but {self.encoder_name} mixes image and padding "
                "in every stage, so that skipping padding changes the result; accepted: none, or "
                "drop_padding with it"
            )
        if not drops_padding and not self.num_local_blocks:
            raise ValueError(
                f"aspect_ratio is {aspect_ratio}, but this encoder attends globally from its first "
                "block on, so that skipping padding changes the result; accepted: none, or "
                "drop_padding with it"
            )
        from coprs_deploy.images import unpadded_size  # here: recipes are listed without numpy

        grid, patch = self.geometry.grid_size, self.geometry.patch_size
        unit = patch if drops_padding else patch * self.window_size
        if self.image_encoder is not None:
            unit = self.image_encoder.input_stride
        width, height = aspect_ratio
        inside = unpadded_size(height, width, self.geometry.image_size)
        rows, columns = (min(grid * patch, -(-side // unit) * unit) for side in inside)
        if rows == columns:
            other = "none" if drops_padding else "none, or drop_padding, which skips single cells"
            raise ValueError(
                f"aspect ratio {width}:{height} saves nothing: such images reach into every "
                f"{'cell' if drops_padding else 'attention window'} of the square; accepted: a "
                f"more elongated aspect ratio, or {other}"
            )
        return ValidRegion(aspect_ratio, rows, columns, drops_padding)

    @property
    def num_local_blocks(self) -> int:
        """Number of windowed blocks before the first global one."""
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
    **{name: SamConfig().with_image_encoder(encoder) for name, encoder in ENCODERS.items()},
}
"""Sizes by name: the three public ones, a tiny one for tests and demonstrations, and SAM's decoder
with each light encoder."""


class SegmentationConfig(Record, frozen=True):
    """Sizes of a segmentation model: SAM and the positional prior.

    Attributes:
        policy_hidden_size: D, the policy's hidden size.
        prior_num_heads: heads of the positional prior; divides the embedding channels.
        sam: sizes of image encoder, prompt encoder and mask decoder.
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
