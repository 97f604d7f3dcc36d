"""The image encoder's own thread: pictures that wait are prepared and encoded together."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from coprs_deploy.engines import DeviceTensor, Stages
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

    Nobody waits for company: a picture that comes alone is encoded at once, and what has come
    meanwhile goes together next, up to the number that the graph takes.

    Args:
        stages: the graphs.
        geometry: sizes of the model.
    """

    def __init__(self, stages: Stages, geometry: Geometry) -> None:
        self._stages = stages
        self._geometry = geometry
        self._waiting: deque[_Waiting] = deque()
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._work, name="image-encoder", daemon=True)
        self._thread.start()

    def submit(self, rgb: RgbArray) -> Future[EncodedImage]:
        """Have a picture encoded; cancelling the future before its turn calls it off.

        Args:
            rgb: (H, W, 3) uint8.

        Raises:
            CoPRSError: the queue was closed.
        """
        item = _Waiting(rgb)
        with self._changed:
            if self._is_closed:
                raise CoPRSError("the runtime was closed")
            self._waiting.append(item)
            self._changed.notify()
        return item.future

    def _work(self) -> None:
        while self._serve(self._next_batch()):  # no name here keeps the last pictures alive
            pass

    def _serve(self, batch: Sequence[_Waiting]) -> bool:
        """Encode a batch; say whether there was one."""
        start = time.perf_counter()
        try:
            embeddings = self._encode([item.rgb for item in batch])
        except BaseException as error:
            for item in batch:
                item.future.set_exception(error)
            return True
        finished = time.perf_counter()
        for item, embedding in zip(batch, embeddings, strict=True):
            encoded = EncodedImage(embedding, finished, 1e3 * (finished - start))
            item.future.set_result(encoded)
        return bool(batch)

    def _next_batch(self) -> list[_Waiting]:
        """Wait for pictures, and take those that go together; none once the queue is closed."""
        with self._changed:
            batch: list[_Waiting] = []
            while not batch:
                self._changed.wait_for(lambda: self._waiting or self._is_closed)
                if self._is_closed:
                    break
                while self._waiting and len(batch) < self._stages.images_together:
                    item = self._waiting.popleft()
                    if item.future.set_running_or_notify_cancel():
                        batch.append(item)
            return batch

    def _encode(self, pictures: Sequence[RgbArray]) -> list[DeviceTensor]:
        return self._stages.encode_together([prepare_image(p, self._geometry) for p in pictures])

    def close(self) -> None:
        """Call off what waits, and return when what is being encoded is done."""
        with self._changed:
            self._is_closed = True
            waiting = list(self._waiting)
            self._waiting.clear()
            self._changed.notify()
        for item in waiting:
            item.future.cancel()
        self._thread.join()
