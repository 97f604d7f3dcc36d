"""Average the weights of checkpoints of one training lineage.

    python training/average_checkpoints.py runs/full-further/checkpoint=0.5 \
        runs/full-truncated/checkpoint=0.5 --out averaged

A model and what further training made of it often average to one that has both abilities
(https://arxiv.org/abs/2109.01903). Sizes and tokenizer must be equal; the other files are those of
the first checkpoint, and the provenance names all of them. Weights are averaged in float32 and
stored in the dtypes of the first one.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from coprs_deploy.artifacts import new_directory, write_json
from coprs_deploy.checkpoint import CONFIG_FILE, Checkpoint, check_tensors, read_checkpoint

TOKENIZER_FILE = "policy/tokenizer.json"


def average_checkpoints(
    parts: Sequence[tuple[Path, float]], out: Path, *, overwrite: bool = False
) -> Checkpoint:
    """Write the weighted mean of checkpoints.

    Args:
        parts: checkpoints and their shares, which add up to 1.
        out: checkpoint to write.
        overwrite: whether an existing checkpoint is replaced.

    Raises:
        ValueError: fewer than two checkpoints, shares that do not add up to 1, or checkpoints that
            differ in more than their weights.
        CheckpointError: a checkpoint cannot be read, or its tensors have other shapes.
        ArtifactError: ``out`` exists.
    """
    shares = [share for _, share in parts]
    if len(parts) < 2 or not math.isclose(sum(shares), 1, abs_tol=1e-6) or min(shares) <= 0:
        raise ValueError(
            f"the shares are {shares}; accepted: two or more, above 0, that add up to 1"
        )
    opened = [read_checkpoint(path) for path, _ in parts]
    first = opened[0]
    for other in opened[1:]:
        _require_equal(first, other)
    with new_directory(out, CONFIG_FILE, overwrite) as partial:
        shutil.copytree(first.path, partial, dirs_exist_ok=True)
        for file in partial.rglob("*.safetensors"):
            name = file.relative_to(partial)
            _average_file([checkpoint.path / name for checkpoint in opened], shares, file)
        provenances = [each.config.provenance for each in opened]
        common = {
            key: value
            for key, value in provenances[0].items()
            if all(other.get(key) == value for other in provenances)
        }
        origins = [
            {"share": share, "fingerprint": each.fingerprint(), **each.config.provenance}
            for each, share in zip(opened, shares, strict=True)
        ]
        config = msgspec.structs.replace(first.config, provenance=common | {"average": origins})
        write_json(partial / CONFIG_FILE, config.to_json())
    return read_checkpoint(out)


def _require_equal(first: Checkpoint, other: Checkpoint) -> None:
    def text(checkpoint: Checkpoint) -> str:
        return (checkpoint.path / TOKENIZER_FILE).read_text(encoding="utf-8")

    if (first.config.model, first.config.prompt) != (other.config.model, other.config.prompt):
        raise ValueError(
            f"{other.path} has other sizes or another prompt than {first.path}; accepted: a model "
            "and what further training made of it"
        )
    if text(first) != text(other):
        raise ValueError(
            f"{other.path} has another tokenizer than {first.path}; accepted: a model and what "
            "further training made of it, which keeps the tokenizer"
        )


def _average_file(files: Sequence[Path], shares: Sequence[float], out: Path) -> None:
    with safe_open(files[0], "pt") as opened:
        metadata = opened.metadata()
    parts = [load_file(file) for file in files]
    shapes = [{name: tuple(t.shape) for name, t in part.items()} for part in parts]
    for file, found in zip(files[1:], shapes[1:], strict=True):
        check_tensors(found, shapes[0], f"the weights of {file}")
    averaged = {
        name: _mean([part[name] for part in parts], shares).to(tensor.dtype)
        for name, tensor in parts[0].items()
    }
    save_file(averaged, out, metadata=metadata)


def _mean(tensors: Sequence[torch.Tensor], shares: Sequence[float]) -> torch.Tensor:
    products = (tensor.float() * share for tensor, share in zip(tensors, shares, strict=True))
    return torch.stack(list(products)).sum(0)


def _part(text: str) -> tuple[Path, float]:
    path, separator, share = text.rpartition("=")
    try:
        if separator:
            return Path(path), float(share)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r}; accepted: CHECKPOINT=SHARE, such as a=0.5")


def main(arguments: Sequence[str]) -> int:
    """Average, and print the path."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("parts", nargs="+", type=_part, metavar="CHECKPOINT=SHARE")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing checkpoint")
    given = parser.parse_args(arguments)
    print(average_checkpoints(given.parts, given.out, overwrite=given.overwrite).path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
