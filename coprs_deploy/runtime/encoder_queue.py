"""The image encoder's own thread: pictures that wait are prepared and encoded together."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from coprs_deploy.engines import Stages
from coprs_deploy.errors import CoPRSError
from coprs_deploy.images import RgbArray, prepare_image
from coprs_deploy.runtime.embedding_cache import EncodedImage
from coprs_deploy.specs import Geometry


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

    def __init__(self, stages: Stages, geometry: Geometry) -> None:
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
            embeddings = self._stages.encode_together(prepared)
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
