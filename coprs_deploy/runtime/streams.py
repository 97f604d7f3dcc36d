"""Streams in threads: one for an event loop, or several at once."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from queue import SimpleQueue
from typing import TypeVar

from coprs_deploy.errors import CoPRSError

T = TypeVar("T")


async def in_thread(
    events: Generator[T, None, None], abandon: Callable[[], None]
) -> AsyncGenerator[T, None]:
    """Run a generator in a thread of its own.

    Args:
        events: the generator; closed at the end.
        abandon: called at the end, so that a step that waits can end.

    Yields:
        What the generator yields.
    """
    loop = asyncio.get_running_loop()
    thread = ThreadPoolExecutor(1, thread_name_prefix="stream")
    try:
        while (event := await loop.run_in_executor(thread, next, events, None)) is not None:
            yield event
    finally:
        abandon()
        # Close in the same thread, after the running step: a generator cannot be closed while it
        # runs. The event loop must not wait for it.
        thread.submit(events.close)
        thread.shutdown(wait=False)


def interleave(
    starts: Sequence[Callable[[], Generator[T, None, None]]],
    num_threads: int,
    abandoned: threading.Event,
) -> Generator[tuple[int, T | CoPRSError | ValueError], None, None]:
    """Run streams, at most ``num_threads`` at once, and yield their events.

    Args:
        starts: functions that begin a stream; each is called in the thread of its stream.
        num_threads: number of streams that run at once.
        abandoned: set at the end, so that no stream goes on.

    Yields:
        Index of the stream, and its event. A ``CoPRSError`` or ``ValueError`` of a stream is its
        last event; another error raises, and ends the others. Closing the generator waits for the
        running step of each stream.
    """
    events: SimpleQueue[tuple[int, T | CoPRSError | ValueError] | Future[None]] = SimpleQueue()

    def run(index: int) -> None:
        if abandoned.is_set():
            return
        try:
            with closing(starts[index]()) as stream:
                for event in stream:
                    if abandoned.is_set():
                        return
                    events.put((index, event))
        except (CoPRSError, ValueError) as error:
            events.put((index, error))
        except BaseException:
            abandoned.set()  # the next stream does not begin
            raise

    num_threads = max(1, min(num_threads, len(starts)))
    with ThreadPoolExecutor(num_threads, thread_name_prefix="instruction") as pool:
        running = [pool.submit(run, index) for index in range(len(starts))]
        try:
            for future in running:
                future.add_done_callback(events.put)
            num_left = len(running)
            while num_left:
                event = events.get()
                if isinstance(event, Future):
                    event.result()
                    num_left -= 1
                else:
                    yield event
        finally:
            abandoned.set()
            for future in running:
                future.cancel()
