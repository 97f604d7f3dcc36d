"""Checks before a request is read, and limits on how long a client may stall."""

from __future__ import annotations

import asyncio
import secrets

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MIB = 1 << 20


class RequestGuard:
    """ASGI middleware that refuses requests before their body is read.

    POST needs the API key, if there is one, and every body a Content-Length within the limit. A
    body that stops arriving ends in 408, and a client that stops reading its response is
    disconnected. A request that the server cancels to stop gets 503.

    Args:
        app: the wrapped application.
        max_bytes: size limit of a body.
        api_key: key that clients must send; empty for none.
        root_path: path of a reverse proxy, which may remove it from the paths or not.
        stall_timeout_s: time limit of one read or write, in seconds.
    """

    def __init__(
        self, app: ASGIApp, max_bytes: int, api_key: str, root_path: str, stall_timeout_s: float
    ) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._authorization = f"Bearer {api_key}".encode() if api_key else b""
        self._root_path = root_path
        self._stall_timeout_s = stall_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward a request, or respond with 401, 411 or 413."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif refusal := self._refusal(scope):
            await refusal(scope, receive, send)
        else:
            await self._forward({**scope, "root_path": self._root_path}, receive, send)

    async def _forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_received = has_started = False

        async def timed_receive() -> Message:
            nonlocal is_received
            if is_received:  # the next message is the disconnect
                return await receive()
            try:
                async with asyncio.timeout(self._stall_timeout_s):
                    message = await receive()
            except TimeoutError as error:
                raise HTTPException(
                    408,
                    f"no data for {self._stall_timeout_s:g} s before the end of the body",
                    {"Connection": "close"},
                ) from error
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
        except _ClientStalledError:
            pass  # the server closes the connection of an unfinished response
        except asyncio.CancelledError:
            if not has_started:
                message = "the server is stopping; send the request again later"
                await _refuse(503, "ServerStopping", message)(scope, receive, send)

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        headers = Headers(scope=scope)
        if self._authorization and scope["method"] == "POST":
            given = headers.get("authorization", "").encode("latin-1")
            if not secrets.compare_digest(given, self._authorization):
                message = (
                    "the API key is missing or wrong; send the header Authorization: Bearer KEY"
                )
                return _refuse(401, "Unauthorized", message, {"WWW-Authenticate": "Bearer"})
        length = headers.get("content-length", "")
        if not length and "transfer-encoding" not in headers:
            return None
        if not (length.isascii() and length.isdigit()):
            message = f"Content-Length is {length[:40]!r}; send the number of bytes of the body"
            return _refuse(411, "LengthRequired", message)
        num_bytes = int(length.lstrip("0")[:20] or "0")
        if num_bytes <= self._max_bytes:
            return None
        message = (
            f"the request has {num_bytes / MIB:.1f} MiB; accepted: at most "
            f"{self._max_bytes / MIB:g} MiB; send a smaller image, or start the server with a "
            "larger --max-upload"
        )
        return _refuse(413, "TooLarge", message)


class _ClientStalledError(Exception):
    """The client stopped reading its response."""


def _refuse(
    status: int, kind: str, message: str, headers: dict[str, str] | None = None
) -> JSONResponse:
    return JSONResponse({"error": message, "type": kind}, status, headers)
