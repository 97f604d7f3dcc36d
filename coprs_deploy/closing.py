"""Things that hold memory, and give it back at the end of a ``with`` block."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Self


class Closeable(ABC):
    """Something to be closed when it is no longer needed; leaving a ``with`` block closes it."""

    @abstractmethod
    def close(self) -> None:
        """Give everything back; the object must not be used again."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
