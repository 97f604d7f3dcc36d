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
from coprs_deploy.images import mask_cells
from coprs_deploy.specs import IMAGE_ENCODER, MASK_DECODER, PRIOR, GraphSpec

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
    checkpoint: Checkpoint,
    specs: Mapping[str, GraphSpec],
    samples: Sequence[SampleInput],
    embeddings: Sequence[Array],
) -> EquivalenceRecord:
    """Compare masks with those of the encoder that sees the padding; both in PyTorch, in float32.

    Args:
        checkpoint: the weights.
        specs: of the graphs, whose encoder drops the padding.
        samples: pictures; concentrations with telling masks are drawn for them.
        embeddings: what PyTorch's encoder without padding gave for each.

    Returns:
        The record of the masks' logits inside the pictures; its mask IoU is of all together.
    """
    whole = msgspec.structs.replace(specs[IMAGE_ENCODER], extent=None)
    opener = reference_opener(checkpoint, {**specs, IMAGE_ENCODER: whole})
    _, width = specs[PRIOR].inputs[1].shape
    assert isinstance(width, int)
    asked, known = draw_masked_samples(
        [sample.prepared for sample in samples], opener, width, specs[PRIOR].targets.preferred
    )
    geometry = checkpoint.config.model.geometry
    found, wanted = list[Array](), list[Array]()
    with opener(PRIOR) as prior, opener(MASK_DECODER) as decoder:
        for sample, embedding, expected in zip(asked, embeddings, known[MASK_DECODER], strict=True):
            priors = prior(image_embedding=embedding, concentration=sample.concentration)
            masks = decoder(
                image_embedding=embedding,
                prior_logits=priors["prior_logits"],
                unpadded_size=sample.prepared.unpadded_size,
            )
            height, width = mask_cells(sample.prepared.unpadded_size, geometry)
            found.append(np.ravel(masks["mask_logits"].numpy()[..., :height, :width]))
            wanted.append(np.ravel(expected[..., :height, :width]))
    return summarize(WITHOUT_PADDING, found, wanted, NOT_JUDGED)
