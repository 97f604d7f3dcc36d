"""Tables that several verbs print."""

from __future__ import annotations

from collections.abc import Sequence

from coprs_deploy.bundle import EquivalenceRecord
from coprs_deploy.console import table
from coprs_deploy.export.encoder_swap import ImageMovement


def equivalence_table(records: Sequence[EquivalenceRecord]) -> str:
    """Return the measured difference of each graph from PyTorch in float32, one row a graph."""
    rows = [
        (
            record.graph,
            f"{record.max_abs_error:.1e}",
            f"{record.relative_error:.1e}",
            f"{record.cosine:.8f}",
            "-" if record.mask_iou is None else f"{record.mask_iou:.5f}",
            str(record.inputs),
            "FAILED" if not record.passed else "ok" if record.has_tolerance else "no tolerance",
        )
        for record in records
    ]
    return table(("graph", "max abs", "relative", "cosine", "mask IoU", "inputs", ""), rows)


def movement_table(images: Sequence[ImageMovement], mean: ImageMovement) -> str:
    """Return how far embedding, prior and masks move with another image encoder, by image."""
    rows = [
        (
            moved.image,
            f"{moved.embedding_error:.3f}",
            f"{moved.embedding_cosine:.4f}",
            f"{moved.prior_error:.4f}",
            f"{moved.mask_iou:.4f}",
        )
        for moved in (*images, mean)
    ]
    return table(("image", "embedding error", "cosine", "prior error", "mask IoU"), rows)
