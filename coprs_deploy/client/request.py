"""What both clients share: the form of a request, retries, and errors of the server."""

from __future__ import annotations

import io
import json
import os
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from coprs_deploy import errors
from coprs_deploy.client.result import RemotePrior, RemoteResult
from coprs_deploy.errors import (
    CoPRSError,
    EndpointError,
    QueueFullError,
    RequestTimeoutError,
    check_number,
    check_type,
    import_failure,
    install_hint,
    shorten,
)
from coprs_deploy.policy import TextDelta
from coprs_deploy.version import __version__

if TYPE_CHECKING:
    from types import ModuleType

    import httpx2
    from numpy.typing import NDArray
    from PIL import Image

RemoteImage: TypeAlias = "str | Path | bytes | Image.Image | NDArray[Any]"
RemoteEvent: TypeAlias = TextDelta | RemotePrior | RemoteResult

API_KEY_VARIABLE = "COPRS_API_KEY"

TEMPORARY = (429, 502, 503)
"""Statuses that are retried. 504 is none: the server has spent its time limit on the request."""

MAX_PAUSE_S = 60.0
"""Longest pause before a retry, also if the server requests a longer one."""

CONNECT_TIMEOUT_S = 10.0
MAX_EVENT_BYTES = 1 << 28


@dataclass(frozen=True)
class ClientOptions:
    """Options of a client.

    Attributes:
        url: address of the server, with the path of a reverse proxy if there is one.
        api_key: key of the server; None takes ``COPRS_API_KEY``, empty sends none.
        timeout_s: how long the server may send nothing.
        max_retries: retries of a request when the server is busy or the connection fails.
        backoff_s: pause before the first retry, doubled for each further one.
    """

    url: str = "http://127.0.0.1:8000"
    api_key: str | None = None
    timeout_s: float = 120.0
    max_retries: int = 2
    backoff_s: float = 0.5

    def __post_init__(self) -> None:
        check_type("url", self.url, str)
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url is {self.url!r}; accepted: http://HOST:PORT or https://HOST")
        check_number("timeout_s", self.timeout_s, above=0, is_whole=False)
        check_number("max_retries", self.max_retries, least=0)
        check_number("backoff_s", self.backoff_s, least=0, is_whole=False)

    @property
    def headers(self) -> dict[str, str]:
        """Headers of each request."""
        key = os.environ.get(API_KEY_VARIABLE, "") if self.api_key is None else self.api_key
        headers = {"User-Agent": f"coprs-deploy/{__version__}"}
        return headers | {"Authorization": f"Bearer {key}"} if key else headers

    def endpoint(self, path: str) -> str:
        """Return the URL of a path of the server."""
        return f"{self.url.rstrip('/')}/{path}"

    def pause_s(self, attempt: int, outcome: httpx2.Response | httpx2.TransportError) -> float:
        """Return the pause before an attempt is repeated; negative if it is not.

        Args:
            attempt: number of the attempt, from 0.
            outcome: the response to it, or the error of the connection.
        """
        if attempt >= self.max_retries or not _is_temporary(outcome):
            return -1.0
        requested = _retry_after_s(getattr(outcome, "headers", {}).get("retry-after", ""))
        own: float = self.backoff_s * 2**attempt * random.uniform(0.75, 1.25)
        return min(max(requested, own), MAX_PAUSE_S)


def _is_temporary(outcome: httpx2.Response | httpx2.TransportError) -> bool:
    import httpx2

    if isinstance(outcome, httpx2.Response):
        return outcome.status_code in TEMPORARY
    kinds = (httpx2.NetworkError, httpx2.RemoteProtocolError, httpx2.ConnectTimeout)
    return isinstance(outcome, kinds)


def _retry_after_s(text: str) -> float:
    """Return the seconds of a Retry-After header: a number, or a date."""
    if text.isascii() and text.isdigit():
        return float(text)
    try:
        return parsedate_to_datetime(text).timestamp() - time.time()
    except ValueError:
        return 0.0


