"""Serve segmentation over HTTP.

Requests are accepted after graphs and policy are loaded and warmed up. GET / is a web page,
GET /health reports readiness, GET /openapi.json describes the interface:

  curl -F image=@photo.jpg -F "instruction=the cup that is about to fall" localhost:8000/segment
  curl -N -H "Accept: text/event-stream" -F ... localhost:8000/segment    stream of events

With --engine ray, replicas on a Ray cluster serve; SIGHUP then replaces them one after another.

With an API key, clients send it as "Authorization: Bearer KEY". No TLS: to expose the server beyond
localhost, put it behind a reverse proxy.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from typing import Any

from coprs_deploy.cli.options import add_options, read_options
from coprs_deploy.cli.parser import log
from coprs_deploy.cli.runtime_arguments import (
    GRAPHS,
    POLICY,
    QUEUE,
    add_bundle_argument,
    open_runtime,
)
from coprs_deploy.errors import import_failure, install_hint
from coprs_deploy.runtime import RuntimeOptions
from coprs_deploy.runtime.ray_cluster import RayOptions, read_ray_options

PORTS = range(1 << 16)

OPTIONS = QUEUE + GRAPHS + POLICY

API_KEY_VARIABLE = "COPRS_API_KEY"

EXIT_TIMEOUT_S = 10
"""Time for closing after the last response; then the process ends even if a step is running."""

POLL_S = 1.0

SWITCH_INTERVAL_S = 0.001
"""How long a thread keeps the interpreter while the event loop waits; Python's default is 5 ms."""


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
    parser.add_argument(
        "--root-path",
        default="",
        metavar="PATH",
        help="path under which a reverse proxy serves this server, such as /segmentation",
    )
    parser.add_argument(
        "--cors-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="origin whose pages may use the server, such as https://example.org, or * for any; "
        "may be repeated",
    )
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        help=f"key that POST requests need (default: {API_KEY_VARIABLE}, which keeps it out of the "
        "list of processes)",
    )
    parser.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="what serves: this process, or replicas on a Ray cluster",
    )
    parser.add_argument(
        "--replicas",
        metavar="MIN:MAX",
        help="ray: number of replicas, which follows the length of the queue; each has a GPU, or "
        "--num-threads cores (default: 1)",
    )
    parser.add_argument(
        "--ray-address",
        metavar="ADDRESS",
        help="ray: address of the cluster (default: RAY_ADDRESS, else one on this machine)",
    )
    parser.add_argument(
        "--grace-period",
        type=float,
        default=5,
        metavar="SECONDS",
        help="time for running requests to finish at SIGTERM or Ctrl-C (default: 5)",
    )
    add_options(parser, RuntimeOptions, OPTIONS)


def run(arguments: argparse.Namespace) -> int:
    """Load, warm up, and listen until the process is interrupted."""
    if arguments.port not in PORTS:
        raise ValueError(f"--port is {arguments.port}; it must be from 0 to {PORTS[-1]}")
    if arguments.max_upload <= 0:
        raise ValueError(f"--max-upload is {arguments.max_upload}; it must be above 0 MiB")
    if not 0 <= arguments.grace_period < float("inf"):
        raise ValueError(f"--grace-period is {arguments.grace_period}; it must be at least 0 s")
    check_root_path(arguments.root_path)
    check_origins(arguments.cors_origin)
    arguments.api_key = read_api_key(arguments.api_key)
    options = read_options(arguments, RuntimeOptions, OPTIONS)
    scale = read_ray_options(arguments.replicas, arguments.ray_address)
    if arguments.engine == "local" and scale != RayOptions():
        raise ValueError("--replicas and --ray-address are accepted with --engine ray only")
    try:
        import python_multipart  # noqa: F401
        import uvicorn  # noqa: F401
        from fastapi import FastAPI  # noqa: F401
    except ImportError as error:
        raise import_failure(error, "", install_hint("serve"), needed_by="serving") from error
    # SIGTERM, which stops a container, and SIGHUP end the server like Ctrl-C.
    previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if previous[signal.SIGHUP] != signal.SIG_IGN:  # nohup ignores it
        signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))
    try:
        if arguments.engine == "ray":
            _serve_on_ray(arguments, options, scale)
            return 0
        with _bind(arguments.host, arguments.port) as listener:
            _serve(arguments, options, listener)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return 0


