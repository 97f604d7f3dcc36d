"""Precomputed SAM image embeddings on disk, for training with a frozen image encoder.

    features.json              fingerprint of the encoder and shape of an embedding
    shard-00000.safetensors    float16 embeddings by the content key of their image, with checksums

Equal images are stored once. An interrupted computation resumes with the missing images. Every
embedding is checked against its checksum when it is read.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from coprs_deploy.artifacts import atomic_write, exclusive, make_directory, write_json
from coprs_deploy.checkpoint import Checkpoint, load_segmentation_model
from coprs_deploy.errors import ArtifactError
from coprs_deploy.images import RgbArray, image_key, prepare_image
from coprs_deploy.specs import Geometry, Record

if TYPE_CHECKING:
    from coprs_deploy.models import SegmentationModel

INDEX_FILE = "features.json"
LOCK_FILE = ".lock"

Progress = Callable[[int, int, float], None]
"""Callback with the images done, their total, and the seconds so far."""


class FeatureIndex(Record, frozen=True):
    """Index of a directory: fingerprint of the encoder, and shape of an embedding, (C, G, G)."""

    schema_version: Literal[1]
    encoder: str
    shape: tuple[int, int, int]


class FeatureStore:
    """Embeddings by image content in a directory, read one at a time.

    Raises:
        ArtifactError: no embeddings, another schema version, or a damaged file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.index = _read_index(self.path)
        self._shards = _read_shards(self.path)

    def __len__(self) -> int:
        return len(self._shards)

    def __contains__(self, key: str) -> bool:
        return key in self._shards

    def require_encoder(self, model: SegmentationModel) -> None:
        """Check that the embeddings were computed with the image encoder of ``model``.

        Raises:
            ValueError: they were computed with another image encoder.
        """
        if self.index.encoder != encoder_fingerprint(model):
            raise ValueError(
                f"embeddings in {self.path} were computed with a different image encoder; "
                "recompute with `coprs-deploy features CHECKPOINT EXAMPLES --out DIRECTORY`"
            )

    def embedding(self, image: RgbArray) -> Tensor:
        """Read the embedding of an image, (H, W, 3) uint8 to (C, G, G) float16.

        Raises:
            ArtifactError: the embedding is missing or damaged.
        """
        key = image_key(image)
        if key not in self._shards:
            raise ArtifactError(
                f"no embedding in {self.path} for the image {key} "
                f"({image.shape[1]}x{image.shape[0]} pixels); `coprs-deploy features` with the "
                "same --out adds missing embeddings"
            )
        shard, checksum = self._shards[key]
        with _open_shard(shard) as stored:
            tensor: Tensor = stored.get_tensor(key)
        if tuple(tensor.shape) != self.index.shape or _checksum(tensor) != checksum:
            raise _damaged(shard, f"checksum of {key} does not match")
        return tensor


def load_images(
    images: Sequence[RgbArray], geometry: Geometry, features: FeatureStore | None
) -> tuple[Tensor, Tensor]:
    """Prepare images for the image encoder, or read their precomputed embeddings.

    Args:
        images: (H, W, 3) uint8 each.
        geometry: geometry of the segmentation path.
        features: precomputed embeddings; None prepares the images.

    Returns:
        (B, 3, S, S) float32 images, or (B, C, G, G) float16 embeddings; and the unpadded sizes,
        int64 (B, 2), height and width in pixels of each padded image.
    """
    prepared = [prepare_image(image, geometry) for image in images]
    sizes = torch.from_numpy(np.stack([each.unpadded_size for each in prepared]))
    if features is None:
        return torch.from_numpy(np.concatenate([each.image for each in prepared])), sizes
    return torch.stack([features.embedding(image) for image in images]), sizes


@dataclass(frozen=True)
class FeatureReport:
    """Result of a computation: distinct images (all stored now), those computed, examples read."""

    num_images: int
    num_new: int
    num_examples: int
    bytes_written: int
    seconds: float


def max_feature_bytes(checkpoint: Checkpoint, num_images: int) -> int:
    """Return the maximum disk space of the embeddings of ``num_images`` images, in bytes."""
    geometry = checkpoint.config.model.geometry
    return num_images * 2 * geometry.out_chans * geometry.grid_size**2


