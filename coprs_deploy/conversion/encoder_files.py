"""Recognize a public image encoder by its tensors, and put it in the place of another.

CoPRS trains on frozen features of SAM ViT-H, so that an encoder distilled to ViT-H's embedding can
replace it. An encoder that was trained together with its decoder left that embedding, and is
refused; so are encoders of other embeddings or with a licence that does not permit every use.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from coprs_deploy.checkpoint import check_tensors
from coprs_deploy.conversion.weight_files import read_state_dict, sam_config_from_shapes
from coprs_deploy.encoder_config import ENCODERS, TITLES
from coprs_deploy.errors import CheckpointError, ConversionError
from coprs_deploy.model_config import SamConfig

if TYPE_CHECKING:
    from torch import Tensor

PREFIX = "image_encoder."
DECODER_PARTS = ("prompt_encoder.", "mask_decoder.")

MAX_DECODER_DIFFERENCE = 1e-3
"""Largest root mean square difference of two decoders' weights over that of the weights, for which
they count as the same: rounding to half precision gives 3e-4."""

FAMILIES = {
    "patch_embed.seq.0.c.weight": "tinyvit",
    "backbone.stages.0.op_list.0.conv.weight": "efficientvit",
    "backbone.conv1.weight": "nanosam",
}
"""Start of the names in ``ENCODERS``, by a tensor that all encoders of a family have."""

CLASSIFIER = ("norm_head.", "head.")
"""Tensors of TinyViT's pre-training, which no image encoder uses."""

_REFUSED = {
    "fuse_stage2.": "EdgeSAM (RepViT), whose NTU S-Lab License 1.0 permits non-commercial use "
    "only; it is not supported",
    "trunk.": "an encoder of SAM 2, whose embedding differs from SAM ViT-H's",
    "vision_backbone.": "an encoder of SAM 3, whose embedding differs from SAM ViT-H's",
}
"""Reasons, by the start of a tensor's name in the encoder."""

_DISTILLED_FILES = {
    "efficientvit": "the released efficientvit_sam_*.pt were trained end to end; use the encoder "
    "before that, in distilled_model/ of the same release",
    "tinyvit": "MobileSAM's mobile_sam.pt keeps ViT-H's decoder",
}


class EncoderFile(NamedTuple):
    """Contents of a file with an image encoder.

    ``sam`` has the sizes of the model that gets it, ``tensors`` the encoder's weights under the
    names of ``SegmentationModel``, ``decoder`` those of a decoder beside it, if there is one.
    """

    path: Path
    sam: SamConfig
    tensors: dict[str, Tensor]
    decoder: dict[str, Tensor]
    family: str


def read_image_encoder(path: Path, sam: SamConfig) -> EncoderFile:
    """Read an image encoder for a model with SAM's sizes, and recognize it by its tensors.

    Raises:
        ConversionError: the file has no image encoder that fits the model; the message says why.
    """
    tensors = read_state_dict(path)
    is_whole = any(name.startswith(PREFIX) for name in tensors)
    own = {
        name.removeprefix(PREFIX): tensor
        for name, tensor in tensors.items()
        if name.startswith(PREFIX) or not is_whole
    }
    decoder = {n: t for n, t in tensors.items() if n.startswith(DECODER_PARTS)}
    for start, reason in _REFUSED.items():
        if any(name.startswith(start) for name in own):
            raise ConversionError(f"{path} is {reason}")
    shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
    if "pos_embed" in own and "neck.0.weight" in own:
        changed, family = _with_sam_encoder(path, sam, tensors), "sam"
    else:
        changed, family = _recognize(path, sam, shapes)
    if changed.geometry.grid_size != sam.geometry.grid_size:
        raise ConversionError(
            f"{path} gives an embedding of {changed.geometry.grid_size} cells a side, the model "
            f"takes {sam.geometry.grid_size}"
        )
    wanted = _expected_shapes(changed)
    found = {n: t for n, t in own.items() if n in wanted or not _is_unused(n)}
    try:
        check_tensors({n: tuple(t.shape) for n, t in found.items()}, wanted, str(path))
    except CheckpointError as error:
        raise ConversionError(str(error)) from error
    named = {f"{PREFIX}{name}": tensor for name, tensor in found.items()}
    return EncoderFile(path, changed, named, decoder, family)


