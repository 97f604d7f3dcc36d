"""Requests that are too large are refused before their body is read."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

MIB = 1 << 20


class BodyLimit:
    """ASGI middleware: a body has a stated length, and none above the limit.

    Args:
        app: what is protected.
        max_bytes: largest body.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 411 or 413."""
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        await (refusal or self._app)(scope, receive, send)

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        headers = Headers(scope=scope)
        length = headers.get("content-length")
        if length is None:
            if "transfer-encoding" not in headers:
                return None
            message = "the request does not say its Content-Length; send it with one"
            return JSONResponse({"error": message, "type": "LengthRequired"}, 411)
        if int(length) <= self._max_bytes:  # the server has refused what is no number
            return None
        message = (
            f"the request has {int(length) / MIB:.1f} MiB, and at most {self._max_bytes / MIB:g} "
            "are taken; send a smaller picture, or start the server with a larger --max-upload"
        )
        return JSONResponse({"error": message, "type": "TooLarge"}, 413)
