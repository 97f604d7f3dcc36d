"""Tables for people."""

from __future__ import annotations

from collections.abc import Sequence

from coprs_deploy.bundle import EquivalenceRecord


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out rows in columns; the first column is aligned left, the others right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = (
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in (header, *rows)
    )
    return "\n".join(line.rstrip() for line in lines)


def equivalence_table(records: Sequence[EquivalenceRecord]) -> str:
    """Show how far each graph is from PyTorch in float32."""
    rows = [
        (
            record.graph,
            f"{record.max_abs:.1e}",
            f"{record.relative:.1e}",
            f"{record.cosine:.8f}",
            "-" if record.mask_iou is None else f"{record.mask_iou:.5f}",
            str(record.inputs),
            "FAILED" if not record.passed else "ok" if record.judged else "not judged",
        )
        for record in records
    ]
    header = ("graph", "max abs", "relative", "cosine", "mask IoU", "inputs", "")
    return table(header, rows)
