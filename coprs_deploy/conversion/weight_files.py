"""Read weight files of other projects without running code from them.

``.pth`` and ``.pt`` files are read with ``weights_only=True`` and memory-mapped, so that large ones
are not copied. Sharded FSDP training states are merged here too.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coprs_deploy.checkpoint import check_values
from coprs_deploy.errors import CheckpointError, ConversionError
from coprs_deploy.model_config import SamConfig
from coprs_deploy.specs import Geometry

if TYPE_CHECKING:
    from torch import Tensor

PUBLIC_DECODER_HEADS = 8
"""Attention heads of SAM's mask decoder, which no tensor shape determines."""

SHARD_FILE = "model_world_size_{size}_rank_{rank}.pt"  # codespell:ignore world
"""File of one rank of a sharded training state of FSDP."""

PARTS = ("image_encoder", "prompt_encoder", "mask_decoder", "heatmap_head")
"""Modules of the files that are read; what precedes them in all names is removed."""

WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Names that data parallelism, ``torch.compile``, FSDP and activation checkpointing insert."""

DERIVED = ("num_batches_tracked", "attention_bias_idxs")
"""Last parts of the names of integers that some files keep beside the weights they follow from."""

_MAX_DEPTH = 2
"""Entries above a state dict, as in ``{"checkpoint": {"model": ...}}``; optimizers nest deeper."""


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read the state dict in a ``.pth``, ``.pt`` or ``.safetensors`` file.

    It may be the only one below an entry such as ``model``. What precedes the names of
    :data:`PARTS` in all names, such as ``module.``, is removed.

    Raises:
        ConversionError: the file is missing, of another kind or damaged, would run code when read,
            has several state dicts, or a tensor with values that are not finite.
    """
    data = _load(path)
    found = _find_state_dicts(data)
    if len(found) > 1:
        with_parts = {k: v for k, v in found.items() if any(p in n for n in v for p in PARTS)}
        found = with_parts if len(with_parts) == 1 else found
    if len(found) != 1:
        raise ConversionError(_describe_other(path, data, list(found)))
    (stored,) = found.values()
    tensors = {n: t for n, t in stored.items() if n.split(".")[-1] not in DERIVED}
    try:
        check_values(tensors, str(path))
    except CheckpointError as error:
        raise ConversionError(str(error)) from error
    return _without_prefixes(path, tensors)


def _find_state_dicts(data: Any) -> dict[tuple[str, ...], Mapping[str, Tensor]]:
    """Find the dictionaries of tensors nearest to the top, by the keys that lead to them."""
    import torch

    level: dict[tuple[str, ...], Any] = {(): data}
    for _ in range(_MAX_DEPTH + 1):
        level = {keys: value for keys, value in level.items() if isinstance(value, Mapping)}
        found = {
            keys: value
            for keys, value in level.items()
            if value
            and all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in value.items())
        }
        if found:
            return found
        level = {(*keys, k): v for keys, value in level.items() for k, v in value.items()}
    return {}


def _describe_other(path: Path, data: Any, places: list[tuple[str, ...]]) -> str:
    """Say what a file without a single state dict contains, and how to write one that has."""
    import torch

    if len(places) > 1:
        named = ["".join(f"[{key!r}]" for key in keys) for keys in places]
        return (
            f"{path} contains {len(places)} state dicts: {', '.join(named[:5])}; write the one to "
            f"use to a file of its own, as in {_line_to_write(path, f'data{named[0]}')}"
        )
    tensors = isinstance(data, Mapping) and any(
        isinstance(value, torch.Tensor) for value in data.values()
    )
    if not tensors:
        return f"{path} contains a {type(data).__name__}, not a dictionary of tensors"
    other = next(key for key, value in data.items() if not isinstance(value, torch.Tensor))
    line = "{k: v for k, v in data.items() if isinstance(v, torch.Tensor)}"
    return (
        f"{path} contains {other!r}, which is not a tensor; write the tensors alone: "
        f"{_line_to_write(path, line)}"
    )


def _line_to_write(path: Path, expression: str, *, weights_only: bool = True) -> str:
    """Return the line of Python that writes a part of the file, ``data``, to another file."""
    load = f"torch.load({str(path)!r}, map_location='cpu', weights_only={weights_only})"
    if path.suffix == ".safetensors":
        load = f"safetensors.torch.load_file({str(path)!r})"
    target = str(path.with_name(f"{path.stem}-weights.pth"))
    return f"`import torch, safetensors.torch; data = {load}; torch.save({expression}, {target!r})`"