def require_same_decoder(file: EncoderFile, decoder: Mapping[str, Tensor], owner: str) -> None:
    """Refuse an encoder whose file has another decoder than the model's.

    An encoder alone is accepted: nothing in it shows what it was distilled to.

    Args:
        file: the encoder's file.
        decoder: weights of prompt encoder and mask decoder, among others.
        owner: whose decoder that is, for the message.

    Raises:
        ConversionError: the decoders differ.
    """
    squares = [0.0, 0.0]
    for name, tensor in file.decoder.items():
        if name not in decoder or decoder[name].shape != tensor.shape:
            raise ConversionError(
                f"{file.path} has a mask decoder of another kind than {owner} (first difference: "
                f"{name}): its encoder was made for that one"
            )
        expected = decoder[name].double()
        squares[0] += float((tensor.double() - expected).square().sum())
        squares[1] += float(expected.square().sum())
    difference = (squares[0] / squares[1]) ** 0.5 if squares[1] else 0.0
    if difference > MAX_DECODER_DIFFERENCE:
        advice = _DISTILLED_FILES.get(file.family, "use an encoder that was distilled alone")
        raise ConversionError(
            f"the mask decoder in {file.path} differs from that of {owner} by {difference:.1%} of "
            "its weights: encoder and decoder were trained together, so that the encoder left the "
            f"embedding that prior and decoder read; {advice}"
        )


def _is_unused(name: str) -> bool:
    return name.startswith(CLASSIFIER) or name.endswith(".attn.ab")


def _expected_shapes(sam: SamConfig) -> dict[str, tuple[int, ...]]:
    import torch

    from coprs_deploy.models.image_encoder import build_image_encoder

    with torch.device("meta"):
        encoder = build_image_encoder(sam)
    return {name: tuple(tensor.shape) for name, tensor in encoder.state_dict().items()}


def _recognize(
    path: Path, sam: SamConfig, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[SamConfig, str]:
    """Find the public encoder with the most tensors of these shapes, and its family."""
    families = [family for marker, family in FAMILIES.items() if marker in shapes]
    if not families:
        shown = ", ".join(sorted(shapes)[:3])
        raise ConversionError(
            f"{path} has no image encoder that is known; it contains {shown}, ...; accepted: "
            f"{', '.join(TITLES.values())}, and sam_vit_*.pth of segment-anything"
        )
    best, most = sam, -1
    for name, encoder in ENCODERS.items():
        if name.startswith(families[0]):
            candidate = sam.with_image_encoder(encoder)
            wanted = _expected_shapes(candidate).items()
            equal = sum(shapes.get(key) == shape for key, shape in wanted)
            equal -= sum(key not in shapes for key, _ in wanted)
            if equal > most:
                best, most = candidate, equal
    if most < 0:
        raise ConversionError(
            f"{path} has a {families[0]} encoder of other sizes; accepted: "
            f"{', '.join(TITLES[name] for name in TITLES if name.startswith(families[0]))}"
        )
    return best, families[0]


def _with_sam_encoder(path: Path, sam: SamConfig, tensors: Mapping[str, Tensor]) -> SamConfig:
    """Return the sizes of a model that gets SAM's own encoder."""
    try:
        found = sam_config_from_shapes({name: tuple(t.shape) for name, t in tensors.items()})
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        raise ConversionError(
            f"{path} has an image encoder like SAM's, but is not a SAM checkpoint ({error})"
        ) from error
    sizes = ("encoder_embed_dim", "encoder_depth", "encoder_num_heads", "window_size", "mlp_ratio")
    names = (*sizes, "encoder_global_attn_indexes", "use_rel_pos", "geometry")
    changes = {name: getattr(found, name) for name in names}
    return msgspec.structs.replace(sam, image_encoder=None, **changes)
