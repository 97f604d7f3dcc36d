"""Tables that several verbs print."""

from __future__ import annotations

from collections.abc import Sequence

from coprs_deploy.bundle import EquivalenceRecord
from coprs_deploy.console import table


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