def segment_form(
    image: RemoteImage, instructions: str | Sequence[str], options: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the form of ``POST /segment``, with one instruction or several, for httpx2."""
    check_type("instructions", instructions, str, list, tuple)
    name = "instruction" if isinstance(instructions, str) else "instructions"
    given = {key: str(value) for key, value in options.items() if value is not None}
    return {
        "files": {"image": ("image", _image_bytes(image))},
        "data": {name: instructions, **given},
    }


def read_results(data: Mapping[str, Any]) -> list[RemoteResult | Exception]:
    """Read the results of several instructions, or their errors.

    Raises:
        EndpointError: there are none.
    """
    if not isinstance(listed := data.get("results"), list):
        raise EndpointError(
            "the server sent no list of results; check that client and server have the same version"
        )
    return [
        _error(each.get("type", ""), each["error"])
        if isinstance(each, dict) and "error" in each
        else RemoteResult.from_json(each)
        for each in listed
    ]


def _image_bytes(image: RemoteImage) -> bytes:
    """Return the bytes of an image file; arrays and Pillow images as PNG, upright.

    Raises:
        ImageError, ValueError: an array or a Pillow image cannot be used.
        OSError: the file cannot be read.
    """
    if isinstance(image, bytes):
        return image
    if isinstance(image, str | Path):
        return Path(image).read_bytes()
    from PIL import Image

    from coprs_deploy.images import load_image

    file = io.BytesIO()
    Image.fromarray(load_image(image)).save(file, "PNG", compress_level=1)
    return file.getvalue()


def read_event(name: str, data: str) -> RemoteEvent | None:
    """Read an event of a stream; None for one of a later version.

    Raises:
        CoPRSError, ValueError: the event is an error of the server.
        EndpointError: it is none of the server's.
    """
    try:
        content = json.loads(data)
        if name == "text":
            return TextDelta(content["text"])
        if name == "prior":
            return RemotePrior.from_json(content)
        if name == "result":
            return RemoteResult.from_json(content)
        if name != "error":
            return None
        failure = _error(content["type"], content["error"])
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise EndpointError(
            f"the server sent an event {name} that cannot be read ({error!r}); check that client "
            "and server have the same version"
        ) from error
    raise failure


def error_of_response(url: str, status: int, content: bytes) -> Exception:
    """Return the error that a response reports, of the class that the server raised."""
    try:
        data = json.loads(content)
        kind, message = data["type"], data["error"]
    except (ValueError, LookupError, TypeError):
        text = shorten(" ".join(content.decode("utf-8", "replace").split()))
        return EndpointError(f"{url} responded with {status}: {text}; is it coprs-deploy serve?")
    if status in (401, 403, 404, 405):
        return EndpointError(f"{url} responded with {status}: {message}")
    others = {408: RequestTimeoutError, 429: QueueFullError, 503: QueueFullError}
    return _error(kind, message, others.get(status, ValueError if status < 500 else CoPRSError))


def _error(kind: str, message: str, other: type[Exception] = CoPRSError) -> Exception:
    """Return an error of the class that the server names, or of another one."""
    found = ValueError if kind == "ValueError" else getattr(errors, kind, None)
    if isinstance(found, type) and issubclass(found, CoPRSError | ValueError):
        return found(message)
    return other(message)


def error_of_connection(
    options: ClientOptions, url: str, error: httpx2.TransportError
) -> CoPRSError:
    """Return the error of a connection that failed."""
    import httpx2

    if isinstance(error, httpx2.TimeoutException) and not isinstance(error, httpx2.ConnectTimeout):
        return RequestTimeoutError(
            f"{url} sent nothing for {options.timeout_s:g} s; pass a larger timeout_s, or bound "
            "the request with deadline_ms or max_reasoning_tokens"
        )
    reason = str(error) or type(error).__name__
    return EndpointError(
        f"{url} cannot be reached ({reason}); check the URL, and that `coprs-deploy serve` runs"
    )


def import_httpx() -> ModuleType:
    """Import httpx2, or say how to install it."""
    try:
        import httpx2
    except ImportError as error:
        hint = install_hint("client")
        raise import_failure(error, "httpx2", hint, needed_by="the client") from error
    return httpx2
