"""What an encoder that drops the padding changes: measured and shown, for no tolerance knows it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import msgspec
import numpy as np

from coprs_deploy.bundle import EquivalenceRecord
from coprs_deploy.checkpoint import Checkpoint
from coprs_deploy.engines.runner import Array
from coprs_deploy.export.equivalence import SampleInput, Tolerance, reference_opener, summarize
from coprs_deploy.export.mask_samples import draw_masked_samples
from coprs_deploy.images import PreparedImage
from coprs_deploy.specs import IMAGE_ENCODER, MASK_DECODER, PRIOR, Geometry, GraphSpec

WITHOUT_PADDING = "without_padding"
"""Name of the record, beside those of graphs."""

NOT_JUDGED = Tolerance(
    math.inf,
    math.inf,
    -1.0,
    0.0,
    "another function on purpose; whether its masks are good is for pictures of its use to say",
    pools_masks=True,
)


def measure_dropped_padding(
    checkpoint: Checkpoint, specs: Mapping[str, GraphSpec], samples: Sequence[SampleInput]
) -> EquivalenceRecord:
    """Compare masks with those of the encoder that sees the padding; both in PyTorch, in float32.

    Args:
        checkpoint: the weights.
        specs: of the graphs, whose encoder drops the padding.
        samples: pictures; concentrations with telling masks are drawn for them.

    Returns:
        The record of the masks' logits inside the pictures; its mask IoU is of all together.
    """
    encoder = specs[IMAGE_ENCODER]
    whole = {**specs, IMAGE_ENCODER: msgspec.structs.replace(encoder, extent=None)}
    _, width = specs[PRIOR].inputs[1].shape
    assert isinstance(width, int)
    asked, known = draw_masked_samples(
        [sample.prepared for sample in samples],
        reference_opener(checkpoint, whole),
        width,
        specs[PRIOR].targets.preferred,
    )
    dropping, geometry = reference_opener(checkpoint, specs), checkpoint.config.model.geometry
    found, wanted = list[Array](), list[Array]()
    with (
        dropping(IMAGE_ENCODER) as encode,
        dropping(PRIOR) as prior,
        dropping(MASK_DECODER) as mask,
    ):
        for sample, whole_mask in zip(asked, known[MASK_DECODER], strict=True):
            embedding = encode(image=sample.prepared.image)["image_embedding"]
            priors = prior(image_embedding=embedding, concentration=sample.concentration)
            masks = mask(
                image_embedding=embedding,
                prior_logits=priors["prior_logits"],
                unpadded_size=sample.prepared.unpadded_size,
            )
            found.append(_inside(masks["mask_logits"].numpy(), sample.prepared, geometry))
            wanted.append(_inside(whole_mask, sample.prepared, geometry))
    return summarize(WITHOUT_PADDING, found, wanted, NOT_JUDGED)


def _inside(logits: Array, prepared: PreparedImage, geometry: Geometry) -> Array:
    """The cells that belong to the picture, in a row."""
    rows, columns = -(-prepared.unpadded_size // geometry.mask_stride)
    inside: Array = logits[..., :rows, :columns]
    return np.ravel(inside)
