"""Checks before a request is read, and limits on how long a client may stall."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from coprs_deploy.server.api_keys import ApiKeys, KeyLimitError
from coprs_deploy.server.request_record import RequestRecord

MIB = 1 << 20

LINGER_S = 5.0
"""How long the rest of a refused request may arrive before the connection is closed."""

logger = logging.getLogger(__name__)


class RequestGuard:
    """ASGI middleware that refuses requests before their body is read.

    POST needs an API key, if there are any, within its limits, and every body a Content-Length
    within the limit. A body that stops arriving or arrives too slowly ends in 408, and a client
    that stops reading its response is disconnected. A request that the server cancels to stop gets
    503, and a bug 500.

    Args:
        app: the wrapped application.
        max_bytes: size limit of a body.
        api_keys: keys of the clients; None for none.
        root_path: path of a reverse proxy, which may remove it from the paths or not.
        stall_timeout_s: time limit of one read or write, in seconds.
        min_bytes_per_s: least average rate of a body, after ``stall_timeout_s``.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        max_bytes: int,
        api_keys: ApiKeys | None,
        root_path: str,
        stall_timeout_s: float,
        min_bytes_per_s: float,
    ) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._api_keys = api_keys
        self._root_path = root_path
        self._stall_timeout_s = stall_timeout_s
        self._min_bytes_per_s = min_bytes_per_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward a request, or respond with 401, 411, 413 or 429."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if Headers(scope=scope).get("connection", "").lower() == "close":
            receive, send = _lingering(receive, send)
        try:
            with self._admitted(scope):
                await self._forward({**scope, "root_path": self._root_path}, receive, send)
        except _RefusedError as error:
            RequestRecord.of(scope).error = error.kind
            await _respond(error)(scope, receive, send)

    async def _forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        record = RequestRecord.of(scope)
        is_received = has_started = False
        time = asyncio.get_running_loop().time
        num_bytes = _content_length(scope) or 0
        end = time() + self._stall_timeout_s + num_bytes / self._min_bytes_per_s

        async def timed_receive() -> Message:
            nonlocal is_received
            if is_received:  # the next message is the disconnect
                return await receive()
            try:
                async with asyncio.timeout_at(min(time() + self._stall_timeout_s, end)):
                    message = await receive()
            except TimeoutError as error:
                problem = f"no data for {self._stall_timeout_s:g} s before the end of the body"
                if time() >= end:
                    rate = self._min_bytes_per_s
                    problem = f"the body arrives more slowly than {rate:g} bytes/s"
                raise HTTPException(408, problem, {"Connection": "close"}) from error
            is_received = not message.get("more_body", False)
            return message

        async def timed_send(message: Message) -> None:
            nonlocal has_started
            has_started = True
            try:
                async with asyncio.timeout(self._stall_timeout_s):
                    await send(message)
            except TimeoutError as error:
                raise _ClientStalledError from error

        try:
            await self._app(scope, timed_receive, timed_send)
        except ClientDisconnect:  # before the end of its body
            record.error = "ClientDisconnected"
        except _ClientStalledError:
            record.error = "ClientStalled"  # the server closes the unfinished response
        except asyncio.CancelledError:
            record.error = "ServerStopping"
            if not has_started:
                message = "the server is stopping; send the request again later"
                refusal = _RefusedError(503, "ServerStopping", message)
                await _respond(refusal)(scope, receive, send)
        except Exception as error:
            record.error = type(error).__name__
            logger.exception("internal error", extra={"request_id": record.request_id})
            if has_started:
                return
            message = "internal error; the log of the server has its traceback"
            await _respond(_RefusedError(500, record.error, message))(scope, receive, send)

    @contextmanager
    def _admitted(self, scope: Scope) -> Iterator[None]:
        """Check the head of a request; inside the block it counts for the limits of its key."""
        with ExitStack() as stack:
            if self._api_keys is not None and scope["method"] == "POST":
                authorization = Headers(scope=scope).get("authorization", "")
                scheme, _, given = authorization.partition(" ")
                key = self._api_keys.find(given) if scheme.lower() == "bearer" else None
                if key is None:
                    message = (
                        "the API key is missing or wrong; send the header Authorization: Bearer KEY"
                    )
                    headers = {"WWW-Authenticate": "Bearer"}
                    raise _RefusedError(401, "Unauthorized", message, headers)
                RequestRecord.of(scope).key = key.name
                try:
                    stack.enter_context(self._api_keys.admit(key))
                except KeyLimitError as error:
                    headers = {"Retry-After": str(error.retry_after_s)}
                    raise _RefusedError(429, "TooManyRequests", str(error), headers) from error
            self._check_length(scope)
            yield

    def _check_length(self, scope: Scope) -> None:
        num_bytes = _content_length(scope)
        if num_bytes is None or num_bytes <= self._max_bytes:
            return
        message = (
            f"the request has {num_bytes / MIB:.1f} MiB; accepted: at most "
            f"{self._max_bytes / MIB:g} MiB; send a smaller image, or start the server with a "
            "larger --max-upload"
        )
        raise _RefusedError(413, "TooLarge", message)


def _lingering(receive: Receive, send: Send) -> tuple[Receive, Send]:
    """Discard what a client still sends of a refused request before its connection is closed.

    A client that has not read its response would otherwise find the connection reset, and the
    response gone.
    """
    is_received = False

    async def tracked_receive() -> Message:
        nonlocal is_received
        message = await receive()
        is_received = not message.get("more_body", False)
        return message

    async def lingering_send(message: Message) -> None:
        is_last = message["type"] == "http.response.body" and not message.get("more_body", False)
        if not is_last or is_received:
            await send(message)
            return
        await send({**message, "more_body": True})
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                while not is_received:
                    await tracked_receive()
        await send({"type": "http.response.body"})

    return tracked_receive, lingering_send


class _ClientStalledError(Exception):
    """The client stopped reading its response."""


class _RefusedError(Exception):
    """A request is refused before it reaches the application.

    Attributes:
        status: status of the response.
        kind: type in its body.
        headers: further headers.
    """

    def __init__(
        self, status: int, kind: str, message: str, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.headers = headers


def _content_length(scope: Scope) -> int | None:
    """Return the length of a body; None without a body."""
    headers = Headers(scope=scope)
    length = headers.get("content-length", "")
    if not length and "transfer-encoding" not in headers:
        return None
    if not (length.isascii() and length.isdigit()):
        message = f"Content-Length is {length[:40]!r}; send the number of bytes of the body"
        raise _RefusedError(411, "LengthRequired", message)
    return int(length.lstrip("0")[:20] or "0")


def _respond(error: _RefusedError) -> JSONResponse:
    body = {"error": str(error), "type": error.kind}
    return JSONResponse(body, error.status, error.headers)
