"""The server as a process: uvicorn on a bound socket, and its end after a signal."""

from __future__ import annotations

import os
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import uvicorn
from fastapi import FastAPI

from coprs_deploy.server.connection import TimedConnection

EXIT_TIMEOUT_S = 10
"""Time for closing after the last response; then the process ends even if a step is running."""


@dataclass(frozen=True)
class ProcessOptions:
    """How the process listens and ends.

    Attributes:
        grace_period_s: time for running requests after the server stopped accepting.
        drain_s: time between the signal to stop, when ``/health/ready`` turns to 503, and the end
            of accepting: for load balancers to notice.
        tls_cert: PEM file of the certificate chain; None for HTTP without TLS.
        tls_key: PEM file of its private key; None if it is in the same file.
    """

    grace_period_s: float = 5.0
    drain_s: float = 0.0
    tls_cert: Path | None = None
    tls_key: Path | None = None


class DrainingServer(uvicorn.Server):
    """Server that goes on accepting for a while after the signal to stop; a second one ends that.

    Args:
        app: the application; its ``state.is_stopping`` is set by the signal.
        options: how it listens and ends.
    """

    def __init__(self, app: FastAPI, options: ProcessOptions) -> None:
        config = uvicorn.Config(
            app,
            http=TimedConnection,
            log_config=None,
            access_log=False,
            proxy_headers=False,  # a client can send X-Forwarded-For itself
            server_header=False,
            timeout_graceful_shutdown=options.grace_period_s,  # type: ignore[arg-type]
            ssl_certfile=options.tls_cert,
            ssl_keyfile=options.tls_key,
        )
        super().__init__(config)
        self._app = app
        self._drain_s = options.drain_s
        self._stop_at: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to stop, or, if it has begun, stop accepting at once."""
        self._app.state.is_stopping = True
        if self._stop_at is None and self._drain_s:
            self._stop_at = time.monotonic() + self._drain_s
            self._captured_signals.append(sig)
        elif self.should_exit or self._stop_at is None:
            super().handle_exit(sig, frame)
        else:
            self._stop_at = 0.0

    async def on_tick(self, counter: int) -> bool:
        """Return whether to stop accepting."""
        is_due = self._stop_at is not None and time.monotonic() >= self._stop_at
        return await super().on_tick(counter) or is_due


def run_server(app: FastAPI, listener: socket.socket, options: ProcessOptions) -> None:
    """Serve until a signal, then end the process within a time limit.

    Raises:
        KeyboardInterrupt: as uvicorn raises it after its shutdown.
    """
    try:
        DrainingServer(app, options).run(sockets=[listener])
    finally:
        _exit_after(EXIT_TIMEOUT_S)


def _exit_after(seconds: float) -> None:
    """End the process even if a thread is in a step that cannot be interrupted, as a prefill."""
    timer = threading.Timer(seconds, os._exit, (0,))
    timer.daemon = True
    timer.start()