def compute_features(
    checkpoint: Checkpoint,
    images: Iterable[RgbArray],
    num_images: int,
    out: Path,
    *,
    images_per_shard: int = 256,
    device: str = "cpu",
    progress: Progress = lambda done, total, seconds: None,
) -> FeatureReport:
    """Encode images into a directory; images stored there already are skipped.

    Args:
        checkpoint: checkpoint with the image encoder.
        images: (H, W, 3) uint8 each, consumed lazily.
        num_images: number of images, for progress and the disk check.
        out: output directory.
        images_per_shard: embeddings per shard file.
        device: device of the image encoder.
        progress: callback after each image.

    Raises:
        ValueError: images_per_shard is below 1, or ``out`` has embeddings of another encoder.
        ArtifactError: the disk is too small, another process is writing there, or an embedding
            exceeds float16.
    """
    if images_per_shard < 1:
        raise ValueError(f"images_per_shard is {images_per_shard}; accepted: 1 or more")
    started = time.perf_counter()
    make_directory(out)
    with exclusive(out / LOCK_FILE, f"another process is writing to {out}; wait for it"):
        model = load_segmentation_model(checkpoint)
        _open_index(out, model)
        known = set(_read_shards(out))
        needed = max_feature_bytes(checkpoint, max(0, num_images - len(known)))
        if needed > (free := shutil.disk_usage(out).free):
            raise ArtifactError(
                f"the embeddings need up to {needed / 1e9:,.1f} GB, but only {free / 1e9:,.1f} GB "
                f"are free at {out}; choose another disk with --out"
            )
        model.image_encoder.to(device)
        requested, shard = set[str](), dict[str, Tensor]()
        total = num_new = written = 0
        for total, image in enumerate(images, start=1):
            key = image_key(image)
            requested.add(key)
            if key not in known:
                known.add(key)
                num_new += 1
                shard[key] = _encode(model, image, device)
                if len(shard) == images_per_shard:
                    written += _write_shard(out, shard)
                    shard = {}
            progress(total, num_images, time.perf_counter() - started)
        written += _write_shard(out, shard)
    seconds = time.perf_counter() - started
    return FeatureReport(len(requested), num_new, total, written, seconds)


def encoder_fingerprint(model: SegmentationModel) -> str:
    """Return a hash of the image encoder's weights and geometry."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps(model.config.geometry.to_json(), sort_keys=True).encode())
    for name, tensor in sorted(model.image_encoder.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def _open_index(out: Path, model: SegmentationModel) -> None:
    """Write the index of a new directory; an existing one must be of the same encoder."""
    size = model.config.geometry.grid_size
    shape = (model.config.geometry.out_chans, size, size)
    index = FeatureIndex(1, encoder_fingerprint(model), shape)
    if not (out / INDEX_FILE).is_file():
        write_json(out / INDEX_FILE, index.to_json())
    elif _read_index(out) != index:
        raise ValueError(
            f"embeddings in {out} were computed with a different image encoder; choose another "
            "directory with --out"
        )


def _encode(model: SegmentationModel, image: RgbArray, device: str) -> Tensor:
    prepared = prepare_image(image, model.config.geometry)
    with torch.inference_mode():
        embedding = model.image_encoder(torch.from_numpy(prepared.image).to(device))[0]
    half: Tensor = embedding.to("cpu", torch.float16).contiguous()
    if not torch.isfinite(half).all():
        raise ArtifactError(
            f"an embedding has values up to {embedding.abs().max():.3g}, beyond the range of "
            "float16; use the weights of a trained SAM"
        )
    return half


def _write_shard(out: Path, tensors: dict[str, Tensor]) -> int:
    """Write a shard; return its size in bytes."""
    from safetensors.torch import save_file

    if not tensors:
        return 0
    numbers = [int(path.stem.partition("-")[2]) for path in out.glob("shard-*.safetensors")]
    path = out / f"shard-{max(numbers, default=-1) + 1:05d}.safetensors"
    with atomic_write(path) as partial:
        save_file(tensors, partial, {key: _checksum(tensor) for key, tensor in tensors.items()})
    return path.stat().st_size


def _read_index(path: Path) -> FeatureIndex:
    file = path / INDEX_FILE
    if not file.is_file():
        raise ArtifactError(
            f"no embeddings in {path} ({INDEX_FILE} is missing); compute them with `coprs-deploy "
            f"features CHECKPOINT EXAMPLES --out {path}`"
        )
    try:
        return FeatureIndex.from_json(json.loads(file.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ArtifactError(f"cannot parse {file}: {error}; recompute the embeddings") from error


def _read_shards(path: Path) -> dict[str, tuple[Path, str]]:
    """Map the key of each embedding to its file and checksum."""
    shards: dict[str, tuple[Path, str]] = {}
    for shard in sorted(path.glob("shard-*.safetensors")):
        with _open_shard(shard) as stored:
            shards.update({key: (shard, value) for key, value in stored.metadata().items()})
    return shards


@contextmanager
def _open_shard(shard: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(shard, framework="pt") as stored:
            yield stored
    except (SafetensorError, OSError) as error:
        raise _damaged(shard, str(error)) from error


def _checksum(tensor: Tensor) -> str:
    values = np.ascontiguousarray(tensor.numpy())
    return hashlib.blake2b(values.view(np.uint8).data, digest_size=16).hexdigest()


def _damaged(shard: Path, reason: str) -> ArtifactError:
    return ArtifactError(
        f"{shard} is damaged ({reason}); remove it and recompute with the same --out"
    )
