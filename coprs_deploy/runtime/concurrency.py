"""Limit on concurrent requests: those that the policy serves at once, and a queue behind them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from coprs_deploy.errors import QueueFullError


class ConcurrencyLimit:
    """Counter of active requests that refuses those beyond the queue.

    Attributes:
        num_active: number of requests that are running or queued.
    """

    def __init__(self, concurrency: int, max_queue_size: int) -> None:
        self._concurrency = concurrency
        self._max_queue_size = max_queue_size
        self.num_active = 0
        self._lock = threading.Lock()

    @contextmanager
    def slot(self) -> Iterator[None]:
        """Occupy a slot inside the block.

        Raises:
            QueueFullError: no slot is free.
        """
        with self._lock:
            if self.num_active >= self._concurrency + self._max_queue_size:
                raise QueueFullError(
                    f"{self.num_active} requests are active: the policy serves "
                    f"{self._concurrency} at once and max_queue_size is {self._max_queue_size}; "
                    "retry later, or raise max_queue_size"
                )
            self.num_active += 1
        try:
            yield
        finally:
            with self._lock:
                self.num_active -= 1