def _without_prefixes(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove wrappers, and what precedes the names of :data:`PARTS` in all names."""
    names = {n: ".".join(part for part in n.split(".") if part not in WRAPPERS) for n in tensors}
    if len(set(names.values())) < len(names):
        raise ConversionError(
            f"{path} contains tensors twice, with and without a wrapper such as 'module.' in their "
            "names; save the state dict of the model that is wrapped"
        )
    split = {old: new.split(".") for old, new in names.items()}
    leads = {tuple(takewhile(lambda part: part not in PARTS, new)) for new in split.values()}
    lead = leads.pop() if len(leads) == 1 else ()
    start = 0 if lead in map(tuple, split.values()) else len(lead)
    return {".".join(split[name][start:]): tensor.detach() for name, tensor in tensors.items()}


def _load(path: Path) -> Any:
    """Read a file without running code from it."""
    import torch

    if not path.is_file():
        raise ConversionError(f"there is no file {path}")
    if path.suffix == ".safetensors":
        return _load_safetensors(path)
    try:
        try:
            data = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            return torch.load(path, map_location="cpu", weights_only=True)  # the old file format
    except MemoryError:
        raise
    except Exception as error:  # a damaged pickle raises whatever its instructions lead to
        raise ConversionError(_describe_unreadable(path, error)) from error
    try:
        with zipfile.ZipFile(path) as archive:
            has_checksums = any(entry.CRC for entry in archive.infolist())
            damaged = archive.testzip() if has_checksums else None
    except Exception as error:  # as above
        raise ConversionError(_describe_unreadable(path, error)) from error
    if damaged is not None:
        raise ConversionError(f"{path} is damaged: the checksum of {damaged} in it differs")
    return data


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except (SafetensorError, OSError, ValueError) as error:
        raise ConversionError(
            f"{path} is not a safetensors file, or is damaged: {error}"
        ) from error


def _describe_unreadable(path: Path, error: Exception) -> str:
    with path.open("rb") as file:
        start = file.read(2)
    if start != b"PK" and start[:1] != b"\x80":  # a zip archive and a pickle: its two formats
        return f"{path} is not a PyTorch file"
    named = re.search(r"GLOBAL ([\w.]+)|(Unsupported \w+)", str(error))
    if not isinstance(error, pickle.UnpicklingError) or not named:
        reason = str(error).partition("\n")[0]
        return f"{path} is not a PyTorch file, or is damaged: {reason or type(error).__name__}"
    state = "next((data[k] for k in ('model', 'state_dict') if k in data), data)"
    return (
        f"{path} contains more than weights, and reading it could run code ({named[0]}); load it "
        "where you trust it, and save its state dict alone: "
        f"{_line_to_write(path, state, weights_only=False)}"
    )


def read_sam(path: Path) -> tuple[SamConfig, dict[str, Tensor]]:
    """Read a ``sam_vit_*.pth`` file, and infer the sizes from its shapes.

    Raises:
        ConversionError: the file is not a SAM checkpoint.
    """
    tensors = read_state_dict(path)
    try:
        return sam_config_from_shapes({n: tuple(t.shape) for n, t in tensors.items()}), tensors
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        shown, inside = ", ".join(sorted(tensors)[:3]), "image_encoder.pos_embed"
        advice = "accepted: sam_vit_b, sam_vit_l or sam_vit_h as published by segment-anything"
        if "image_encoder.neck.0.weight" in tensors or "backbone.conv1.weight" in tensors:
            advice += "; pass a light encoder as --image-encoder beside it"
        prefix = next((n.removesuffix(inside) for n in tensors if n.endswith(f".{inside}")), "")
        if prefix:
            (keys,) = _find_state_dicts(_load(path))
            data = "".join(["data", *(f"[{key!r}]" for key in keys)])
            part = f"{{k.split({prefix!r})[1]: v for k, v in {data}.items() if {prefix!r} in k}}"
            advice = f"to take the SAM inside it: {_line_to_write(path, part)}"
        raise ConversionError(
            f"{path} is not a SAM checkpoint ({error}); it contains {shown}, ...; {advice}"
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

    ranks: list[Any] = [_load(path) for path in paths]
    names = list(ranks[0]) if isinstance(ranks[0], dict) else []
    for path, rank in zip(paths, ranks, strict=True):
        if not isinstance(rank, dict):
            raise ConversionError(f"{path} contains a {type(rank).__name__}, not a state dict")
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
