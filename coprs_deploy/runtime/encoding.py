"""A picture on its way through the image encoder, and the clock of the stages behind it."""

from __future__ import annotations

import time
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass

from coprs_deploy.errors import CoPRSError
from coprs_deploy.images import Placement, RgbArray
from coprs_deploy.policy import PolicyRequest
from coprs_deploy.runtime.embedding_cache import EncodedImage


@dataclass(frozen=True)
class Picture:
    """A decoded picture.

    Attributes:
        rgb: (H, W, 3) uint8.
        placed: where it will lie in the padded image.
        key: names it by its content; empty where no embedding is kept.
        milliseconds: what decoding and naming it took.
    """

    rgb: RgbArray
    placed: Placement
    key: str
    milliseconds: float


@dataclass(frozen=True)
class Encoding:
    """An embedding on its way, and whether an earlier question had asked for it."""

    future: Future[EncodedImage]
    was_kept: bool

    def wait(self, request: PolicyRequest) -> EncodedImage:
        """Wait for the embedding, up to the request's deadline.

        Raises:
            AnswerTimeoutError: the deadline passed.
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


class Clock:
    """Times consecutive stages."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap_ms(self) -> float:
        """Milliseconds since the last lap, or since the clock was made."""
        now = time.perf_counter()
        elapsed_ms, self._last = 1e3 * (now - self._last), now
        return elapsed_ms
