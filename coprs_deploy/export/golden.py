"""Golden inputs and outputs: what PyTorch computed once, in one small file that is kept.

``python -m coprs_deploy.export.golden FILE`` records those of the shipped model, or with
``--checkpoint DIR`` those of another one. A runtime is compared with the file without PyTorch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from coprs_deploy import demo
from coprs_deploy.checkpoint import Checkpoint, read_checkpoint
from coprs_deploy.engines.runner import Array
from coprs_deploy.errors import EquivalenceError
from coprs_deploy.export.equivalence import SampleInput, reference_opener
from coprs_deploy.export.samples import draw_masked_samples
from coprs_deploy.images import RgbArray, prepare_image
from coprs_deploy.specs import GRAPH_NAMES, Geometry, graph_specs

SEED = 7
"""Of the pictures and the concentrations; export and verify draw by others."""


@dataclass(frozen=True)
class Golden:
    """What was recorded.

    Attributes:
        fingerprint: of the checkpoint.
        samples: inputs.
        outputs: PyTorch's outputs in float32, by graph, one a sample; each stage was fed with the
            output of the stage before.
    """

    fingerprint: str
    samples: list[SampleInput]
    outputs: dict[str, list[Array]]


def random_images(geometry: Geometry) -> list[RgbArray]:
    """Draw a landscape and a portrait of squares on noise; the longer side needs no resizing."""
    generator = np.random.default_rng(SEED)
    side = geometry.image_size
    pictures = []
    for height, width in ((side * 9 // 16, side), (side, side * 3 // 4)):
        picture = generator.integers(96, 160, (height, width, 3), dtype=np.uint8)
        for _ in range(5):
            y, x = generator.integers(0, height // 2), generator.integers(0, width // 2)
            size = int(generator.integers(side // 8, side // 4))
            picture[y : y + size, x : x + size] = generator.integers(0, 256, 3, dtype=np.uint8)
        pictures.append(picture)
    return pictures


def record_golden(checkpoint: Checkpoint, path: Path) -> None:
    """Compute the outputs of a checkpoint with PyTorch and write them as a compressed ``.npz``."""
    model = checkpoint.config.model
    pictures = random_images(model.geometry)
    specs = graph_specs(model.geometry, model.policy_hidden_size)
    samples, outputs = draw_masked_samples(
        [prepare_image(picture, model.geometry) for picture in pictures],
        reference_opener(checkpoint, specs),
        model.policy_hidden_size,
        seed=SEED,
    )
    arrays: dict[str, Array] = {"fingerprint": np.array(checkpoint.fingerprint())}
    for i, (picture, sample) in enumerate(zip(pictures, samples, strict=True)):
        arrays[f"picture.{i}"] = picture
        arrays[f"concentration.{i}"] = sample.concentration
        for name in GRAPH_NAMES:
            arrays[f"{name}.{i}"] = outputs[name][i]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def read_golden(path: Path, geometry: Geometry, fingerprint: str) -> Golden:
    """Read a file that :func:`record_golden` wrote.

    Args:
        path: the file.
        geometry: of the model, to prepare the pictures with.
        fingerprint: of the checkpoint that it shall belong to.

    Raises:
        EquivalenceError: it was recorded from another checkpoint.
    """
    with np.load(path, allow_pickle=False) as arrays:
        recorded = str(arrays["fingerprint"])
        if recorded != fingerprint:
            raise EquivalenceError(
                f"{path.name} was recorded from another checkpoint ({recorded[:12]}) than this one "
                f"({fingerprint[:12]}); record it again: python -m coprs_deploy.export.golden FILE"
            )
        count = sum(name.startswith("picture.") for name in arrays.files)
        samples = []
        for i in range(count):
            concentration: NDArray[np.float32] = arrays[f"concentration.{i}"]
            samples.append(
                SampleInput(prepare_image(arrays[f"picture.{i}"], geometry), concentration)
            )
        outputs = {name: [arrays[f"{name}.{i}"] for i in range(count)] for name in GRAPH_NAMES}
    return Golden(recorded, samples, outputs)


def main(arguments: Sequence[str] | None = None) -> int:
    """Record the file."""
    parser = argparse.ArgumentParser(prog="python -m coprs_deploy.export.golden")
    parser.add_argument("file", type=Path, help="the .npz to write")
    parser.add_argument("--checkpoint", type=Path, default=demo.CHECKPOINT)
    parsed = parser.parse_args(arguments)
    record_golden(read_checkpoint(parsed.checkpoint), parsed.file)
    print(f"{parsed.file}: {parsed.file.stat().st_size / 1e3:,.0f} kB", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
