"""Image embeddings that are kept for further questions on the same picture."""

from __future__ import annotations

import secrets
import threading
from collections import Counter, OrderedDict
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from coprs_deploy.engines import DeviceTensor
from coprs_deploy.images import RgbArray


@dataclass(frozen=True)
class EncodedImage:
    """An image embedding and the time that computing it took.

    Attributes:
        embedding: (1, C, G, G), where the image encoder left it.
        finished: ``time.perf_counter()`` when it was ready.
        milliseconds: preparing the picture and encoding it, with those that went along.
    """

    embedding: DeviceTensor
    finished: float
    milliseconds: float

    def overlap_ms(self, start: float, end: float) -> float:
        """How long the image encoder ran between two times of ``time.perf_counter()``."""
        began = self.finished - self.milliseconds / 1e3
        return max(0.0, 1e3 * (min(self.finished, end) - max(began, start)))


_SEED = secrets.randbits(64)
"""So that nobody can prepare two pictures of one key for this process."""


def picture_key(rgb: RgbArray) -> str:
    """Name a picture, (H, W, 3), within this process: equal pixels and size give equal keys.

    Every question waits for it, so it is a fast hash: 0.2 ms for 1920 x 1080 pixels, where
    :func:`coprs_deploy.images.image_key`, whose names last, takes 11.
    """
    import xxhash

    digest = xxhash.xxh3_128(str(rgb.shape).encode(), seed=_SEED)
    digest.update(np.ascontiguousarray(rgb).data)
    return digest.hexdigest()


class Encoder(Protocol):
    """Whoever computes embeddings, in the background."""

    def submit(self, rgb: RgbArray, /) -> Future[EncodedImage]:
        """Have a picture encoded."""


class EmbeddingCache:
    """The least recently used embeddings, by image content; safe to use from several threads.

    An embedding that is still being computed counts as present, so that two questions on one new
    picture encode it once. A failed computation is forgotten, and one that has not begun is called
    off when everybody who asked for it has released it.

    Attributes:
        capacity: how many are kept.
    """

    def __init__(self, capacity: int, encoder: Encoder) -> None:
        self.capacity = capacity
        self._encoder = encoder
        self._entries: OrderedDict[str, Future[EncodedImage]] = OrderedDict()
        self._waiting: Counter[Future[EncodedImage]] = Counter()
        self._lock = threading.Lock()

    def get_or_submit(self, key: str, rgb: RgbArray) -> tuple[Future[EncodedImage], bool]:
        """Return the future of a picture's embedding, and whether it was there already.

        Each call is answered by one of :meth:`release`.

        Args:
            key: names the picture by its content.
            rgb: the picture, (H, W, 3) uint8.
        """
        with self._lock:
            known = self._entries.get(key)
            if known is not None and not _has_failed(known):
                self._entries.move_to_end(key)
                self._waiting[known] += 1
                return known, True
            future = self._encoder.submit(rgb)
            self._waiting[future] += 1
            if self.capacity:
                self._entries[key] = future
                self._entries.move_to_end(key)
                while len(self._entries) > self.capacity:
                    self._entries.popitem(last=False)
            return future, False

    def release(self, future: Future[EncodedImage]) -> None:
        """Say that one who asked for an embedding has it, or no longer wants it."""
        with self._lock:
            self._waiting[future] -= 1
            if self._waiting[future] > 0:
                return
            del self._waiting[future]
            future.cancel()  # does nothing to a computation that has begun

    def __len__(self) -> int:
        return len(self._entries)


def _has_failed(future: Future[EncodedImage]) -> bool:
    return future.done() and (future.cancelled() or future.exception() is not None)
