"""Base class of objects that own memory, threads or devices."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Self


class Closeable(ABC):
    """A context manager that closes itself at the end of a ``with`` block."""

    @abstractmethod
    def close(self) -> None:
        """Free all resources; the object must not be used afterwards."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
