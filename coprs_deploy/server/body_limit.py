"""Size limit of request bodies, checked before they are read."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

MIB = 1 << 20


class BodyLimit:
    """ASGI middleware that requires a Content-Length and limits it.

    Args:
        app: the wrapped application.
        max_bytes: size limit of a body.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward a request, or respond with 411 or 413."""
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        await (refusal or self._app)(scope, receive, send)

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        headers = Headers(scope=scope)
        length = headers.get("content-length")
        if length is None:
            if "transfer-encoding" not in headers:
                return None
            message = "the request has no Content-Length; send one"
            return JSONResponse({"error": message, "type": "LengthRequired"}, 411)
        if int(length) <= self._max_bytes:  # the server has rejected non-numeric lengths
            return None
        message = (
            f"the request has {int(length) / MIB:.1f} MiB; accepted: at most "
            f"{self._max_bytes / MIB:g} MiB; send a smaller image, or start the server with a "
            "larger --max-upload"
        )
        return JSONResponse({"error": message, "type": "TooLarge"}, 413)
