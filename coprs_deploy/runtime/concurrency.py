"""How many answers may be under way, and the refusal of those beyond."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from coprs_deploy.errors import QueueFullError


class ConcurrencyLimit:
    """Counts the answers that are under way.

    Args:
        decoded_together: how many the policy serves at once.
        max_queue_size: how many more may wait for it.
    """

    def __init__(self, decoded_together: int, max_queue_size: int) -> None:
        self._decoded_together = decoded_together
        self._max_waiting = max_queue_size
        self._taken = 0
        self._lock = threading.Lock()

    @contextmanager
    def place(self) -> Iterator[None]:
        """Hold a place inside the block.

        Raises:
            QueueFullError: all places are taken.
        """
        with self._lock:
            if self._taken >= self._decoded_together + self._max_waiting:
                raise QueueFullError(
                    f"{self._taken} answers are under way and {self._max_waiting} may wait beside "
                    f"the {self._decoded_together} that the policy decodes together: ask again "
                    "later, or raise max_queue_size"
                )
            self._taken += 1
        try:
            yield
        finally:
            with self._lock:
                self._taken -= 1

    @property
    def taken(self) -> int:
        """How many answers are under way."""
        return self._taken
