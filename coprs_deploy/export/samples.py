"""Sample inputs for comparing graphs with PyTorch: images, and concentrations with usable masks.

The masks of random concentrations are often empty or full, and two such masks agree trivially.
Where masks are compared all together, concentrations are chosen by their masks in PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coprs_deploy.engines.runner import Array, Runner
from coprs_deploy.images import PreparedImage, prepare_image, unpadded_size
from coprs_deploy.specs import IMAGE_ENCODER, MASK_DECODER, PRIOR, Geometry, ValidRegion

RunnerOpener = Callable[[str], Runner]
"""Opens the runner of a graph by name; the caller closes it."""

NUM_DRAWS = 16
"""Concentrations drawn for each target of an image, of which one is chosen."""

PREFERRED_MASK_RATIO = 0.25
"""Share of mask cells inside the mask that the chosen concentration comes closest to."""

_ANY_SHAPES = ((270, 480), (400, 256), (333, 333))
"""Height and width in pixels: landscape, portrait and square."""


@dataclass(frozen=True)
class SampleInput:
    """One image and its concentrations.

    Attributes:
        prepared: image at SAM's size.
        concentration: (N, D) float32.
    """

    prepared: PreparedImage
    concentration: NDArray[np.float32]

    def first_inputs(self) -> dict[str, Array]:
        """Return the inputs of the three graphs that no other graph computes."""
        return {
            "image": self.prepared.image,
            "concentration": self.concentration,
            "unpadded_size": self.prepared.unpadded_size,
        }


def sample_inputs(
    geometry: Geometry,
    policy_hidden_size: int,
    num_targets: int = 1,
    seed: int = 0,
    *,
    valid_region: ValidRegion | None = None,
) -> list[SampleInput]:
    """Draw three samples: a generated scene, noise, and another scene.

    Args:
        geometry: sizes of the model.
        policy_hidden_size: D.
        num_targets: N, concentrations per image.
        seed: equal seeds give equal inputs.
        valid_region: region that the images may reach; None for landscape, portrait and square.

    Returns:
        Samples with standard normal concentrations, the scale of a normalized hidden state.
    """
    generator = np.random.default_rng(seed)
    samples = []
    shapes = _ANY_SHAPES if valid_region is None else _shapes_within(valid_region)
    size = (num_targets, policy_hidden_size)
    for number, (height, width) in enumerate(shapes):
        if number == 1:
            pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        else:
            pixels = _draw_scene(generator, height, width)
        image = prepare_image(pixels, geometry)
        samples.append(SampleInput(image, generator.standard_normal(size, dtype=np.float32)))
    return samples


def draw_masked_samples(
    images: Sequence[PreparedImage],
    reference: RunnerOpener,
    policy_hidden_size: int,
    num_targets: int = 1,
    seed: int = 0,
) -> tuple[list[SampleInput], dict[str, list[Array]]]:
    """Draw concentrations, and keep for each target the one with the best-sized float32 mask.

    ``reference`` opens PyTorch's modules; the encoder runs once per image. The other arguments are
    those of :func:`sample_inputs`.

    Returns:
        One sample per image, and the reference's outputs on the samples by graph, as
        :func:`coprs_deploy.export.equivalence.compare_graphs` accepts them.
    """
    generator = np.random.default_rng(seed)
    known: dict[str, list[Array]] = {IMAGE_ENCODER: [], PRIOR: [], MASK_DECODER: []}
    with reference(IMAGE_ENCODER) as encoder:
        for image in images:
            embedding = encoder(image=image.image)["image_embedding"].numpy()
            known[IMAGE_ENCODER].append(embedding)
    samples, size = list[SampleInput](), (num_targets, policy_hidden_size)
    with reference(PRIOR) as prior, reference(MASK_DECODER) as decoder:
        for image, embedding in zip(images, known[IMAGE_ENCODER], strict=True):
            best: list[NDArray[np.float32]] = [np.empty(0, np.float32)] * num_targets
            nearest = np.full(num_targets, np.inf)
            for _ in range(NUM_DRAWS):
                drawn = generator.standard_normal(size, dtype=np.float32)
                _, masks = decode(prior, decoder, image, embedding, drawn)
                distances = np.abs((masks > 0).mean(axis=(1, 2, 3)) - PREFERRED_MASK_RATIO)
                for target in np.flatnonzero(distances < nearest):
                    best[target], nearest[target] = drawn[target], distances[target]
            sample = SampleInput(image, np.stack(best))
            priors, masks = decode(prior, decoder, image, embedding, sample.concentration)
            known[PRIOR].append(priors)
            known[MASK_DECODER].append(masks)
            samples.append(sample)
    return samples, known


def decode(
    prior: Runner,
    decoder: Runner,
    image: PreparedImage,
    embedding: Array,
    concentration: NDArray[np.float32],
) -> tuple[Array, Array]:
    """Return the prior logits and the mask logits of concentrations on an image embedding."""
    priors = prior(image_embedding=embedding, concentration=concentration)["prior_logits"].numpy()
    masks = decoder(
        image_embedding=embedding, prior_logits=priors, unpadded_size=image.unpadded_size
    )["mask_logits"].numpy()
    return priors, masks


def _shapes_within(valid_region: ValidRegion) -> tuple[tuple[int, int], ...]:
    """Return three (height, width): the aspect ratio, the full region, and half its short side."""
    height, width = valid_region.height, valid_region.width
    size, (across, down) = max(height, width), valid_region.aspect_ratio
    exact = unpadded_size(down, across, size)
    longer = (height // 2, width) if width > height else (height, width // 2)
    return exact, (height, width), (max(1, longer[0]), max(1, longer[1]))


def _draw_scene(generator: np.random.Generator, height: int, width: int) -> NDArray[np.uint8]:
    """Draw eight discs on a color gradient."""
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    ramp = generator.uniform(0, 255, (3, 3))
    image = ramp[0] * x[..., None] + ramp[1] * y[..., None] + ramp[2] * 0.5
    for _ in range(8):
        center, radius = generator.uniform(0, 1, 2), generator.uniform(0.05, 0.2)
        inside = (y - center[0]) ** 2 + (x - center[1]) ** 2 < radius**2
        image[inside] = generator.uniform(0, 255, 3)
    drawn: NDArray[np.uint8] = np.clip(image, 0, 255).astype(np.uint8)
    return drawn
