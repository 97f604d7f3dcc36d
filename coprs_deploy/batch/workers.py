"""Workers of a run on one machine: this process, or processes with a bundle each.

A policy on the CPU decodes one request at a time on few threads, so that small models are faster
in one process a core. A worker ends with the process that started it, however that ends.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol, Self

from coprs_deploy.batch.rows import InputRow, OutputRow
from coprs_deploy.batch.segment_batch import SegmentBatch
from coprs_deploy.bundle import Bundle
from coprs_deploy.closing import Closeable
from coprs_deploy.errors import CoPRSError
from coprs_deploy.runtime import RuntimeOptions

SMALL_BUNDLE_BYTES = 100_000_000
"""Size of a bundle of which each core has one by default."""

EXIT_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class WorkerSettings:
    """What a worker loads.

    Attributes:
        bundle: directory of the bundle; None is the demo model.
        runtime: where and how it runs.
        max_targets: maximum number of targets of a row.
        max_new_tokens: token budget of a response; None takes the checkpoint's.
        mask_folder: path or URL of a folder for a PNG of each mask; None saves none.
        num_ahead: number of rows that are prepared while the policy serves others.
    """

    bundle: Path | None
    runtime: RuntimeOptions
    max_targets: int = 1
    max_new_tokens: int | None = None
    mask_folder: str | None = None
    num_ahead: int = 1

    def open(self) -> SegmentBatch:
        """Load the bundle."""
        return SegmentBatch(
            self.bundle,
            self.runtime,
            max_targets=self.max_targets,
            max_new_tokens=self.max_new_tokens,
            mask_folder=self.mask_folder,
            num_ahead=self.num_ahead,
        )


def default_num_workers(bundle: Bundle, options: RuntimeOptions) -> int:
    """Return one worker a core for a small bundle on the CPU, else one."""
    if not options.is_on_cpu:
        return 1
    folders = [bundle.path]
    if (path := bundle.manifest.policy.path) is not None:
        folders.append(bundle.path / path)
    files = (file for folder in folders for file in folder.rglob("*") if file.is_file())
    is_small = sum(file.stat().st_size for file in files) < SMALL_BUNDLE_BYTES
    return len(os.sched_getaffinity(0)) if is_small else 1


class BatchWorkers(Protocol):
    """What segments lists of rows; a context manager that is closed at the end.

    Attributes:
        num_workers: how many lists it segments at once.
    """

    num_workers: int

    def submit(self, rows: Sequence[InputRow]) -> Future[list[OutputRow]]:
        """Segment rows when a worker is free; the future raises CoPRSError if the worker ended."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...


class Workers(Closeable):
    """Workers that segment lists of rows.

    Args:
        settings: what each of them loads.
        num_workers: number of workers; of several, each is a process and has its share of the
            cores, unless the options name a number of threads.

    Attributes:
        num_workers: how many lists are segmented at once.

    Raises:
        CoPRSError: the bundle cannot be loaded.
    """

    def __init__(self, settings: WorkerSettings, num_workers: int) -> None:
        self._local: SegmentBatch | None = None
        self._processes: list[_WorkerProcess] = []
        self._idle: SimpleQueue[_WorkerProcess] = SimpleQueue()
        if num_workers == 1:
            self._local = settings.open()
            # While the policy ends one list, the images of the next are decoded and encoded.
            num_workers = 2 if self._local.segments_together else 1
        else:
            self._start(settings, num_workers)
        self.num_workers = num_workers
        self._pool = ThreadPoolExecutor(num_workers, thread_name_prefix="worker")

    def submit(self, rows: Sequence[InputRow]) -> Future[list[OutputRow]]:
        """Segment rows when a worker is free.

        The future raises CoPRSError if the worker ended.
        """
        return self._pool.submit(self._run, list(rows))

    def close(self) -> None:
        """End the workers; tasks that have not started are cancelled."""
        for process in self._processes:
            process.end()
        self._pool.shutdown(cancel_futures=True)
        if self._local is not None:
            self._local.close()

    def _start(self, settings: WorkerSettings, num_workers: int) -> None:
        runtime = settings.runtime
        if runtime.num_threads is None:
            share = max(1, len(os.sched_getaffinity(0)) // num_workers)
            runtime = replace(runtime, num_threads=share)
        if runtime.device_type == "cpu":  # the cores are busy without it
            settings = replace(settings, num_ahead=0)
        settings = replace(settings, runtime=runtime)
        try:
            # The first one may measure the fastest runtimes, which the others read.
            self._processes.append(_WorkerProcess(settings))
            self._processes[0].wait_until_loaded()
            self._processes += [_WorkerProcess(settings) for _ in range(num_workers - 1)]
            for process in self._processes[1:]:
                process.wait_until_loaded()
        except BaseException:
            for process in self._processes:
                process.end()
            raise
        for process in self._processes:
            self._idle.put(process)

    def _run(self, rows: list[InputRow]) -> list[OutputRow]:
        if self._local is not None:
            return self._local(rows)
        process = self._idle.get()
        try:
            return process.segment(rows)
        finally:
            self._idle.put(process)


class _WorkerProcess:
    """A process with a loaded bundle."""

    def __init__(self, settings: WorkerSettings) -> None:
        context = get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process: SpawnProcess = context.Process(
            target=_work, args=(theirs, settings), daemon=True, name="batch-worker"
        )
        self._process.start()
        theirs.close()  # so that its end is seen

    def wait_until_loaded(self) -> None:
        """Wait for the bundle; CoPRSError if it cannot be loaded."""
        error: CoPRSError | None = self._receive()
        if error is not None:
            raise error

    def segment(self, rows: list[InputRow]) -> list[OutputRow]:
        """Segment rows; CoPRSError if the process ended."""
        with suppress(BrokenPipeError):  # reported by the next line
            self._connection.send(rows)
        found: list[OutputRow] = self._receive()
        return found

    def end(self) -> None:
        """End the process at once."""
        self._process.kill()
        self._process.join(EXIT_TIMEOUT_S)

    def _receive(self) -> Any:
        try:
            return self._connection.recv()
        except (EOFError, ConnectionResetError) as error:
            self._process.join(EXIT_TIMEOUT_S)
            raise CoPRSError(
                f"a worker process ended with exit code {self._process.exitcode}; finished parts "
                "are kept: pass --resume to go on, with fewer --workers if memory was short"
            ) from error


def _work(connection: Connection, settings: WorkerSettings) -> None:
    """Run a worker process until its parent closes the connection, or ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    try:
        batch = settings.open()
    except CoPRSError as error:
        connection.send(CoPRSError(str(error)))
        return
    connection.send(None)
    with batch, suppress(EOFError, ConnectionError):
        while True:
            connection.send(batch(connection.recv()))
