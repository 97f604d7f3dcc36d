"""Concentrations whose masks can be compared: a random one often gives an empty or a full mask."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from coprs_deploy.bundle import Manifest
from coprs_deploy.engines.runner import Array, Runner
from coprs_deploy.export.equivalence import RunnerOpener, SampleInput, sample_inputs
from coprs_deploy.images import PreparedImage
from coprs_deploy.specs import IMAGE_ENCODER, MASK_DECODER, PRIOR

NUM_DRAWS = 16
"""Concentrations that are tried for each target of a picture."""

WANTED_SHARE = 0.25
"""Share of the cells that the mask of the best concentration comes nearest to."""


def draw_bundle_samples(
    manifest: Manifest, reference: RunnerOpener, pools_masks: bool, seed: int
) -> tuple[list[SampleInput], dict[str, list[Array]] | None]:
    """Draw what a bundle is compared on: pictures that its encoder takes, its own targets.

    Args:
        manifest: of the bundle.
        reference: opens PyTorch's stages.
        pools_masks: whether masks are compared all together, and must then not be empty.
        seed: equal seeds give equal inputs.

    Returns:
        The samples, and the reference's outputs where they are known already.
    """
    width, count = manifest.policy.hidden_size, manifest.graphs[PRIOR].spec.targets.opt
    valid_region = manifest.graphs[IMAGE_ENCODER].spec.valid_region
    samples = sample_inputs(manifest.geometry, width, count, seed, valid_region=valid_region)
    if not pools_masks:
        return samples, None
    pictures = [sample.prepared for sample in samples]
    return draw_masked_samples(pictures, reference, width, count, seed)


def draw_masked_samples(
    pictures: Sequence[PreparedImage],
    reference: RunnerOpener,
    policy_hidden_size: int,
    num_targets: int = 1,
    seed: int = 0,
) -> tuple[list[SampleInput], dict[str, list[Array]]]:
    """Draw concentrations, and keep for each target the one with the most telling float32 mask.

    Args:
        pictures: what is asked about.
        reference: opens PyTorch's stages; the encoder runs once a picture.
        policy_hidden_size: D.
        num_targets: N, concentrations a picture.
        seed: equal seeds give equal inputs.

    Returns:
        One sample a picture, and the reference's outputs on the samples by graph, as
        :func:`coprs_deploy.export.equivalence.compare_stages` takes them.
    """
    generator = np.random.default_rng(seed)
    known: dict[str, list[Array]] = {IMAGE_ENCODER: [], PRIOR: [], MASK_DECODER: []}
    with reference(IMAGE_ENCODER) as encoder:
        for picture in pictures:
            embedding = encoder(image=picture.image)["image_embedding"].numpy()
            known[IMAGE_ENCODER].append(embedding)
    samples = []
    with reference(PRIOR) as prior, reference(MASK_DECODER) as decoder:
        for picture, embedding in zip(pictures, known[IMAGE_ENCODER], strict=True):
            best: list[NDArray[np.float32]] = [np.empty(0, np.float32)] * num_targets
            nearest = np.full(num_targets, np.inf)
            for _ in range(NUM_DRAWS):
                drawn = generator.standard_normal(
                    (num_targets, policy_hidden_size), dtype=np.float32
                )
                _, masks = _decode(prior, decoder, picture, embedding, drawn)
                distances = np.abs((masks > 0).mean(axis=(1, 2, 3)) - WANTED_SHARE)
                for target in np.flatnonzero(distances < nearest):
                    best[target], nearest[target] = drawn[target], distances[target]
            sample = SampleInput(picture, np.stack(best))
            priors, masks = _decode(prior, decoder, picture, embedding, sample.concentration)
            known[PRIOR].append(priors)
            known[MASK_DECODER].append(masks)
            samples.append(sample)
    return samples, known


def _decode(
    prior: Runner,
    decoder: Runner,
    picture: PreparedImage,
    embedding: Array,
    concentration: NDArray[np.float32],
) -> tuple[Array, Array]:
    priors = prior(image_embedding=embedding, concentration=concentration)["prior_logits"].numpy()
    masks = decoder(
        image_embedding=embedding, prior_logits=priors, unpadded_size=picture.unpadded_size
    )["mask_logits"].numpy()
    return priors, masks
