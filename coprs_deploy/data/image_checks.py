"""Checks of many images: each is decoded once, in threads, and remembered by its file.

A check needs the size and the content of an image, not its pixels. :class:`ImageChecks` is a loader
for :meth:`~coprs_deploy.data.examples.ExampleSource.read` that returns stand-ins. What it found can
be saved, so that a later check decodes only files that changed.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeAlias, TypeVar

import msgspec
import numpy as np
import xxhash
from numpy.typing import NDArray

from coprs_deploy.artifacts import atomic_write
from coprs_deploy.data.image_columns import load_image_source
from coprs_deploy.images import RgbArray, image_key

ImageLoader: TypeAlias = Callable[[bytes | Path, str], RgbArray]
"""Decode the image of a column; FieldError if that is impossible."""

MAX_THREADS = 8
"""Threads that decode images; each holds one image."""

T = TypeVar("T")
U = TypeVar("U")


class ImageStandIn(np.ndarray):
    """Black image of the size of another one, without memory for its pixels.

    Attributes:
        key: content key of the other image.
    """

    key: str

    def __array_finalize__(self, array: object) -> None:
        self.key = getattr(array, "key", "")

    @classmethod
    def of(cls, height: int, width: int, key: str) -> ImageStandIn:
        """Return the stand-in of an image."""
        black = np.broadcast_to(np.zeros((1, 1, 1), np.uint8), (height, width, 3)).view(cls)
        black.key = key
        return black


class _Known(msgspec.Struct, array_like=True, gc=False):
    """Size and content key of an image, and size and time of change of its file (0 for bytes)."""

    num_bytes: int
    changed_ns: int
    height: int
    width: int
    key: str


class ImageChecks:
    """Loader of stand-ins that decodes each image once; it may be called from several threads.

    A file is known by its path, size and time of change, bytes by a hash.
    """

    def __init__(self, cache: Path | None = None) -> None:
        """Read what an earlier check found; a cache that cannot be read is ignored."""
        self._known: dict[str, _Known] = {}
        self._found: dict[str, Future[_Known]] = {}
        self._lock = threading.Lock()
        self.num_decoded = 0
        if cache is not None and cache.is_file():
            try:
                self._known = msgspec.json.decode(cache.read_bytes(), type=dict[str, _Known])
            except (msgspec.DecodeError, OSError):
                self._known = {}

    def __call__(self, source: bytes | Path, column: str) -> RgbArray:
        """Return the stand-in of an image; FieldError if it cannot be decoded."""
        if isinstance(source, bytes):
            name, stamp = xxhash.xxh3_128_hexdigest(source), (len(source), 0)
        else:
            name, stamp = str(source.absolute()), _stamp(source)
        with self._lock:
            future = self._found.get(name)
            if is_first := future is None:
                future = self._found[name] = Future()
        if is_first:
            try:
                future.set_result(self._check(source, column, name, stamp))
            except BaseException as error:
                future.set_exception(error)
        known = future.result()
        return ImageStandIn.of(known.height, known.width, known.key)

    def save(self, cache: Path) -> None:
        """Write the images that were found by this check."""
        done = (each for each in self._found.items() if each[1].exception() is None)
        found = {name: future.result() for name, future in done}
        with atomic_write(cache) as partial:
            partial.write_bytes(msgspec.json.encode(found))

    def _check(
        self, source: bytes | Path, column: str, name: str, stamp: tuple[int, int]
    ) -> _Known:
        known = self._known.get(name)
        if known is not None and (known.num_bytes, known.changed_ns) == stamp:
            return known
        image = load_image_source(source, column)
        self.num_decoded += 1
        return _Known(*stamp, image.shape[0], image.shape[1], image_key(image))


def content_key(image: NDArray[np.uint8]) -> str:
    """Return the content key of an image, or of the one that a stand-in stands for."""
    return image.key if isinstance(image, ImageStandIn) else image_key(image)


def map_in_order(function: Callable[[T], U], items: Iterable[T]) -> Iterator[U]:
    """Call a function in threads; the items are taken in this one, and results come in order."""
    num_threads = min(MAX_THREADS, len(os.sched_getaffinity(0)))
    if num_threads == 1:
        yield from map(function, items)
        return
    pending: deque[Future[U]] = deque()
    executor = ThreadPoolExecutor(num_threads)
    try:
        for item in items:
            pending.append(executor.submit(function, item))
            if len(pending) > num_threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        executor.shutdown(cancel_futures=True)


def _stamp(path: Path) -> tuple[int, int]:
    """Return the size of a file in bytes and its time of change; zeros if it cannot be read."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return 0, 0
    return status.st_size, status.st_mtime_ns
