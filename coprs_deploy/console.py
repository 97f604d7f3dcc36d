"""Tables and progress for people, drawn with rich."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Sequence
from typing import Self

from rich.console import Console
from rich.status import Status
from rich.table import Table
from rich.text import Text

QUIET_SECONDS = 30
"""Longest silence of a step in a log file."""


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows as the lines of a Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    return lines + [
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows
    ]


def format_ms(value: float) -> str:
    """Format milliseconds with three digits and a unit."""
    if value >= 10_000:
        return f"{value / 1e3:.1f} s"
    if value >= 1000:
        return f"{value / 1e3:.2f} s"
    return f"{value:.0f} ms" if value >= 100 else f"{value:.3g} ms"


def format_bytes(value: float) -> str:
    """Format a size in megabytes or gigabytes."""
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.0f} MB"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return rows as text in columns; the first column is left-aligned, the others right."""
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="")
    for number, name in enumerate(header):
        grid.add_column(Text(name), justify="right" if number else "left", no_wrap=True)
    for row in rows:
        grid.add_row(*map(Text, row))
    width = sum(max(len(row[i]) for row in (header, *rows)) + 2 for i in range(len(header)))
    console = Console(file=io.StringIO(), width=width, color_system=None)
    with console.capture() as captured:
        console.print(grid)
    return "\n".join(line.rstrip() for line in captured.get().rstrip("\n").split("\n"))


class StepPrinter:
    """Progress of a job on stderr: call it with the name of each step as the step starts.

    On a terminal the running step is shown with a spinner; elsewhere a step is one line, written
    when it ends. Leave the ``with`` block when the last step is done.
    """

    def __init__(self) -> None:
        self._step = ""
        self._since = 0.0
        self._last_line = 0.0
        self._status: Status | None = None
        if sys.stderr.isatty():
            self._status = Console(stderr=True, highlight=False).status("")

    def __call__(self, step: str) -> None:
        """End the running step and start another."""
        self._end("done")
        self._step, self._since = step, time.perf_counter()
        if self._status is not None:
            self._status.update(Text(step))  # a plain string would be read as markup
            self._status.start()

    def progress(self, text: str) -> None:
        """Show what the running step is doing; elsewhere than on a terminal, every 30 seconds."""
        now = time.perf_counter()
        if self._status is not None:
            self._status.update(Text(f"{self._step}: {text}"))
        elif now - max(self._since, self._last_line) >= QUIET_SECONDS:
            self._last_line = now
            self.note(f"{self._step}: {text}")

    def note(self, line: str) -> None:
        """Print a line that stays."""
        if self._status is not None:
            self._status.console.print(f"  {line}", markup=False)
        else:
            print(f"  {line}", file=sys.stderr, flush=True)

    def _end(self, outcome: str) -> None:
        if self._step:
            seconds = time.perf_counter() - self._since
            self.note(f"{self._step:<36} {outcome} {seconds:7.1f} s")
        self._step = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._status is not None:
            self._status.stop()
        self._end("done" if kind is None else "failed")
