"""Limits on concurrent requests: on their number, and on the memory of their images."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO

from coprs_deploy.errors import CoPRSError, ImageSizeError, QueueFullError
from coprs_deploy.images import RgbArray, decoded_bytes, load_image
from coprs_deploy.policy.fair_lock import FairLock


class ConcurrencyLimit:
    """Counter of active requests that refuses those beyond the queue.

    Attributes:
        max_active: number of requests that may be running or queued.
        num_active: number of requests that are running or queued.
    """

    def __init__(self, concurrency: int, max_queue_size: int) -> None:
        self._concurrency = concurrency
        self._max_queue_size = max_queue_size
        self.max_active = concurrency + max_queue_size
        self.num_active = 0
        # Reentrant, because the garbage collector may end an abandoned stream at any time.
        self._lock = threading.RLock()

    @contextmanager
    def slot(self, count: int = 1) -> Iterator[None]:
        """Occupy a slot inside the block, or several that are free together.

        Raises:
            QueueFullError: fewer slots are free.
            ValueError: there are fewer slots.
        """
        if count > self.max_active:
            raise ValueError(
                f"the request has {count} instructions; accepted: at most {self.max_active}, which "
                "the policy and max_queue_size take at once; send fewer at a time"
            )
        with self._lock:
            if self.num_active + count > self.max_active:
                raise QueueFullError(self.full_message())
            self.num_active += count
        try:
            yield
        finally:
            with self._lock:
                self.num_active -= count

    def full_message(self) -> str:
        """Return the message of a full queue."""
        return (
            f"{self.num_active} requests are active: the policy serves {self._concurrency} at once "
            f"and max_queue_size is {self._max_queue_size}; retry later, or raise max_queue_size"
        )


NUM_IMAGE_CORES = max(1, len(os.sched_getaffinity(0)) // 2)
IMAGE_CORES = FairLock(NUM_IMAGE_CORES)
"""Half of the cores: they decode uploaded images and encode results, the others run requests."""

MAX_IMAGE_BYTES = 1 << 30
"""Memory of the decoded images of uploads; the largest image has a quarter of it."""

POLL_SECONDS = 0.2
"""Time after which a waiting request notices that it was abandoned or closed."""


class ImageMemory:
    """Bound of the memory of decoded images, which are waited for in the order of arrival.

    Args:
        max_bytes: size of the pixels that are in use at once; a single larger image is accepted.

    Attributes:
        used_bytes: size of the pixels in use.
    """

    def __init__(self, max_bytes: int = MAX_IMAGE_BYTES) -> None:
        self._max_bytes = max_bytes
        self.used_bytes = 0
        self._waiting: deque[object] = deque()
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, num_bytes: int, check: Callable[[], None]) -> Iterator[None]:
        """Occupy memory inside the block, when it is free.

        ``check`` is called while waiting; what it raises ends the wait.
        """
        ticket = object()
        with self._changed:
            self._waiting.append(ticket)
            try:
                while self._waiting[0] is not ticket or not self._fits(num_bytes):
                    check()
                    self._changed.wait(POLL_SECONDS)
                self.used_bytes += num_bytes
            finally:
                self._waiting.remove(ticket)
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self.used_bytes -= num_bytes
                self._changed.notify_all()

    def _fits(self, num_bytes: int) -> bool:
        return not self.used_bytes or self.used_bytes + num_bytes <= self._max_bytes


class UploadedImage:
    """Image file whose decoding waits for memory and for a core.

    The file may be on a disk; it is read when it is decoded.

    Attributes:
        decode_started: ``time.perf_counter()`` when it was decoded.
    """

    def __init__(self, file: IO[bytes], memory: ImageMemory) -> None:
        self._file = file
        self._memory = memory
        self._is_abandoned = False
        self._arrived = time.perf_counter()
        self._rgb: RgbArray | None = None
        self.decode_started = self._arrived

    @property
    def waited_ms(self) -> float:
        """Time from its arrival to its decoding."""
        return 1e3 * (self.decode_started - self._arrived)

    @property
    def rgb(self) -> RgbArray:
        """(H, W, 3) uint8, once it was decoded."""
        assert self._rgb is not None, "it is decoded before the first event"
        return self._rgb

    @contextmanager
    def in_memory(self, check: Callable[[], None]) -> Iterator[None]:
        """Occupy the memory of its pixels inside the block; see :meth:`ImageMemory.hold`."""

        def check_all() -> None:
            self._check_abandoned()
            check()

        with self._memory.hold(decoded_bytes(self._file), check_all):
            yield

    def check_size(self, max_pixels: int) -> None:
        """Check the number of its pixels, which its header tells, before it waits.

        Raises:
            ImageSizeError: it has more.
        """
        num_pixels = decoded_bytes(self._file) // 3
        if num_pixels > max_pixels:
            raise ImageSizeError(
                f"the image has {num_pixels:,} pixels; accepted: at most {max_pixels:,}; scale it "
                "down first"
            )

    def decode(self) -> RgbArray:
        """Decode it when a core is free.

        Raises:
            ImageError: it cannot be used.
            CoPRSError: the request was abandoned.
        """
        with IMAGE_CORES.hold():
            self._check_abandoned()
            self.decode_started = time.perf_counter()
            self._file.seek(0)
            self._rgb = load_image(self._file.read())
        return self._rgb

    def abandon(self) -> None:
        """End the wait."""
        self._is_abandoned = True

    def _check_abandoned(self) -> None:
        if self._is_abandoned:
            raise CoPRSError("the request was abandoned")
