"""Sizes of the light image encoders that were distilled to SAM ViT-H's embedding.

Names follow the public implementations, whose parameter names the modules in
:mod:`coprs_deploy.models` keep: MobileSAM (TinyViT), EfficientViT-SAM and NanoSAM (ResNet).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import msgspec

from coprs_deploy.specs import Geometry, Record

MAX_STAGES = 8
"""Largest number of stages: each halves the image once more."""

MAX_BLOCKS = 1000
"""Largest number of blocks of a stage: each costs memory before it has any weights."""


def _check_lists(record: Record, *names: str) -> None:
    """Check that lists have one positive entry per stage (depths may be 0 after the first)."""
    lengths = {name: len(getattr(record, name)) for name in names}
    if len(set(lengths.values())) > 1 or not 3 <= min(lengths.values()) <= MAX_STAGES:
        raise ValueError(
            f"the lists have {lengths} entries; accepted: one for each of 3 to {MAX_STAGES} stages"
        )
    for name in names:
        for value in getattr(record, name):
            if isinstance(value, (int, float)) and not 0 <= value <= 2**16:
                raise ValueError(f"{name} has {value}; accepted: 0 to {2**16}")
            if name.startswith("depth") and value > MAX_BLOCKS:
                raise ValueError(f"{name} has {value}; accepted: at most {MAX_BLOCKS}")


class _Encoder(Record, frozen=True):
    """What all light encoders have.

    ``patch_size`` is the side of the input per embedding cell in pixels, ``input_stride`` the
    number of pixels of which both sides of the input are a multiple.
    """

    @property
    def patch_size(self) -> int:
        raise NotImplementedError

    @property
    def input_stride(self) -> int:
        raise NotImplementedError

    @property
    def title(self) -> str:
        """Name of the public encoder of these sizes, or of its family."""
        names = [name for name, encoder in ENCODERS.items() if encoder == self]
        return TITLES[names[0]] if names else f"{self._family} of other sizes"

    @property
    def _family(self) -> str:
        raise NotImplementedError

    def check_geometry(self, geometry: Geometry) -> None:
        """Raise ``ValueError`` unless an input of this geometry gives its embedding."""
        if geometry.patch_size != self.patch_size:
            raise ValueError(
                f"geometry.patch_size is {geometry.patch_size}; {self.title} has one embedding "
                f"cell for {self.patch_size} pixels"
            )
        if geometry.image_size % self.input_stride:
            raise ValueError(
                f"geometry.image_size is {geometry.image_size}; {self.title} accepts multiples of "
                f"{self.input_stride}"
            )


class TinyVitConfig(_Encoder, frozen=True, tag_field="family", tag="tiny_vit"):
    """Sizes of MobileSAM's and TinySAM's TinyViT; defaults: the public 5M.

    Attributes:
        embed_dims: width of each stage; the first is convolutional, the others attend in windows.
        depths: number of blocks of each stage.
        num_heads: attention heads of each stage (the first entry has no effect).
        window_sizes: side of an attention window of each stage (likewise).
        mlp_ratio: hidden width of an MLP over the width of its stage.
        mbconv_expand_ratio: hidden width of the first stage's blocks over its width.
    """

    embed_dims: tuple[int, ...] = (64, 128, 160, 320)
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (2, 4, 5, 10)
    window_sizes: tuple[int, ...] = (7, 7, 14, 7)
    mlp_ratio: float = 4.0
    mbconv_expand_ratio: float = 4.0

    def __post_init__(self) -> None:
        _check_lists(self, "embed_dims", "depths", "num_heads", "window_sizes")
        for width, heads, window in zip(
            self.embed_dims, self.num_heads, self.window_sizes, strict=True
        ):
            if heads < 1 or window < 1 or width < 2 or width % (2 * heads):
                raise ValueError(
                    f"embed_dims has {width}, num_heads {heads}, window_sizes {window}; accepted: "
                    "even multiples of the heads, which are at least 1, as are the windows"
                )

    @property
    def patch_size(self) -> int:
        """16: two strides of the patch embedding, then one per stage but for the last two."""
        return 1 << len(self.embed_dims)

    @property
    def input_stride(self) -> int:
        """One embedding cell."""
        return self.patch_size

    @property
    def _family(self) -> str:
        return "TinyViT"


class EfficientVitConfig(_Encoder, frozen=True, tag_field="family", tag="efficientvit"):
    """Sizes of EfficientViT-SAM; defaults: the public L0.

    The neck adds up the last three stages at the resolution of the first of them.

    Attributes:
        width_list: width of each stage.
        depth_list: number of blocks of each stage after the first, which halves the resolution.
        block_list: kind of a stage's blocks: ``res``, ``fmb`` (fused MBConv), ``mb`` (MBConv),
            ``att@3`` or ``att@5`` (linear attention with a second scale of that kernel).
        expand_list: hidden width of a block over that of its stage.
        fewer_norm_list: whether all but a block's last convolution have a bias in place of a norm.
        qkv_dim: width of an attention head.
        head_width: width of the neck.
        head_depth: number of blocks of the neck.
        head_expand: hidden width of the neck's blocks over ``head_width``.
    """

    width_list: tuple[int, ...] = (32, 64, 128, 256, 512)
    depth_list: tuple[int, ...] = (1, 1, 1, 4, 4)
    block_list: tuple[str, ...] = ("res", "fmb", "fmb", "mb", "att@5")
    expand_list: tuple[float, ...] = (1.0, 4.0, 4.0, 4.0, 6.0)
    fewer_norm_list: tuple[bool, ...] = (False, False, False, True, True)
    qkv_dim: int = 32
    head_width: int = 256
    head_depth: int = 4
    head_expand: float = 1.0

    def __post_init__(self) -> None:
        lists = ("width_list", "depth_list", "block_list", "expand_list", "fewer_norm_list")
        _check_lists(self, *lists)
        for kind in self.block_list:
            if kind not in ("res", "fmb", "mb", "att@3", "att@5"):
                raise ValueError(
                    f"block_list has {kind!r}; accepted: res, fmb, mb, att@3 and att@5"
                )
        for name in ("qkv_dim", "head_width"):
            if not 1 <= getattr(self, name) <= 2**16:
                raise ValueError(f"{name} is {getattr(self, name)}; accepted: 1 to {2**16}")
        if not 0 <= self.head_depth <= MAX_BLOCKS:
            raise ValueError(f"head_depth is {self.head_depth}; accepted: 0 to {MAX_BLOCKS}")
        if min(self.width_list) < 1 or min(*self.expand_list, self.head_expand) <= 0:
            raise ValueError("width_list, expand_list and head_expand: accepted: above 0")

    @property
    def patch_size(self) -> int:
        """Stride of the finest stage that reaches the neck: 8 for L0 to L2, 16 for XL0 and XL1."""
        return 1 << (len(self.width_list) - 2)

    @property
    def input_stride(self) -> int:
        """Stride of the last stage."""
        return 1 << len(self.width_list)

    @property
    def _family(self) -> str:
        return "EfficientViT-SAM"


class ResNetConfig(_Encoder, frozen=True, tag_field="family", tag="resnet"):
    """Sizes of NanoSAM's ResNet of basic blocks; defaults: the public ResNet-18.

    Attributes:
        widths: width of each stage.
        depths: number of blocks of each stage.
        neck_channels: width of the layers after the last stage.
    """

    widths: tuple[int, ...] = (64, 128, 256, 512)
    depths: tuple[int, ...] = (2, 2, 2, 2)
    neck_channels: int = 256

    def __post_init__(self) -> None:
        _check_lists(self, "widths", "depths")
        if min(*self.widths, *self.depths) < 1:
            raise ValueError("widths and depths: accepted: 1 and more")
        if not 1 <= self.neck_channels <= 2**16:
            raise ValueError(f"neck_channels is {self.neck_channels}; accepted: 1 to {2**16}")

    @property
    def patch_size(self) -> int:
        """16: half the stride of the last stage, which is doubled once."""
        return self.input_stride // 2

    @property
    def input_stride(self) -> int:
        """Stride of the last stage."""
        return 1 << (len(self.widths) + 1)

    @property
    def _family(self) -> str:
        return "NanoSAM ResNet"


LightEncoderConfig: TypeAlias = TinyVitConfig | EfficientVitConfig | ResNetConfig

_XL0 = EfficientVitConfig(
    width_list=(32, 64, 128, 256, 512, 1024),
    depth_list=(0, 1, 1, 2, 3, 3),
    block_list=("res", "fmb", "fmb", "fmb", "att@3", "att@3"),
    expand_list=(1.0, 4.0, 4.0, 4.0, 4.0, 6.0),
    fewer_norm_list=(False, False, False, False, True, True),
    head_depth=6,
    head_expand=4.0,
)

ENCODERS: Mapping[str, LightEncoderConfig] = {
    "tinyvit_5m": TinyVitConfig(),
    "efficientvit_l0": EfficientVitConfig(),
    "efficientvit_l1": EfficientVitConfig(depth_list=(1, 1, 1, 6, 6), head_depth=8),
    "efficientvit_l2": EfficientVitConfig(depth_list=(1, 2, 2, 8, 8), head_depth=12),
    "efficientvit_xl0": _XL0,
    "efficientvit_xl1": msgspec.structs.replace(_XL0, depth_list=(1, 2, 2, 4, 6, 6), head_depth=12),
    "nanosam_resnet18": ResNetConfig(),
}
"""Public light encoders by name."""

TITLES: Mapping[str, str] = {
    "tinyvit_5m": "TinyViT-5M (MobileSAM, TinySAM)",
    "efficientvit_l0": "EfficientViT-SAM-L0",
    "efficientvit_l1": "EfficientViT-SAM-L1",
    "efficientvit_l2": "EfficientViT-SAM-L2",
    "efficientvit_xl0": "EfficientViT-SAM-XL0",
    "efficientvit_xl1": "EfficientViT-SAM-XL1",
    "nanosam_resnet18": "NanoSAM ResNet-18",
}
"""Their names for people."""
