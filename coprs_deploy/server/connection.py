"""HTTP/1.1 connections of uvicorn that close when a client does not finish what it sends."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import ClassVar

from uvicorn.protocols.http.h11_impl import H11Protocol


class TimedConnection(H11Protocol):
    """Connection with time limits for the head of a request and for reading its response.

    uvicorn waits for both forever. The first limit also holds for the rest of a body that was
    refused. The body of a request that is being served is timed by ``RequestGuard``.
    """

    request_timeout_s: ClassVar[float] = 30.0
    """From the first byte of a request, or from the connection, to the end of its head."""

    unread_timeout_s: ClassVar[float] = 30.0
    """How long the client may read nothing while something is sent; then the kernel ends the
    connection, and the rest of the response is freed."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Set the time limit for reading, and start that of the first request."""
        super().connection_made(transport)
        milliseconds = round(1e3 * self.unread_timeout_s)
        opened = transport.get_extra_info("socket")
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
        self._update_timer()

    def data_received(self, data: bytes) -> None:
        """Start the time limit of a request, or end it when its head is complete."""
        super().data_received(data)
        self._update_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """End the time limit."""
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Refuse malformed HTTP in the JSON of all errors."""
        self._refuse("400 Bad Request", msg)

    def _update_timer(self) -> None:
        is_waiting = self.cycle is None or self.cycle.response_complete
        if is_waiting and self._timer is None:
            self._timer = self.loop.call_later(self.request_timeout_s, self._expire)
        elif not is_waiting and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _expire(self) -> None:
        if self.conn.trailing_data[0]:
            seconds = f"{self.request_timeout_s:g} s"
            self._refuse("408 Request Timeout", f"the head of the request took over {seconds}")
        else:
            self.transport.close()

    def _refuse(self, status: str, message: str) -> None:
        body = json.dumps({"error": message, "type": "RequestError"}).encode()
        head = (
            f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()
