"""A lock that threads get in the order in which they came, and stop waiting for in time."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class FairLock:
    """Lock that waiting threads get first in, first out.

    ``threading.Lock`` and ``threading.Semaphore`` can be taken by a thread that has just come, also
    by the one that has just released them.

    Args:
        num_holders: number of threads that may hold it at once.
    """

    def __init__(self, num_holders: int = 1) -> None:
        self._num_free = num_holders
        self._waiting: deque[threading.Lock] = deque()  # one for each thread, released at its turn
        self._lock = threading.Lock()

    @property
    def num_waiting(self) -> int:
        """Number of threads that wait for it."""
        return len(self._waiting)

    @contextmanager
    def hold(self, remaining_s: Callable[[], float | None] = lambda: None) -> Iterator[None]:
        """Wait for the lock, and hold it inside the block.

        Args:
            remaining_s: returns how many seconds to wait, None for any number; is called again
                after them and at its turn, and ends the wait by raising.
        """
        self._acquire(remaining_s)
        try:
            yield
        finally:
            with self._lock:
                self._pass_on()

    def _acquire(self, remaining_s: Callable[[], float | None]) -> None:
        seconds = remaining_s()
        turn = threading.Lock()
        with self._lock:
            if self._num_free:
                self._num_free -= 1
                return
            turn.acquire()
            self._waiting.append(turn)
        try:
            while not turn.acquire(timeout=-1 if seconds is None else seconds):
                seconds = remaining_s()
            remaining_s()
        except BaseException:
            with self._lock:
                if turn in self._waiting:
                    self._waiting.remove(turn)
                else:  # it came meanwhile
                    self._pass_on()
            raise

    def _pass_on(self) -> None:
        if self._waiting:
            self._waiting.popleft().release()
        else:
            self._num_free += 1
