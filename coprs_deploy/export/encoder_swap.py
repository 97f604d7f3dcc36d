"""How far prior and masks move when a checkpoint gets another image encoder, on given images.

Both encoders run in PyTorch in float32 on the CPU, with the same prior and decoder. Each image gets
concentrations that give masks of usual size with the old encoder; what counts is the difference.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

import numpy as np

from coprs_deploy.checkpoint import Checkpoint, load_segmentation_model, read_checkpoint
from coprs_deploy.data.readers.image_folder import find_images
from coprs_deploy.engines.runner import Array
from coprs_deploy.errors import EquivalenceError
from coprs_deploy.evaluation.metrics import count_pixels, iou
from coprs_deploy.export.equivalence import cosine_similarity, reference_opener, relative_error
from coprs_deploy.export.samples import RunnerOpener, SampleInput, decode, draw_masked_samples
from coprs_deploy.images import PreparedImage, load_image, prepare_image
from coprs_deploy.logits import mask_cells
from coprs_deploy.specs import (
    IMAGE_ENCODER,
    MASK_DECODER,
    PRIOR,
    OptimizationProfile,
    Record,
    graph_specs,
)

SEED = 0
NUM_TARGETS = 4
"""Concentrations per image."""

ENCODER_PREFIX = "image_encoder."


class ImageMovement(Record, frozen=True):
    """Difference on one image; its padding does not count.

    Attributes:
        image: path.
        embedding_error: Euclidean norm of the difference of the embeddings over that of the old.
        embedding_cosine: cosine of the embeddings.
        prior_error: mean absolute difference of the heat maps, whose values are 0 to 1.
        mask_iou: IoU of the masks, all concentrations together.
    """

    image: str
    embedding_error: float
    embedding_cosine: float
    prior_error: float
    mask_iou: float


def compare_image_encoders(
    old: str | Path,
    new: str | Path,
    images: Path,
    report: Callable[[str], None] = lambda step: None,
) -> tuple[ImageMovement, ...]:
    """Compare a checkpoint with the same one with another image encoder.

    Args:
        old: checkpoint directory.
        new: checkpoint directory, made from the other by ``convert --image-encoder``.
        images: directory of images.
        report: called with the name of each step as it starts.

    Raises:
        CheckpointError: a checkpoint cannot be used.
        EquivalenceError: they differ in more than the image encoder.
        ImageError: an image cannot be read.
        ValueError: there is no image.
    """
    first, second = read_checkpoint(old), read_checkpoint(new)
    _require_same_rest(first, second)
    paths = find_images(images)
    if not paths:
        raise ValueError(f"{images} has no images; accepted: a directory with at least one")
    report("old image encoder")
    prepared = [_prepare(path, first) for path in paths]
    opener = _opener(first)
    hidden_size = first.config.model.policy_hidden_size
    samples, known = draw_masked_samples(prepared, opener, hidden_size, NUM_TARGETS, SEED)
    report("new image encoder")
    embeddings = list[Array]()
    with _opener(second)(IMAGE_ENCODER) as encoder:
        for path in paths:
            image = _prepare(path, second).image
            embeddings.append(np.array(encoder(image=image)["image_embedding"].numpy()))
    report("masks")
    with opener(PRIOR) as prior, opener(MASK_DECODER) as decoder:
        return tuple(
            _movement(
                str(path),
                (sample, first),
                {name: outputs[number] for name, outputs in known.items()},
                (
                    embeddings[number],
                    *decode(
                        prior,
                        decoder,
                        sample.prepared,
                        embeddings[number],
                        sample.concentration,
                    ),
                ),
            )
            for number, (path, sample) in enumerate(zip(paths, samples, strict=True))
        )


def mean_movement(images: Sequence[ImageMovement]) -> ImageMovement:
    """Return the mean over images; at least one."""
    names = [name for name in ImageMovement.__struct_fields__ if name != "image"]
    means = {name: fmean(getattr(moved, name) for moved in images) for name in names}
    return ImageMovement(image="mean", **means)


def _movement(
    path: str,
    source: tuple[SampleInput, Checkpoint],
    old: Mapping[str, Array],
    new: tuple[Array, Array, Array],
) -> ImageMovement:
    """Summarize one image; ``new`` are embedding, prior logits and mask logits."""
    sample, checkpoint = source
    geometry = checkpoint.config.model.geometry
    height, width = mask_cells(sample.prepared.unpadded_size, geometry)
    rows, columns = -(-height // 4), -(-width // 4)

    def inside(values: Array, below: int, right: int) -> Array:
        return np.ascontiguousarray(values[..., :below, :right])

    embedding, expected = (inside(v, rows, columns) for v in (new[0], old[IMAGE_ENCODER]))
    priors = [1 / (1 + np.exp(-inside(v, height, width))) for v in (new[1], old[PRIOR])]
    masks = [inside(v, height, width) > 0 for v in (new[2], old[MASK_DECODER])]
    return ImageMovement(
        image=path,
        embedding_error=relative_error(embedding, expected, order=2),
        embedding_cosine=cosine_similarity(embedding, expected),
        prior_error=float(np.abs(priors[0] - priors[1]).mean()),
        mask_iou=iou(count_pixels(*masks), empty=1.0),
    )


def _prepare(path: Path, checkpoint: Checkpoint) -> PreparedImage:
    return prepare_image(load_image(path), checkpoint.config.model.geometry)


def _opener(checkpoint: Checkpoint) -> RunnerOpener:
    model = checkpoint.config.model
    targets = OptimizationProfile(NUM_TARGETS, NUM_TARGETS, NUM_TARGETS)
    return reference_opener(
        checkpoint, graph_specs(model.geometry, model.policy_hidden_size, targets)
    )


def _require_same_rest(old: Checkpoint, new: Checkpoint) -> None:
    """Raise :class:`EquivalenceError` unless all but the image encoders is the same."""
    states = [
        {
            name: tensor
            for name, tensor in load_segmentation_model(checkpoint).state_dict().items()
            if not name.startswith(ENCODER_PREFIX)
        }
        for checkpoint in (old, new)
    ]
    different = sorted(states[0].keys() ^ states[1].keys()) or [
        name for name, tensor in states[0].items() if not tensor.equal(states[1][name])
    ]
    if different:
        raise EquivalenceError(
            f"{new.path} differs from {old.path} in more than its image encoder, first in "
            f"{different[0]}; make it with `coprs-deploy convert {shlex.quote(str(old.path))} "
            "--image-encoder FILE`"
        )