def _serve(arguments: argparse.Namespace, options: RuntimeOptions, listener: socket.socket) -> None:
    import uvicorn

    from coprs_deploy.server.app import build_app
    from coprs_deploy.server.connection import TimedConnection

    sys.setswitchinterval(SWITCH_INTERVAL_S)
    with open_runtime(arguments.bundle, options, log) as coprs:
        coprs.warm_up()
        app = build_app(coprs, **_app_options(arguments))
        config = uvicorn.Config(
            app,
            http=TimedConnection,
            log_level="warning",
            timeout_graceful_shutdown=arguments.grace_period,
        )
        server = uvicorn.Server(config)
        try:
            listener.listen()  # connections are accepted from here on
            address, port = listener.getsockname()[:2]
            log(coprs.description)
            log(f"http://{f'[{address}]' if ':' in address else address}:{port}")
            server.run(sockets=[listener])
        except KeyboardInterrupt:  # uvicorn raises it again after its shutdown
            log("stopped")
        finally:
            _exit_after(EXIT_TIMEOUT_S)


def _app_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of ``build_app``."""
    from coprs_deploy.server.request_guard import MIB

    return {
        "max_upload_bytes": int(arguments.max_upload * MIB),
        "api_key": arguments.api_key,
        "root_path": arguments.root_path,
        "cors_origins": arguments.cors_origin,
        "has_samples": arguments.bundle is None,
    }


def _serve_on_ray(
    arguments: argparse.Namespace, options: RuntimeOptions, scale: RayOptions
) -> None:
    from coprs_deploy.server.ray_serve import RayServer, ReplicaOptions

    is_due = threading.Event()
    replica = ReplicaOptions(
        arguments.bundle and arguments.bundle.absolute(),
        options,
        _app_options(arguments),
        arguments.grace_period,
    )
    with RayServer(replica, scale, arguments.host, arguments.port) as server:
        # Ray has installed handlers of its own.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        signal.signal(signal.SIGHUP, lambda *_: is_due.set())
        log(f"{scale.min_replicas} to {scale.max_replicas} replicas on Ray")
        log(f"http://{arguments.host}:{arguments.port}")
        try:
            while True:
                if is_due.wait(POLL_S):
                    is_due.clear()
                    log("replicas are replaced")
                    server.replace_replicas()
                    log("replicas were replaced")
        except KeyboardInterrupt:
            log("stopped")


def _exit_after(seconds: float) -> None:
    """End the process even if a thread is in a step that cannot be interrupted, as a prefill."""
    timer = threading.Timer(seconds, os._exit, (0,))
    timer.daemon = True
    timer.start()


def check_root_path(path: str) -> None:
    """Refuse a path that no reverse proxy can serve.

    Raises:
        ValueError: the path does not start with a slash, or ends with one.
    """
    if path and not re.fullmatch(r"(/[^/?#\s]+)+", path):
        raise ValueError(f"--root-path is {path!r}; accepted: a path such as /segmentation")


def check_origins(origins: Sequence[str]) -> None:
    """Refuse origins that no browser sends.

    Raises:
        ValueError: an origin is neither ``*`` nor a scheme with a host and an optional port.
    """
    for origin in origins:
        if origin != "*" and not re.fullmatch(r"https?://[^/?#\s]+", origin):
            raise ValueError(
                f"--cors-origin is {origin!r}; accepted: * or an origin such as https://example.org"
            )


def read_api_key(given: str | None) -> str:
    """Return the API key from the command line or the environment; empty for none.

    Raises:
        ValueError: the key is empty, or holds characters that a header cannot carry.
    """
    key = os.environ.get(API_KEY_VARIABLE) if given is None else given
    if key is None:
        return ""
    if not re.fullmatch(r"[!-~]+", key):
        name = API_KEY_VARIABLE if given is None else "--api-key"
        raise ValueError(f"{name} is empty or holds other than visible ASCII characters")
    return key


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
