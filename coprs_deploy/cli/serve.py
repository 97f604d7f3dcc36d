"""Serve segmentation over HTTP.

Requests are accepted after graphs and policy are loaded and warmed up. GET / is a web page,
GET /health reports readiness, GET /docs describes the API:

  curl -F image=@photo.jpg -F "instruction=the cup that is about to fall" localhost:8000/segment
  curl -N -H "Accept: text/event-stream" -F ... localhost:8000/segment    stream of events

No authentication or TLS. To expose beyond localhost, put it behind a reverse proxy.
"""

from __future__ import annotations

import argparse
import signal
import socket

from coprs_deploy.cli.options import add_options, read_options
from coprs_deploy.cli.parser import log
from coprs_deploy.cli.runtime_arguments import (
    GRAPHS,
    POLICY,
    QUEUE,
    add_bundle_argument,
    open_runtime,
)
from coprs_deploy.errors import MissingDependencyError, install_hint
from coprs_deploy.runtime import RuntimeOptions

PORTS = range(1 << 16)

OPTIONS = QUEUE + GRAPHS + POLICY


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of this verb."""
    add_bundle_argument(parser)
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)"
    )
    parser.add_argument(
        "--port", type=int, default=8000, help="port; 0 for a free one (default: 8000)"
    )
    parser.add_argument(
        "--max-upload",
        type=float,
        default=32,
        metavar="MIB",
        help="size limit of a request (default: 32)",
    )
    add_options(parser, RuntimeOptions, OPTIONS)


def run(arguments: argparse.Namespace) -> int:
    """Load, warm up, and listen until the process is interrupted."""
    if arguments.port not in PORTS:
        raise ValueError(f"--port is {arguments.port}; it must be from 0 to {PORTS[-1]}")
    if arguments.max_upload <= 0:
        raise ValueError(f"--max-upload is {arguments.max_upload}; it must be above 0 MiB")
    options = read_options(arguments, RuntimeOptions, OPTIONS)
    try:
        import python_multipart  # noqa: F401
        import uvicorn  # noqa: F401
        from fastapi import FastAPI  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            f"serving needs {error.name}; {install_hint('serve')}"
        ) from error
    # SIGTERM, which stops a container, ends the server like Ctrl-C: running requests finish.
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with _bind(arguments.host, arguments.port) as listener:
            _serve(arguments, options, listener)
    finally:
        signal.signal(signal.SIGTERM, previous)
    return 0


def _serve(arguments: argparse.Namespace, options: RuntimeOptions, listener: socket.socket) -> None:
    import uvicorn

    from coprs_deploy.server.app import build_app
    from coprs_deploy.server.body_limit import MIB

    with open_runtime(arguments.bundle, options, log) as coprs:
        coprs.warm_up()
        app = build_app(coprs, int(arguments.max_upload * MIB))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        try:
            listener.listen()  # connections are accepted from here on
            address, port = listener.getsockname()[:2]
            log(coprs.description)
            log(f"http://{f'[{address}]' if ':' in address else address}:{port}")
            server.run(sockets=[listener])
        except KeyboardInterrupt:  # uvicorn raises it again after its shutdown
            log("stopped")


def _bind(host: str, port: int) -> socket.socket:
    """Bind the address before loading, which may take minutes; no connection is accepted yet."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ValueError(
            f"cannot listen on {host}, port {port}: {error.strerror}; choose another --host or "
            "--port"
        ) from error
    return listener
