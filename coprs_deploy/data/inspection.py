"""Inspection of a source: sizes and invalid examples by decoding it, known counts without that."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from coprs_deploy.data.examples import Example, ExampleSource, RowProblem
from coprs_deploy.data.readers.known_counts import KNOWN_COUNTS, SplitCounts, split_with
from coprs_deploy.data.readers.reasonseg import ReasonSegExamples
from coprs_deploy.data.readers.registry import image_files
from coprs_deploy.data.rows import FieldError
from coprs_deploy.data.selection import image_names

SHEET_EXAMPLES = 24
"""Examples of a contact sheet."""


@dataclass(frozen=True)
class Spread:
    """Smallest, median and largest of some values.

    Attributes:
        least: smallest value.
        median: median.
        most: largest value.
    """

    least: float
    median: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Compute the spread of at least one value."""
        return cls(float(min(values)), float(np.median(values)), float(max(values)))

    def __str__(self) -> str:
        return " / ".join(f"{value:,.4g}" for value in (self.least, self.median, self.most))


@dataclass(frozen=True)
class Inspection:
    """What a source holds.

    Attributes:
        source: name of the source.
        num_rows: number of rows, invalid ones included.
        num_examples: number of examples.
        num_decoded: number of examples that were decoded.
        num_images: number of distinct images.
        targets: number of examples by their number of targets.
        question_types: number of examples by question type.
        num_with_ignore_mask: number of decoded examples with an ignore mask.
        sizes: spreads of image width and height in pixels, the share of the image that the
            targets cover, and the words of the instruction; empty if nothing was decoded.
        images: how many image files were found, and where; empty if images are in the rows.
        problems: invalid rows and examples.
    """

    source: str
    num_rows: int
    num_examples: int
    num_decoded: int
    num_images: int
    targets: dict[int, int]
    question_types: dict[str, int]
    num_with_ignore_mask: int
    sizes: dict[str, Spread]
    images: str
    problems: list[RowProblem]

    def to_json(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


@dataclass
class _Sizes:
    """Values of the decoded examples."""

    width_px: list[float] = field(default_factory=list)
    height_px: list[float] = field(default_factory=list)
    target_share: list[float] = field(default_factory=list)
    words: list[float] = field(default_factory=list)
    num_with_ignore_mask: int = 0

    def add(self, example: Example) -> None:
        height, width = example.image.shape[:2]
        self.width_px.append(width)
        self.height_px.append(height)
        if len(example.masks):
            self.target_share.append(float(np.any(example.masks, axis=0).mean()))
        self.words.append(len(example.instruction.split()))
        self.num_with_ignore_mask += example.ignore_mask is not None


def inspect_source(
    source: ExampleSource,
    num_examples: int | None = None,
    *,
    sheet: list[Example] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Inspection:
    """Decode the examples of a source and describe them.

    Args:
        source: the source.
        num_examples: decode only this number of examples, evenly spaced; None decodes all.
        sheet: receives ``SHEET_EXAMPLES`` of the valid examples, evenly spaced.
        on_progress: called with the numbers of examples that are done and to do.
    """
    total = len(source) if num_examples is None else min(num_examples, len(source))
    chosen = np.linspace(0, len(source) - 1, total).astype(int).tolist() if total else []
    shown = set(np.linspace(0, total - 1, min(SHEET_EXAMPLES, total)).astype(int).tolist())
    problems, sizes = list(source.problems), _Sizes()
    for number, index in enumerate(chosen):
        try:
            example = source.read(index)
        except FieldError as error:
            problems.append(RowProblem(index + 1, error.field, str(error)))
        else:
            if len(example.masks) != source.num_targets[index]:
                lost = source.num_targets[index] - len(example.masks)
                reason = f"{lost} of {source.num_targets[index]} masks cover no pixel"
                problems.append(RowProblem(index + 1, "masks", reason))
            sizes.add(example)
            if sheet is not None and number in shown:
                sheet.append(example)
        if on_progress is not None:
            on_progress(number + 1, total)
    files = image_files(source)
    names = ("width_px", "height_px", "target_share", "words")
    return Inspection(
        source=source.description,
        num_rows=source.num_rows,
        num_examples=len(source),
        num_decoded=total,
        num_images=len(image_names(source)),
        targets=dict(sorted(Counter(source.num_targets).items())),
        question_types=dict(sorted(Counter(source.question_types).items())),
        num_with_ignore_mask=sizes.num_with_ignore_mask,
        sizes={name: Spread.of(getattr(sizes, name)) for name in names if getattr(sizes, name)},
        images="" if files is None else files.report(),
        problems=problems,
    )


@dataclass(frozen=True)
class Check:
    """Result of comparing a source with what is known about it.

    Attributes:
        source: name of the source.
        found: its size.
        known: its known size; None if nothing is known.
        failures: what is wrong; empty if it is complete.
    """

    source: str
    found: SplitCounts
    known: SplitCounts | None
    failures: tuple[str, ...]

    def __str__(self) -> str:
        numbers = ", ".join(f"{n:,} {name}" for name, n in asdict(self.found).items() if n)
        if self.failures:
            return f"{self.source}: incomplete or wrong ({'; '.join(self.failures)})"
        verdict = "complete" if self.known else "readable; its size is not known"
        return f"{self.source}: {verdict} ({numbers})"


def check_source(source: ExampleSource) -> Check:
    """Compare the counts of a source with the known ones, and look for missing images.

    Nothing is decoded; the source must have been opened with all sentences.
    """
    found = _counts(source)
    known = KNOWN_COUNTS.get(source.description)
    failures = known.differences(found) if known else []
    other = split_with(found)
    if failures and other and other != source.description:
        failures.append(f"these are the counts of {other}")
    files = image_files(source)
    if files is not None and files.missing:
        failures.append(files.report())
    if files is not None and (empty := files.empty()):
        failures.append(f"{len(empty):,} image files are empty, {empty[0]} first")
    if source.problems:
        failures.append(f"{len(source.problems):,} invalid rows, the first is {source.problems[0]}")
    return Check(source.description, found, known, tuple(failures))


def _counts(source: ExampleSource) -> SplitCounts:
    refs = getattr(source, "num_refs", None)
    if isinstance(source, ReasonSegExamples):
        return SplitCounts(images=source.num_images)
    return SplitCounts(refs, source.num_rows, len(image_names(source)))
