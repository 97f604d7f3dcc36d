"""Record golden outputs: what PyTorch computes for two images, in one small compressed file.

    python export/record_golden.py tests/golden/demo.npz [--checkpoint CHECKPOINT]

``tests/golden.py`` compares every runtime with the file.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from coprs_deploy import CoPRSError, demo
from coprs_deploy.checkpoint import Checkpoint, read_checkpoint
from coprs_deploy.engines.runner import Array
from coprs_deploy.export.equivalence import reference_opener
from coprs_deploy.export.samples import draw_masked_samples
from coprs_deploy.images import RgbArray, prepare_image
from coprs_deploy.specs import GRAPH_NAMES, Geometry, graph_specs

SEED = 7
"""Seed of the images and concentrations; export uses 0, verify 1."""


def random_images(geometry: Geometry) -> list[RgbArray]:
    """Draw a landscape and a portrait image: five squares on noise, longer side at SAM's size."""
    generator = np.random.default_rng(SEED)
    side = geometry.image_size
    images = []
    for height, width in ((side * 9 // 16, side), (side, side * 3 // 4)):
        image = generator.integers(96, 160, (height, width, 3), dtype=np.uint8)
        for _ in range(5):
            y, x = generator.integers(0, height // 2), generator.integers(0, width // 2)
            size = int(generator.integers(side // 8, side // 4))
            image[y : y + size, x : x + size] = generator.integers(0, 256, 3, dtype=np.uint8)
        images.append(image)
    return images


def record_golden(checkpoint: Checkpoint, path: Path) -> None:
    """Compute the outputs of a checkpoint with PyTorch and write them as ``.npz``.

    Arrays: ``fingerprint``; for each sample i ``image.i``, ``concentration.i`` and, by graph name,
    ``image_encoder.i``, ``prior.i`` and ``mask_decoder.i``.
    """
    model = checkpoint.config.model
    images = random_images(model.geometry)
    specs = graph_specs(model.geometry, model.policy_hidden_size)
    samples, outputs = draw_masked_samples(
        [prepare_image(image, model.geometry) for image in images],
        reference_opener(checkpoint, specs),
        model.policy_hidden_size,
        seed=SEED,
    )
    arrays: dict[str, Array] = {"fingerprint": np.array(checkpoint.fingerprint())}
    for i, (image, sample) in enumerate(zip(images, samples, strict=True)):
        arrays[f"image.{i}"] = image
        arrays[f"concentration.{i}"] = sample.concentration
        for name in GRAPH_NAMES:
            arrays[f"{name}.{i}"] = outputs[name][i]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def main(arguments: Sequence[str] | None = None) -> int:
    """Record the file; exit code 2 if the checkpoint cannot be used."""
    parser = argparse.ArgumentParser(description="Record PyTorch's golden outputs of a checkpoint.")
    parser.add_argument("file", type=Path, metavar="FILE", help=".npz file to write")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        default=demo.CHECKPOINT,
        help="checkpoint directory (default: the demo model)",
    )
    parsed = parser.parse_args(arguments)
    try:
        record_golden(read_checkpoint(parsed.checkpoint), parsed.file)
    except CoPRSError as error:
        print(f"record_golden: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{parsed.file}: {parsed.file.stat().st_size / 1e3:,.0f} kB", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
