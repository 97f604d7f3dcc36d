"""SAM's image embeddings on disk, so that training does not compute them again and again.

    features.json              of which encoder, and the shape of an embedding
    shard-00000.safetensors    float16 embeddings, each under the key of its image's content
    shard-00000.json           their checksums, written last: a shard without it does not exist

Equal images are stored once, whatever their names. An interrupted computation goes on with the
images that are missing. Every embedding is checked against its checksum when it is read.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from coprs_deploy.artifacts import atomic_write, exclusive, write_json
from coprs_deploy.checkpoint import Checkpoint, load_segmentation_model
from coprs_deploy.errors import ArtifactError
from coprs_deploy.images import RgbArray, image_key, prepare_image
from coprs_deploy.specs import Record

if TYPE_CHECKING:
    from coprs_deploy.models import SegmentationModel

INDEX_FILE = "features.json"
LOCK_FILE = ".lock"
SCHEMA_VERSION = 1
DEFAULT_SHARD_IMAGES = 256

Progress = Callable[[int, int, float], None]
"""Called with images done, images in all, and seconds so far."""


class FeatureIndex(Record, frozen=True):
    """What a folder of embeddings holds.

    Attributes:
        schema_version: of this file.
        encoder: hash of the image encoder's weights and of the geometry.
        shape: (C, G, G) of an embedding.
    """

    schema_version: int
    encoder: str
    shape: tuple[int, int, int]


@dataclass(frozen=True)
class _Entry:
    """Where an embedding lies, and the checksum of its bytes."""

    shard: Path
    checksum: str


class FeatureStore:
    """Embeddings by image content, read one at a time.

    Args:
        path: a folder that :func:`compute_features` wrote.

    Raises:
        ArtifactError: there is none, or it is of another version.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.index = _read_index(self.path)
        self._entries = _read_entries(self.path)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def require_encoder(self, model: SegmentationModel) -> None:
        """Refuse embeddings of another image encoder.

        Raises:
            ValueError: they were computed with other weights or sizes than the model's.
        """
        if self.index.encoder != encoder_fingerprint(model):
            raise ValueError(
                f"{self.path} holds embeddings of another image encoder than the checkpoint's; "
                "compute them again: coprs-deploy features CHECKPOINT EXAMPLES --out ANOTHER"
            )

    def embedding(self, image: RgbArray) -> Tensor:
        """Read the embedding of a picture.

        Args:
            image: (H, W, 3) uint8.

        Returns:
            (C, G, G) float16.

        Raises:
            ArtifactError: it is not here, or its bytes are not those that were written.
        """
        from safetensors import SafetensorError, safe_open

        key = image_key(image)
        entry = self._entries.get(key)
        if entry is None:
            raise ArtifactError(
                f"{self.path} has no embedding of a picture ({key}) of "
                f"{image.shape[1]}x{image.shape[0]} pixels; `coprs-deploy features` with the same "
                "--out adds what is missing"
            )
        try:
            with safe_open(entry.shard, framework="pt") as stored:
                tensor: Tensor = stored.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise ArtifactError(_damaged(entry.shard, str(error))) from error
        if tuple(tensor.shape) != self.index.shape or _checksum(tensor) != entry.checksum:
            raise ArtifactError(_damaged(entry.shard, f"{key} is not what was written"))
        return tensor


@dataclass(frozen=True)
class FeatureReport:
    """What a computation did.

    Attributes:
        num_images: different images that the folder now holds of those asked for.
        num_new: of them, computed this time.
        num_examples: examples that were read.
        bytes_written: by this computation.
        seconds: that it took.
    """

    num_images: int
    num_new: int
    num_examples: int
    bytes_written: int
    seconds: float


def largest_bytes(checkpoint: Checkpoint, num_images: int) -> int:
    """Estimate the disk that so many different images need at most."""
    geometry = checkpoint.config.model.geometry
    return num_images * 2 * geometry.out_chans * geometry.grid_size**2


def compute_features(
    checkpoint: Checkpoint,
    images: Iterable[RgbArray],
    num_images: int,
    out: Path,
    *,
    shard_images: int = DEFAULT_SHARD_IMAGES,
    device: str = "cpu",
    progress: Progress = lambda done, total, seconds: None,
) -> FeatureReport:
    """Encode images into a folder; those that it holds already are passed over.

    Args:
        checkpoint: whose image encoder.
        images: (H, W, 3) uint8 each; decoded as they are needed.
        num_images: how many there are, for progress and the estimate of disk.
        out: the folder.
        shard_images: embeddings of one shard.
        device: where the encoder runs.
        progress: called after each image.

    Raises:
        ValueError: shard_images is below 1, or the folder holds another encoder's embeddings.
        ArtifactError: the disk is too small, another process writes there, or an embedding does
            not fit float16.
    """
    if shard_images < 1:
        raise ValueError(f"shard_images is {shard_images}; it must be at least 1")
    out.mkdir(parents=True, exist_ok=True)
    with exclusive(out / LOCK_FILE, f"another process writes embeddings to {out}; wait for it"):
        return _compute(
            checkpoint,
            images,
            num_images,
            out,
            shard_images=shard_images,
            device=device,
            progress=progress,
        )


