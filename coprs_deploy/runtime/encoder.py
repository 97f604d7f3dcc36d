"""Image embeddings in the background: a queue that batches, and a cache by image content.

One image goes through here as source (what the user passes), :class:`DecodedImage`,
``PreparedImage`` (the graph's input, made in the queue's thread) and :class:`ImageEmbedding`.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from coprs_deploy.engines import DeviceTensor, SegmentationGraphs
from coprs_deploy.errors import CoPRSError
from coprs_deploy.images import ResizeTransform, RgbArray, prepare_image
from coprs_deploy.policy import PolicyRequest
from coprs_deploy.specs import Geometry


@dataclass(frozen=True)
class DecodedImage:
    """A decoded image.

    Attributes:
        rgb: (H, W, 3) uint8.
        resize: size of the image in the padded input of the image encoder.
        cache_key: content hash; empty if embeddings are not cached.
        decode_ms: duration of decoding and hashing.
        waited_ms: how long it waited to be decoded.
        embedding: its embedding, held for several requests; None to look it up.
    """

    rgb: RgbArray
    resize: ResizeTransform
    cache_key: str
    decode_ms: float
    waited_ms: float = 0.0
    embedding: PendingEmbedding | None = None


@dataclass(frozen=True)
class ImageEmbedding:
    """An image embedding and when it was computed.

    Attributes:
        embedding: (1, C, G, G) on the device of the image encoder.
        finished: ``time.perf_counter()`` when it was ready.
        duration_ms: duration of preparing and encoding its batch.
    """

    embedding: DeviceTensor
    finished: float
    duration_ms: float

    def overlap_ms(self, start: float, end: float) -> float:
        """Time the image encoder ran between two values of ``time.perf_counter()``."""
        began = self.finished - self.duration_ms / 1e3
        return max(0.0, 1e3 * (min(self.finished, end) - max(began, start)))


_SEED = secrets.randbits(64)
"""Seed of the content hash, random so that collisions cannot be prepared."""


def content_key(rgb: RgbArray) -> str:
    """Return a content hash of an image, (H, W, 3), that is valid within this process.

    Every request waits for it, so it is fast: 0.2 ms for 1920 x 1080 pixels, where
    :func:`coprs_deploy.images.image_key`, which is stable across processes, takes 11 ms.
    """
    import xxhash

    digest = xxhash.xxh3_128(str(rgb.shape).encode(), seed=_SEED)
    digest.update(np.ascontiguousarray(rgb).data)
    return digest.hexdigest()


class EmbeddingCache:
    """LRU cache of image embeddings by image content; thread-safe.

    Embeddings that are still being computed count as cached, so two requests on a new image encode
    it once. Failed computations are dropped, and one that has not started is cancelled when every
    request that waits for it has released it.
    """

    def __init__(self, capacity: int, encoder: EncoderQueue) -> None:
        self.capacity = capacity
        self._encoder = encoder
        self._entries: OrderedDict[str, Future[ImageEmbedding]] = OrderedDict()
        self._num_waiting: Counter[Future[ImageEmbedding]] = Counter()
        # Reentrant, because the garbage collector may end an abandoned stream at any time.
        self._lock = threading.RLock()

    def get_or_submit(self, image: DecodedImage) -> PendingEmbedding:
        """Return the embedding of an image, cached or enqueued; the caller must release it."""
        key, held = image.cache_key, image.embedding
        with self._lock:
            if held is not None and not _has_failed(held.future):
                self._num_waiting[held.future] += 1
                return held
            future = self._entries.pop(key, None)
            is_cached = future is not None and not _has_failed(future)
            if future is None or not is_cached:
                future = self._encoder.submit(image.rgb)
            self._num_waiting[future] += 1
            if self.capacity and key:
                self._entries[key] = future  # the most recent one
                if len(self._entries) > self.capacity:
                    self._entries.popitem(last=False)
            return PendingEmbedding(future, is_cached, self)

    def release(self, future: Future[ImageEmbedding]) -> None:
        """End the wait of one request for an embedding."""
        with self._lock:
            self._num_waiting[future] -= 1
            if self._num_waiting[future] > 0:
                return
            del self._num_waiting[future]
            future.cancel()  # has no effect on a computation that has started
            if _has_failed(future):  # an error would keep the images of its batch in memory
                kept = [item for item in self._entries.items() if item[1] is not future]
                self._entries = OrderedDict(kept)

    def __len__(self) -> int:
        return len(self._entries)


def _has_failed(future: Future[ImageEmbedding]) -> bool:
    return future.done() and (future.cancelled() or future.exception() is not None)


@dataclass(frozen=True)
class PendingEmbedding:
    """An embedding that a request waits for, and whether an earlier request submitted it."""

    future: Future[ImageEmbedding]
    is_cached: bool
    cache: EmbeddingCache

    def wait(self, request: PolicyRequest) -> ImageEmbedding:
        """Wait for the embedding, up to the request's deadline.

        Raises:
            RequestTimeoutError: the deadline passed.
            CoPRSError: CoPRS was closed meanwhile.
        """
        while not self.future.done():
            wait([self.future], request.remaining_s())
        try:
            return self.future.result()
        except CancelledError as error:
            raise CoPRSError("CoPRS was closed during the request") from error

    def release(self) -> None:
        """End the wait of the request; a computation that no other waits for is cancelled."""
        self.cache.release(self.future)


_Item: TypeAlias = tuple[RgbArray, Future[ImageEmbedding]]


class EncoderQueue:
    """FIFO queue of the image encoder, with a thread of its own.

    Batching is opportunistic: a single request runs immediately, and images that arrive meanwhile
    form the next batch, as large as the graph accepts.
    """

    def __init__(self, graphs: SegmentationGraphs, geometry: Geometry) -> None:
        self._graphs = graphs
        self._geometry = geometry
        self._queue: deque[_Item] = deque()
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="image-encoder")

    def submit(self, rgb: RgbArray) -> Future[ImageEmbedding]:
        """Enqueue an image; cancelling the future before its turn removes it from the queue.

        Args:
            rgb: (H, W, 3) uint8.

        Raises:
            CoPRSError: the queue was closed.
        """
        future: Future[ImageEmbedding] = Future()
        with self._lock:
            self._queue.append((rgb, future))
            try:
                self._thread.submit(self._encode_next)
            except RuntimeError as error:
                self._queue.pop()
                raise CoPRSError("CoPRS was closed during the request") from error
        return future

    def _encode_next(self) -> None:
        """Encode the next batch; the queue is empty if an earlier batch included the item."""
        batch = self._next_batch()
        failure = self._encode(batch) if batch else None
        if failure is None:
            return
        # Retry a failed batch one by one: memory may suffice for one, or one image is broken.
        for rgb, future in batch:
            error = failure if len(batch) == 1 else self._encode([(rgb, future)])
            if error is not None:
                future.set_exception(error)

    def _next_batch(self) -> list[_Item]:
        with self._lock:
            size = self._graphs.images.size_for(len(self._queue)) if self._queue else 0
            batch: list[_Item] = []
            while self._queue and len(batch) < size:
                rgb, future = self._queue.popleft()
                if future.set_running_or_notify_cancel():
                    batch.append((rgb, future))
        return batch

    def _encode(self, batch: Sequence[_Item]) -> Exception | None:
        """Encode a batch and resolve its futures, or return the error."""
        start = time.perf_counter()
        try:
            prepared = [prepare_image(rgb, self._geometry) for rgb, _ in batch]
            embeddings = self._graphs.encode_batch(prepared)
            assert len(embeddings) == len(batch), "one embedding per image"
        except Exception as error:
            return error  # any error, because the futures must be resolved
        finished = time.perf_counter()
        for (_, future), embedding in zip(batch, embeddings, strict=True):
            future.set_result(ImageEmbedding(embedding, finished, 1e3 * (finished - start)))
        return None

    def close(self) -> None:
        """Cancel queued images and wait for the running batch."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            queued = list(self._queue)
            self._queue.clear()
        for _, future in queued:
            future.cancel()
        self._thread.shutdown(wait=True)
