"""Answer over HTTP.

Graphs and policy are loaded and have answered once before the first request is taken. GET / is a
page to ask on, GET /health says that it is ready, GET /docs describes the interface:

  curl -F image=@photo.jpg -F "instruction=the cup that is about to fall" localhost:8000/segment
  curl -N -H "Accept: text/event-stream" -F ... localhost:8000/segment    words as they come

There is no login and no encryption: whoever reaches the port may ask. Beyond this machine, put it
behind a proxy that has both.
"""

from __future__ import annotations

import argparse
import signal
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from coprs_deploy.cli.parser import log
from coprs_deploy.cli.runtime_arguments import add_answering_arguments, runtime_options
from coprs_deploy.errors import MissingDependencyError

if TYPE_CHECKING:
    from coprs_deploy.runtime import RuntimeOptions

SUMMARY = "answer over HTTP, with a page"

PORTS = range(1 << 16)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of this verb."""
    parser.add_argument(
        "bundle",
        metavar="BUNDLE",
        type=Path,
        nargs="?",
        help="the bundle that answers (default: the shipped model)",
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: this machine only)"
    )
    parser.add_argument("--port", type=int, default=8000, help="default 8000; 0 takes a free one")
    parser.add_argument(
        "--max-upload", type=float, default=32, metavar="MIB", help="largest request (default 32)"
    )
    parser.add_argument(
        "--max-waiting", type=int, default=256, help="answers that may wait (default 256)"
    )
    parser.add_argument(
        "--timeout", type=float, metavar="SECONDS", help="for an answer (default: none)"
    )
    add_answering_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Load, warm up, listen until the process is told to stop."""
    if arguments.port not in PORTS:
        raise ValueError(f"--port is {arguments.port}; it must be from 0 to {PORTS[-1]}")
    if arguments.max_upload <= 0:
        raise ValueError(f"--max-upload is {arguments.max_upload}; it must be above 0 MiB")
    options = runtime_options(
        arguments, max_queue_size=arguments.max_queue_size, timeout_s=arguments.timeout
    )
    try:
        import python_multipart  # noqa: F401
        import uvicorn  # noqa: F401
        from fastapi import FastAPI  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            f"serving needs {error.name}; pip install 'coprs-deploy[serve]'"
        ) from error
    # What a container is stopped with ends this as Ctrl-C does: answers under way are finished.
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with _reserve(arguments.host, arguments.port) as place:
            _serve(arguments, options, place)
    finally:
        signal.signal(signal.SIGTERM, previous)
    return 0


def _serve(arguments: argparse.Namespace, options: RuntimeOptions, place: socket.socket) -> None:
    import uvicorn

    from coprs_deploy.runtime import CoPRS
    from coprs_deploy.server.app import build_app
    from coprs_deploy.server.body_limit import MIB

    with CoPRS.load(arguments.bundle, options, progress=log) as coprs:
        for choice in coprs.choices:
            log(str(choice))
        coprs.warm_up()
        app = build_app(coprs, int(arguments.max_upload * MIB))
        place.listen()  # who connects from now on is answered
        address, port = place.getsockname()[:2]
        log(coprs.description)
        log(f"http://{f'[{address}]' if ':' in address else address}:{port}")
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        try:
            server.run(sockets=[place])
        except KeyboardInterrupt:  # raised again by the server when it has ended
            log("stopped")


def _reserve(host: str, port: int) -> socket.socket:
    """Take the address before the minutes that loading may last; nobody can connect to it yet."""
    place = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        place.bind((host, port))
    except OSError as error:
        place.close()
        raise ValueError(
            f"cannot listen on {host}, port {port}: {error.strerror}; name others with --host and "
            "--port"
        ) from error
    return place
