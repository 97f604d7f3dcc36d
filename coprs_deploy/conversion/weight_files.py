"""Read ``.pth`` and ``.pt`` weight files of other projects without running code from them.

Files are read with ``weights_only=True`` and memory-mapped, so that a large one is not copied.
Sharded FSDP training states are merged here too.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coprs_deploy.errors import ConversionError
from coprs_deploy.model_config import SamConfig
from coprs_deploy.specs import Geometry

if TYPE_CHECKING:
    from torch import Tensor

PUBLIC_DECODER_HEADS = 8
"""Attention heads of SAM's mask decoder, which no tensor shape determines."""

SHARD_FILE = "model_world_size_{size}_rank_{rank}.pt"  # codespell:ignore world
"""File of one rank of a sharded training state of FSDP."""


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read a flat state dict.

    Raises:
        ConversionError: the file is missing, is of another kind, or would run code when read.
    """
    import torch

    data = _load(path)
    if not isinstance(data, Mapping) or not data:
        raise ConversionError(
            f"{path} contains a {type(data).__name__}, not a dictionary of tensors"
        )
    others = [key for key, value in data.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise ConversionError(
            f"{path} contains {others[0]!r}, which is not a tensor; accepted: a flat state dict as "
            "written by torch.save(model.state_dict(), path)"
        )
    return dict(data)


def _load(path: Path) -> Any:
    import torch

    if not path.is_file():
        raise ConversionError(f"there is no file {path}")
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            return torch.load(path, map_location="cpu", weights_only=True)  # the old file format
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        with path.open("rb") as file:
            start = file.read(2)
        if start != b"PK" and start[:1] != b"\x80":  # a zip archive and a pickle: its two formats
            raise ConversionError(f"{path} is not a PyTorch file") from error
        if not isinstance(error, pickle.UnpicklingError):
            raise ConversionError(
                f"{path} is not a PyTorch file, or was truncated: {error}"
            ) from error
        lines = [line.strip() for line in str(error).splitlines()]
        named = next((n for n in lines if "GLOBAL" in n or n.startswith("Unsupported")), "pickle")
        raise ConversionError(
            f"{path} contains more than weights, and reading it could run code ({named}); load it "
            "where you trust it, and save its state dict alone"
        ) from error


def read_sam(path: Path) -> tuple[SamConfig, dict[str, Tensor]]:
    """Read a ``sam_vit_*.pth`` file, and infer the sizes from its shapes.

    Raises:
        ConversionError: the file is not a SAM checkpoint.
    """
    tensors = read_state_dict(path)
    try:
        return sam_config_from_shapes({n: tuple(t.shape) for n, t in tensors.items()}), tensors
    except (KeyError, ValueError, IndexError) as error:
        shown = ", ".join(sorted(tensors)[:3])
        raise ConversionError(
            f"{path} is not a SAM checkpoint ({error}); it contains {shown}, ...; "
            "accepted: sam_vit_b, sam_vit_l or sam_vit_h as published by segment-anything"
        ) from error


def sam_config_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> SamConfig:
    """Infer the sizes of a SAM model from the shapes of its tensors, or raise ``KeyError``."""
    encoder, decoder = "image_encoder", "mask_decoder"
    _, grid, _, width = shapes[f"{encoder}.pos_embed"]
    patch = shapes[f"{encoder}.patch_embed.proj.weight"][-1]
    depth = _count(shapes, rf"{encoder}\.blocks\.(\d+)\.")
    has_positions = f"{encoder}.blocks.0.attn.rel_pos_h" in shapes
    windows, head_width = [], width // 12
    for block in range(depth if has_positions else 0):
        length, head_width = shapes[f"{encoder}.blocks.{block}.attn.rel_pos_h"]
        windows.append((length + 1) // 2)
    local = [window for window in windows if window != grid]
    return SamConfig(
        encoder_embed_dim=width,
        encoder_depth=depth,
        encoder_num_heads=width // head_width,
        encoder_global_attn_indexes=tuple(i for i, window in enumerate(windows) if window == grid),
        window_size=local[0] if local else grid,
        mlp_ratio=shapes[f"{encoder}.blocks.0.mlp.lin1.weight"][0] / width,
        use_rel_pos=has_positions,
        mask_in_chans=shapes["prompt_encoder.mask_downscaling.3.weight"][0],
        decoder_depth=_count(shapes, rf"{decoder}\.transformer\.layers\.(\d+)\."),
        decoder_num_heads=PUBLIC_DECODER_HEADS,
        decoder_mlp_dim=shapes[f"{decoder}.transformer.layers.0.mlp.lin1.weight"][0],
        num_mask_tokens=shapes[f"{decoder}.mask_tokens.weight"][0],
        iou_head_hidden_dim=shapes[f"{decoder}.iou_prediction_head.layers.0.weight"][0],
        geometry=Geometry(
            image_size=grid * patch,
            patch_size=patch,
            out_chans=shapes[f"{encoder}.neck.0.weight"][0],
        ),
    )


def _count(shapes: Mapping[str, tuple[int, ...]], pattern: str) -> int:
    found = [int(match[1]) for name in shapes if (match := re.match(pattern, name))]
    return max(found, default=-1) + 1


def find_shards(directory: Path) -> list[Path]:
    """List the rank files of a sharded training state in rank order; none may be missing."""
    pattern = SHARD_FILE.format(size=r"(\d+)", rank=r"(\d+)")
    found = {
        (int(match[1]), int(match[2])): path
        for path in directory.glob(SHARD_FILE.format(size="*", rank="*"))
        if (match := re.fullmatch(pattern, path.name))
    }
    sizes = sorted({size for size, _ in found})
    if len(sizes) > 1:
        raise ConversionError(f"{directory} has shards of {sizes} ranks: keep one set")
    ranks = [(size, rank) for size in sizes for rank in range(size)]
    missing = [SHARD_FILE.format(size=n, rank=rank) for n, rank in ranks if (n, rank) not in found]
    if missing:
        raise ConversionError(
            f"{directory} lacks {missing[0]} ({len(missing)} of {len(ranks)} ranks are missing)"
        )
    return [found[key] for key in ranks]


def merge_shards(paths: list[Path]) -> dict[str, Tensor]:
    """Merge the shards of an FSDP training state, one file per rank, in order.

    Raises:
        ConversionError: a file cannot be read safely, or a tensor is not sharded along one
            dimension of one group of ranks (such as with tensor parallelism).
    """
    import torch.distributed.tensor  # noqa: F401  allows weights_only to read sharded tensors

    ranks: list[dict[str, Any]] = [_load(path) for path in paths]
    names = list(ranks[0])
    for path, rank in zip(paths, ranks, strict=True):
        if list(rank) != names:
            raise ConversionError(f"{path} has other tensors than {paths[0]}")
    return {name: _merge(name, [rank.pop(name) for rank in ranks]) for name in names}


def _merge(name: str, parts: list[Any]) -> Tensor:
    import torch
    from torch.distributed.tensor import DTensor, Shard

    first = parts[0]
    if not isinstance(first, DTensor):
        if not isinstance(first, torch.Tensor):
            raise ConversionError(f"{name} is a {type(first).__name__}, which cannot be merged")
        return first
    sharded = [p for p in first.placements if isinstance(p, Shard)]
    if not sharded:
        return first.to_local()
    if len(sharded) > 1 or not first.placements[-1].is_shard():
        raise ConversionError(
            f"{name} is sharded as {first.placements}; supported: sharded over the last mesh "
            "dimension only (FSDP or HSDP)"
        )
    group = first.device_mesh.size(first.device_mesh.ndim - 1)
    merged = torch.cat([part.to_local() for part in parts[:group]], dim=sharded[0].dim)
    if merged.shape != first.shape:
        raise ConversionError(
            f"{name} has shape {tuple(merged.shape)} after merging, not {tuple(first.shape)}"
        )
    return merged