def encoder_fingerprint(model: SegmentationModel) -> str:
    """Name an image encoder by its weights and by how it sees a picture."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps(model.config.geometry.to_json(), sort_keys=True).encode())
    for name, tensor in sorted(model.image_encoder.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def _compute(
    checkpoint: Checkpoint,
    images: Iterable[RgbArray],
    num_images: int,
    out: Path,
    *,
    shard_images: int,
    device: str,
    progress: Progress,
) -> FeatureReport:
    started = time.perf_counter()
    model = load_segmentation_model(checkpoint)
    geometry = model.config.geometry
    shape = (geometry.out_chans, geometry.grid_size, geometry.grid_size)
    index = FeatureIndex(SCHEMA_VERSION, encoder_fingerprint(model), shape)
    if (out / INDEX_FILE).is_file():
        if _read_index(out) != index:
            raise ValueError(
                f"{out} holds embeddings of another image encoder; choose another folder"
            )
    else:
        write_json(out / INDEX_FILE, index.to_json())
    known = set(_read_entries(out))
    _require_disk(out, largest_bytes(checkpoint, max(0, num_images - len(known))))
    model.image_encoder.to(device)
    shard = _Shard(out)
    asked, total, written = set[str](), 0, 0
    for total, image in enumerate(images, start=1):
        key = image_key(image)
        asked.add(key)
        if key not in known:
            known.add(key)
            shard.add(key, _encode(model, image, device))
            if len(shard.tensors) == shard_images:
                written += shard.write()
        progress(total, num_images, time.perf_counter() - started)
    written += shard.write()
    seconds = time.perf_counter() - started
    return FeatureReport(len(asked), shard.num_written, total, written, seconds)


def _encode(model: SegmentationModel, image: RgbArray, device: str) -> Tensor:
    prepared = prepare_image(image, model.config.geometry)
    with torch.inference_mode():
        embedding = model.image_encoder(torch.from_numpy(prepared.image).to(device))[0]
    half: Tensor = embedding.to("cpu", torch.float16)
    if not torch.isfinite(half).all():
        raise ArtifactError(
            f"an embedding reaches {embedding.abs().max():.3g}, beyond float16: the image "
            "encoder's weights are not those of a trained SAM"
        )
    return half


class _Shard:
    """Embeddings that wait to be written together."""

    def __init__(self, folder: Path) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.num_written = 0
        self._folder = folder

    def add(self, key: str, embedding: Tensor) -> None:
        self.tensors[key] = embedding.contiguous()

    def write(self) -> int:
        """Write the shard and, when it is safe on the disk, its checksums; return its bytes."""
        from safetensors.torch import save_file

        if not self.tensors:
            return 0
        numbers = [int(path.stem.partition("-")[2]) for path in self._folder.glob("shard-*.json")]
        path = self._folder / f"shard-{max(numbers, default=-1) + 1:05d}.safetensors"
        with atomic_write(path) as partial:
            save_file(self.tensors, partial)
        checksums = {key: _checksum(tensor) for key, tensor in self.tensors.items()}
        write_json(path.with_suffix(".json"), checksums)
        self.num_written += len(self.tensors)
        self.tensors = {}
        return path.stat().st_size


def _read_index(path: Path) -> FeatureIndex:
    file = path / INDEX_FILE
    if not file.is_file():
        raise ArtifactError(
            f"{path} holds no embeddings (no {INDEX_FILE}); `coprs-deploy features CHECKPOINT "
            f"EXAMPLES --out {path}` computes them"
        )
    try:
        index = FeatureIndex.from_json(json.loads(file.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ArtifactError(
            f"{file} is not valid: {error}; compute the embeddings again"
        ) from error
    if index.schema_version != SCHEMA_VERSION:
        raise ArtifactError(
            f"{file} has schema version {index.schema_version}; this package reads "
            f"{SCHEMA_VERSION}: compute the embeddings again"
        )
    return index


def _read_entries(path: Path) -> dict[str, _Entry]:
    entries: dict[str, _Entry] = {}
    for listing in sorted(path.glob("shard-*.json")):
        shard = listing.with_suffix(".safetensors")
        if not shard.is_file():
            raise ArtifactError(
                f"{shard} is missing; remove {listing.name} and compute the embeddings again with "
                "the same --out"
            )
        try:
            checksums: dict[str, Any] = json.loads(listing.read_text(encoding="utf-8"))
            entries.update({key: _Entry(shard, str(value)) for key, value in checksums.items()})
        except (ValueError, AttributeError) as error:
            raise ArtifactError(_damaged(shard, f"{listing.name}: {error}")) from error
    return entries


def _checksum(tensor: Tensor) -> str:
    values = np.ascontiguousarray(tensor.numpy())
    return hashlib.blake2b(values.view(np.uint8).data, digest_size=16).hexdigest()


def _damaged(shard: Path, reason: str) -> str:
    return (
        f"{shard} is damaged ({reason}); remove it with {shard.stem}.json, and compute the "
        "embeddings again with the same --out"
    )


def _require_disk(out: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(out).free
    if needed_bytes > free:
        raise ArtifactError(
            f"the embeddings need up to {needed_bytes / 1e9:,.1f} GB, and {out} has "
            f"{free / 1e9:,.1f} GB free; choose another disk with --out"
        )
