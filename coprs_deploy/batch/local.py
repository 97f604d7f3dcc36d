"""The run of a batch: part by part, by the workers of this machine or of a cluster."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

from coprs_deploy.batch.manifest import BatchOutput
from coprs_deploy.batch.rows import InputRow, OutputRow
from coprs_deploy.batch.segment_batch import group_by_image
from coprs_deploy.batch.sources import RowSource
from coprs_deploy.batch.workers import BatchWorkers, Workers, WorkerSettings

ROWS_PER_TASK = 16
"""Rows of a task, unless more are on its last image."""

OnProgress: TypeAlias = Callable[[int, int], None]
"""Takes the number of rows that this run has done, and has to do."""


@dataclass
class BatchSummary:
    """Outcome of a run.

    Attributes:
        num_rows: number of rows of the source.
        num_failed: number of rows with an error, of earlier runs included.
        num_kept: number of rows of earlier runs.
        num_done: number of rows that this run segmented.
        seconds: duration of this run, without loading.
        errors: first error of each kind, with the number of rows of this run that have it.
    """

    num_rows: int
    num_failed: int = 0
    num_kept: int = 0
    num_done: int = 0
    seconds: float = 0.0
    errors: dict[str, tuple[int, str]] = field(default_factory=dict)

    @property
    def rows_per_second(self) -> float:
        """Rows of this run per second."""
        return self.num_done / self.seconds if self.seconds else 0.0

    def add(self, rows: Sequence[OutputRow]) -> None:
        """Count rows that this run segmented."""
        self.num_done += len(rows)
        for row in rows:
            if row.error:
                count, first = self.errors.get(row.error_type, (0, f"row {row.row}: {row.error}"))
                self.errors[row.error_type] = (count + 1, first)


def run_rows(
    source: RowSource,
    output: BatchOutput,
    open_workers: Callable[[], BatchWorkers],
    *,
    retry_failed: bool = False,
    on_progress: OnProgress = lambda done, total: None,
) -> BatchSummary:
    """Segment the rows that an output folder lacks.

    Args:
        source: the rows.
        output: the folder, opened.
        open_workers: opens what segments the rows, if there are any.
        retry_failed: also repeat rows that failed in an earlier run.
        on_progress: called after each task.

    Returns:
        The outcome; every part exists.

    Raises:
        CoPRSError: the bundle cannot be loaded, or a worker process ended; finished parts are kept.
        OSError: a part cannot be written.
    """
    summary = BatchSummary(len(source))
    failed = output.count_failed()
    missing = set(range(output.manifest.num_parts)) - failed.keys()
    repeated = {part for part, count in failed.items() if retry_failed and count}
    total = sum(len(output.part_rows(part)) for part in missing)
    total += sum(failed[part] for part in repeated)
    summary.num_kept = summary.num_rows - total
    summary.num_failed = sum(count for part, count in failed.items() if part not in repeated)
    if not total:
        return summary
    with open_workers() as workers:
        tasks_per_part = -(-output.manifest.rows_per_file // ROWS_PER_TASK)
        # So many are read before the one that is finished next that no worker waits.
        parts_ahead = -(-2 * workers.num_workers // tasks_per_part)
        start = time.perf_counter()
        running: deque[_Part] = deque()

        def finish() -> None:
            part = running.popleft()
            rows = list(part.kept)
            for task in part.tasks:
                done = task.result()
                rows += done
                summary.add(done)
                on_progress(summary.num_done, total)
            summary.num_failed += sum(bool(row.error) for row in rows)
            output.write_part(part.number, sorted(rows, key=lambda row: row.row))

        for number, rows in _parts(source, output.manifest.rows_per_file):
            if number not in missing | repeated:
                continue
            kept: list[OutputRow] = []
            if number in repeated:
                kept = [row for row in output.read_part(number) if not row.error]
            done = {row.row for row in kept}
            tasks = [workers.submit(task) for task in _tasks(rows, done)]
            running.append(_Part(number, kept, tasks))
            if len(running) > parts_ahead:
                finish()
        while running:
            finish()
        summary.seconds = time.perf_counter() - start
    return summary


def run_local(
    source: RowSource,
    output: BatchOutput,
    settings: WorkerSettings,
    num_workers: int,
    *,
    retry_failed: bool = False,
    on_progress: OnProgress = lambda done, total: None,
) -> BatchSummary:
    """Segment the rows that an output folder lacks on this machine; see :func:`run_rows`.

    Args:
        source: the rows.
        output: the folder, opened.
        settings: what each worker loads.
        num_workers: number of workers.
        retry_failed: also repeat rows that failed in an earlier run.
        on_progress: called after each task.
    """
    workers = partial(Workers, settings, num_workers)
    return run_rows(source, output, workers, retry_failed=retry_failed, on_progress=on_progress)


@dataclass(frozen=True)
class _Part:
    """A part that is being segmented.

    Attributes:
        number: number of the part.
        kept: rows of an earlier run that are not repeated.
        tasks: the other rows.
    """

    number: int
    kept: list[OutputRow]
    tasks: list[Future[list[OutputRow]]]


def _parts(source: RowSource, size: int) -> Iterator[tuple[int, list[InputRow]]]:
    """Yield the rows of each part with its number."""
    rows = iter(source)
    for number in itertools.count():
        part = list(itertools.islice(rows, size))
        if not part:
            return
        yield number, part


def _tasks(rows: Sequence[InputRow], done: set[int]) -> Iterator[list[InputRow]]:
    """Divide the rows that are not done into tasks; all rows on an image belong to one task."""
    task: list[InputRow] = []
    for group in group_by_image([row for row in rows if row.row not in done]).values():
        task += group
        if len(task) >= ROWS_PER_TASK:
            yield task
            task = []
    if task:
        yield task
