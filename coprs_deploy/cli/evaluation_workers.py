"""Evaluation of data sets with a bundle, in this process or in several.

Each worker process opens the bundle, takes its share of the images, and sends rows as they are
finished; this process alone writes them.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, TypeAlias

from coprs_deploy.cli.runtime_arguments import open_runtime
from coprs_deploy.errors import CoPRSError, ImageSizeError
from coprs_deploy.evaluation.rows import EvaluationRow, decode_row, encode_row
from coprs_deploy.evaluation.runner import EvaluationTask, evaluate_rows
from coprs_deploy.runtime import CoPRS, RuntimeOptions

Share: TypeAlias = list[tuple[int, list[int]]]
"""Number of a task and positions of its examples, in the order in which they are evaluated."""

TaskRows: TypeAlias = Generator[tuple[int, EvaluationRow], None, None]
"""Rows with the number of their task."""

STOP_SECONDS = 10.0
"""Time that a worker has to close its bundle before it is killed."""


@dataclass(frozen=True)
class EvaluationJob:
    """What a worker needs.

    Attributes:
        bundle: bundle directory; None is the demo model.
        options: where and how it runs.
        tasks: the data sets.
    """

    bundle: Path | None
    options: RuntimeOptions
    tasks: Sequence[EvaluationTask]

    def run_shares(self, shares: Sequence[Share], on_ready: Callable[[str], None]) -> TaskRows:
        """Run shares, a single one in this process; arguments and errors as in the others."""
        if len(shares) > 1:
            yield from self._run_processes(shares, on_ready)
        for share in shares if len(shares) == 1 else ():
            yield from self.run(share, on_ready)

    def run(self, share: Share, on_ready: Callable[[str], None]) -> TaskRows:
        """Open the bundle and yield the number of the task and the row of each example.

        Args:
            share: the examples.
            on_ready: called with a description of the runtime when it is open.

        Raises:
            ImageSizeError: the bundle does not accept the first image of a data set.
        """
        with self.open() as coprs:
            for number, indices in share:
                _check_first_image(coprs, self.tasks[number], indices[0])
            on_ready(coprs.description)
            for number, indices in share:
                task = self.tasks[number]
                for row in evaluate_rows(task, indices, coprs.segment, coprs.concurrency):
                    yield number, row

    def open(self) -> CoPRS:
        """Open the bundle in this process."""
        return open_runtime(self.bundle, self.options)

    def _run_processes(self, shares: Sequence[Share], on_ready: Callable[[str], None]) -> TaskRows:
        """Run each share in a process of its own and yield rows in the order of completion.

        The first worker opens the bundle alone: what it measures to choose runtimes is not
        disturbed, and the others find it cached.

        Raises:
            CoPRSError: a worker failed or was killed; the others are stopped.
        """
        workers: dict[Connection, SpawnProcess] = {}
        running: dict[Connection, SpawnProcess] = {}

        def start(number: int) -> None:
            options = worker_options(self.options, number, len(shares))
            receiver, process = _start(replace(self, options=options), shares[number])
            workers[receiver] = running[receiver] = process

        try:
            start(0)
            while running:
                arrived = wait(list(running))
                for receiver in [each for each in running if each in arrived]:
                    message = _receive(receiver)
                    if message is None:
                        process = running.pop(receiver)
                        process.join()
                        _check_exit(process.exitcode)
                    elif isinstance(message[1], bytes):
                        yield message[0], decode_row(message[1])
                    elif message[0] == _READY:
                        on_ready(message[1])
                        if len(workers) == 1:
                            for number in range(1, len(shares)):
                                start(number)
                    else:
                        raise CoPRSError(f"a worker failed with {message[1]}")
        finally:
            for process in workers.values():
                process.terminate()
            for process in workers.values():
                process.join(STOP_SECONDS)
                process.kill()
                process.join()


_READY, _FAILED = -1, -2


def make_shares(pending: Sequence[tuple[int, list[list[int]]]], num_workers: int) -> list[Share]:
    """Distribute the images of each task over workers, in turn; workers without any are left out.

    Args:
        pending: number of a task, and the positions of its examples by image.
        num_workers: number of shares.
    """
    shares: list[Share] = []
    for worker in range(num_workers):
        share = [
            (number, [index for group in groups[worker::num_workers] for index in group])
            for number, groups in pending
        ]
        shares.append([(number, indices) for number, indices in share if indices])
    return [share for share in shares if share]


def worker_options(options: RuntimeOptions, number: int, num_workers: int) -> RuntimeOptions:
    """Return the options of a worker: a GPU of its own, or its part of the CPU's cores.

    ``cuda`` becomes ``cuda:N`` for worker N; a device with a number is used by all workers.
    """
    if num_workers == 1:
        return options
    changed: dict[str, Any] = {}
    for name in ("device", "policy_device"):
        if getattr(options, name) == "cuda":
            changed[name] = f"cuda:{number}"
    if options.device == "cpu" and options.num_threads is None:
        changed["num_threads"] = max(1, len(os.sched_getaffinity(0)) // num_workers)
    return replace(options, **changed)


def _start(job: EvaluationJob, share: Share) -> tuple[Connection, SpawnProcess]:
    """Start a worker; return the end of the pipe that receives its rows."""
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(sender, job, share))
    # A worker, be it still importing, leaves Ctrl-C to this process, which ends the workers.
    masked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, masked)
    sender.close()  # so that the end of the worker closes the pipe
    return receiver, process


def _work(connection: Connection, job: EvaluationJob, share: Share) -> None:
    """Send the rows of a share; ends when the receiver is gone."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # closes the bundle

    def on_ready(description: str) -> None:
        connection.send((_READY, description))

    try:
        for number, row in job.run(share, on_ready):
            connection.send((number, encode_row(row)))
    except BrokenPipeError:
        return
    except Exception as error:
        connection.send((_FAILED, f"{type(error).__name__}: {error}"))
        if not isinstance(error, CoPRSError):
            raise


def _receive(connection: Connection) -> tuple[int, Any] | None:
    """Return the next message; None at the end."""
    try:
        message: tuple[int, Any] = connection.recv()
    except (EOFError, ConnectionResetError):
        return None
    return message


def _check_exit(code: int | None) -> None:
    if code:
        raise CoPRSError(
            f"a worker ended with exit code {code}"
            + (": it was killed, perhaps for its memory; use fewer workers" if code < 0 else "")
        )


def _check_first_image(coprs: CoPRS, task: EvaluationTask, index: int) -> None:
    """Refuse a data set before the first prediction if the bundle takes other image shapes."""
    try:
        image = task.examples[index].image
    except CoPRSError:
        return  # a failed row
    try:
        coprs.check_image(image)
    except ImageSizeError as error:
        raise ImageSizeError(
            f"the bundle does not accept the first image of {task.name}: {error}. Synthetic scenes "
            "are square: evaluate a bundle with a fixed aspect ratio on a --dataset of that aspect "
            "ratio"
        ) from error
