"""Image embeddings that are kept for further questions on the same picture."""

from __future__ import annotations

import secrets
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from coprs_deploy.engines import DeviceTensor, SegmentationGraphs
from coprs_deploy.errors import CoPRSError
from coprs_deploy.images import ResizeTransform, RgbArray, prepare_image
from coprs_deploy.policy import PolicyRequest
from coprs_deploy.specs import Geometry


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


@dataclass(frozen=True)
class _Waiting:
    rgb: RgbArray
    future: Future[EncodedImage] = field(default_factory=Future)


class EncoderQueue:
    """Encodes pictures in the order in which they come, several in one call where several wait.

    Nobody waits for company: a picture that comes alone is encoded at once, and of those that have
    come meanwhile as many go together next as the graph takes.

    Args:
        stages: the graphs.
        geometry: sizes of the model.
    """

    def __init__(self, stages: SegmentationGraphs, geometry: Geometry) -> None:
        self._stages = stages
        self._geometry = geometry
        self._waiting: deque[_Waiting] = deque()
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="image-encoder")

    def submit(self, rgb: RgbArray) -> Future[EncodedImage]:
        """Have a picture encoded; cancelling the future before its turn calls it off.

        Args:
            rgb: (H, W, 3) uint8.

        Raises:
            CoPRSError: the queue was closed.
        """
        item = _Waiting(rgb)
        with self._lock:
            self._waiting.append(item)
            try:
                self._thread.submit(self._serve)
            except RuntimeError as error:
                self._waiting.clear()
                raise CoPRSError("the runtime was closed") from error
        return item.future

    def _serve(self) -> None:
        """Encode what goes together next; nothing where it went along with others before."""
        batch = self._next_batch()
        failure = self._encode(batch) if batch else None
        if failure is None:
            return
        # Of several, one alone may still have room, or be sound where another is not.
        for item in batch:
            alone = failure if len(batch) == 1 else self._encode([item])
            if alone is not None:
                item.future.set_exception(alone)

    def _next_batch(self) -> list[_Waiting]:
        with self._lock:
            wanted = self._stages.images.size_for(len(self._waiting)) if self._waiting else 0
            batch: list[_Waiting] = []
            while self._waiting and len(batch) < wanted:
                item = self._waiting.popleft()
                if item.future.set_running_or_notify_cancel():
                    batch.append(item)
        return batch

    def _encode(self, batch: Sequence[_Waiting]) -> Exception | None:
        """Encode pictures and hand out their embeddings, or return what went wrong."""
        start = time.perf_counter()
        try:
            prepared = [prepare_image(item.rgb, self._geometry) for item in batch]
            embeddings = self._stages.encode_batch(prepared)
            assert len(embeddings) == len(batch), "an embedding a picture"
        except Exception as error:
            return error  # whatever it is, somebody waits for these futures
        finished = time.perf_counter()
        for item, embedding in zip(batch, embeddings, strict=True):
            encoded = EncodedImage(embedding, finished, 1e3 * (finished - start))
            item.future.set_result(encoded)
        return None

    def close(self) -> None:
        """Call off what waits, and return when what is being encoded is done."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            waiting = list(self._waiting)
            self._waiting.clear()
        for item in waiting:
            item.future.cancel()
        self._thread.shutdown(wait=True)


@dataclass(frozen=True)
class DecodedImage:
    """A decoded picture.

    Attributes:
        rgb: (H, W, 3) uint8.
        placed: where it will lie in the padded image.
        key: names it by its content; empty where no embedding is kept.
        milliseconds: what decoding and naming it took.
    """

    rgb: RgbArray
    placed: ResizeTransform
    key: str
    milliseconds: float


@dataclass(frozen=True)
class PendingEmbedding:
    """An embedding on its way, and whether an earlier question had asked for it."""

    future: Future[EncodedImage]
    was_kept: bool

    def wait(self, request: PolicyRequest) -> EncodedImage:
        """Wait for the embedding, up to the request's deadline.

        Raises:
            RequestTimeoutError: the deadline passed.
            CoPRSError: the runtime was closed meanwhile.
        """
        while True:
            try:
                return self.future.result(request.remaining_s())
            except CancelledError as error:
                raise CoPRSError("the runtime was closed while it answered") from error
            except TimeoutError:
                if self.future.done():
                    raise  # the image encoder's own
                request.remaining_s()
