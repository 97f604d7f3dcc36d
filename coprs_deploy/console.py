"""Tables for people."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

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
            f"{record.max_abs_error:.1e}",
            f"{record.relative_error:.1e}",
            f"{record.cosine:.8f}",
            "-" if record.mask_iou is None else f"{record.mask_iou:.5f}",
            str(record.inputs),
            "FAILED" if not record.passed else "ok" if record.has_tolerance else "not judged",
        )
        for record in records
    ]
    header = ("graph", "max abs", "relative_error", "cosine", "mask IoU", "inputs", "")
    return table(header, rows)


QUIET_SECONDS = 30
"""How long a step may say nothing in a log file."""


class StepPrinter:
    """Call it with the name of each step as it starts; leave the block when the last is done.

    On a terminal the running step is shown at once; elsewhere each step is one line when it ends.
    """

    def __init__(self) -> None:
        self._step = ""
        self._since = 0.0
        self._said = 0.0
        self._is_terminal = sys.stderr.isatty()

    def __call__(self, step: str) -> None:
        """End the running step and start another."""
        self._end("done")
        self._step, self._since = step, time.perf_counter()
        if self._is_terminal:
            print(f"  {step} ...", end="", file=sys.stderr, flush=True)

    def phase(self, text: str) -> None:
        """Show what the running step does right now; elsewhere than on a terminal, now and then."""
        now = time.perf_counter()
        if self._is_terminal:
            print(f"\r  {self._step}: {text:<60.60}", end="", file=sys.stderr, flush=True)
        elif now - max(self._since, self._said) >= QUIET_SECONDS:
            self._said = now
            print(f"  {self._step}: {text}", file=sys.stderr, flush=True)

    def note(self, line: str) -> None:
        """Print a line that stays."""
        start = f"\r{'':<80}\r" if self._is_terminal else ""
        print(f"{start}  {line}", file=sys.stderr, flush=True)

    def _end(self, word: str) -> None:
        if not self._step:
            return
        seconds = time.perf_counter() - self._since
        start = f"\r{'':<80}\r" if self._is_terminal else ""
        print(f"{start}  {self._step:<36} {word} {seconds:7.1f} s", file=sys.stderr, flush=True)
        self._step = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end("done" if kind is None else "stop")
