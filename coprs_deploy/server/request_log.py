"""Request ids, the access log, and the metrics of each request."""

from __future__ import annotations

import logging
import time

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from coprs_deploy.errors import shorten
from coprs_deploy.server.metrics import ServerMetrics
from coprs_deploy.server.request_record import REQUEST_ID_HEADER, RequestRecord

ACCESS_LOGGER = __name__
"""Logger with one line a request, at level INFO; nothing that a user wrote or sent is in it."""

QUIET_PATHS = frozenset({"/health", "/health/live", "/health/ready", "/metrics"})
"""Paths that probes request every few seconds; their successes are not logged."""

CLIENT_LEFT = 499

logger = logging.getLogger(ACCESS_LOGGER)


class RequestLog:
    """Outermost ASGI middleware: names, counts and logs each request.

    ``X-Request-ID`` of the client is used if it has 1 to 128 letters, digits or ``._:/+=-``, else a
    new one is made. It is in the response, whatever its status, and in all lines of the log.

    Args:
        app: the wrapped application.
        metrics: counts the requests.
        root_path: path of a reverse proxy, which may remove it from the paths or not.
    """

    def __init__(self, app: ASGIApp, metrics: ServerMetrics, root_path: str) -> None:
        self._app = app
        self._metrics = metrics
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = RequestRecord.of(scope)
        start, is_complete = time.perf_counter(), False

        async def send_named(message: Message) -> None:
            nonlocal is_complete
            if message["type"] == "http.response.start":
                record.status = message["status"]
                headers = MutableHeaders(scope=message)
                headers[REQUEST_ID_HEADER] = record.request_id
                headers.setdefault("X-Content-Type-Options", "nosniff")
                # Else browsers keep a script of the page for days, beside another page.
                headers.setdefault("Cache-Control", "no-cache")
            await send(message)
            is_complete = message["type"] == "http.response.body" and not message.get("more_body")

        try:
            await self._app(scope, receive, send_named)
        finally:
            if not is_complete:
                record.error = record.error or "ClientDisconnected"
            if record.status in (0, CLIENT_LEFT):
                record.status, record.error = CLIENT_LEFT, record.error or "ClientDisconnected"
            self._end(scope, record, time.perf_counter() - start)

    def _end(self, scope: Scope, record: RequestRecord, seconds: float) -> None:
        method, path = scope["method"], scope["path"].removeprefix(self._root_path) or "/"
        self._metrics.observe_request(method, path, record.status, record.error, seconds)
        if path in QUIET_PATHS and record.status == 200:
            return
        client = (scope.get("client") or ("",))[0]
        fields = {
            "request_id": record.request_id,
            "client": client,
            "key": record.key,
            "method": method,
            "path": shorten(path),
            "status": record.status,
            "error": record.error,
            "instructions": record.num_instructions,
            "duration_ms": round(1e3 * seconds, 1),
        }
        logger.info("request", extra={"fields": {k: v for k, v in fields.items() if v != ""}})
