"""Serve segmentation over HTTP.

Requests are accepted after graphs and policy are loaded and warmed up. GET / is a web page, GET
/docs describes the interface, GET /health/ready reports readiness, GET /metrics is for Prometheus:

  curl -F image=@photo.jpg -F "instruction=the cup that is about to fall" localhost:8000/segment
  curl -N -H "Accept: text/event-stream" -F ... localhost:8000/segment    stream of events

With API keys, clients send theirs as "Authorization: Bearer KEY". To make one, which is printed and
whose hash is added to the file:

  coprs-deploy serve --api-keys keys.json --new-api-key alice

docs/security.md lists what the server checks and what is left to a reverse proxy.

With --engine ray, replicas on a Ray cluster serve; SIGHUP then replaces them one after another.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import signal
import socket
import ssl
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coprs_deploy.cli.options import add_options, read_options
from coprs_deploy.cli.parser import log
from coprs_deploy.cli.runtime_arguments import (
    GRAPHS,
    POLICY,
    QUEUE,
    add_bundle_argument,
    open_runtime,
)
from coprs_deploy.errors import CoPRSError, import_failure, install_hint
from coprs_deploy.images import MAX_IMAGE_PIXELS
from coprs_deploy.runtime import RuntimeOptions
from coprs_deploy.runtime.ray_cluster import RayOptions, read_ray_options

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor

    from coprs_deploy.server.api_keys import ApiKeys

PORTS = range(1 << 16)

OPTIONS = QUEUE + GRAPHS + POLICY

API_KEY_VARIABLE = "COPRS_API_KEY"

LOCAL_OPTIONS = (
    "api_keys",
    "new_api_key",
    "requests_per_minute",
    "max_concurrent",
    "tls_cert",
    "tls_key",
    "otlp_endpoint",
    "access_log",
    "drain",
)
"""Options that ``--engine ray`` does not take."""

POLL_S = 1.0
"""How often the main thread looks whether replicas are to be replaced."""

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
        "--api-keys",
        type=Path,
        metavar="FILE",
        help="file of hashed keys with names and limits; it is read again when it changes",
    )
    parser.add_argument(
        "--new-api-key", metavar="NAME", help="add a key to the file, print it, and end"
    )
    parser.add_argument(
        "--requests-per-minute",
        type=int,
        metavar="N",
        help="limit of each API key that has none of its own in the file",
    )
    parser.add_argument(
        "--max-concurrent",
        type=int,
        metavar="N",
        help="limit of active requests of each API key that has none of its own in the file",
    )
    parser.add_argument(
        "--max-pixels",
        type=int,
        default=MAX_IMAGE_PIXELS,
        metavar="N",
        help=f"pixels of an image (default: {MAX_IMAGE_PIXELS:,})",
    )
    parser.add_argument(
        "--tls-cert", type=Path, metavar="FILE", help="certificate chain (PEM): serve HTTPS"
    )
    parser.add_argument(
        "--tls-key", type=Path, metavar="FILE", help="private key of the certificate (PEM)"
    )
    parser.add_argument(
        "--log-format",
        choices=("text", "json"),
        default="text",
        help="log as text or as one JSON object a line (default: text)",
    )
    parser.add_argument(
        "--access-log", action="store_true", help="log each request with its id, status and time"
    )
    parser.add_argument(
        "--otlp-endpoint",
        metavar="URL",
        help="OpenTelemetry collector for a span of each request, such as "
        "http://localhost:4318/v1/traces",
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
    parser.add_argument(
        "--drain",
        type=float,
        default=0,
        metavar="SECONDS",
        help="time between the signal, when /health/ready turns to 503, and the end of accepting "
        "(default: 0)",
    )
    add_options(parser, RuntimeOptions, OPTIONS)


def run(arguments: argparse.Namespace) -> int:
    """Load, warm up, and listen until the process is interrupted."""
    if arguments.port not in PORTS:
        raise ValueError(f"--port is {arguments.port}; it must be from 0 to {PORTS[-1]}")
    if not 0 < arguments.max_upload < float("inf"):
        raise ValueError(
            f"--max-upload is {arguments.max_upload}; it must be above 0 MiB, and finite"
        )
    for name in ("grace_period", "drain"):
        if not 0 <= getattr(arguments, name) < float("inf"):
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} is {getattr(arguments, name)}; it must be at least 0 s")
    if arguments.max_pixels < 1:
        raise ValueError(f"--max-pixels is {arguments.max_pixels}; it must be at least 1")
    check_root_path(arguments.root_path)
    check_origins(arguments.cors_origin)
    check_tls(arguments.tls_cert, arguments.tls_key)
    arguments.api_key = read_api_key(arguments.api_key)
    check_limits(arguments)
    options = read_options(arguments, RuntimeOptions, OPTIONS)
    scale = read_ray_options(arguments.replicas, arguments.ray_address)
    if arguments.engine == "local" and scale != RayOptions():
        raise ValueError("--replicas and --ray-address are accepted with --engine ray only")
    if arguments.engine == "ray":
        check_ray(arguments)
    try:
        import fastapi_offline  # noqa: F401
        import prometheus_client  # noqa: F401
        import python_multipart  # noqa: F401
        import uvicorn  # noqa: F401
        from fastapi import FastAPI  # noqa: F401
    except ImportError as error:
        raise import_failure(error, "", install_hint("serve"), needed_by="serving") from error
    if arguments.new_api_key is not None:
        print(_new_key(arguments))
        return 0
    keys = _read_keys(arguments)
    spans = None if arguments.otlp_endpoint is None else _spans(arguments.otlp_endpoint)
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
            _serve(arguments, options, listener, keys, spans)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return 0


def _serve(
    arguments: argparse.Namespace,
    options: RuntimeOptions,
    listener: socket.socket,
    keys: ApiKeys | None,
    spans: SpanProcessor | None,
) -> None:
    from coprs_deploy.server.app import build_app
    from coprs_deploy.server.logs import LOGGER, configure_logs
    from coprs_deploy.server.process import ProcessOptions, run_server

    sys.setswitchinterval(SWITCH_INTERVAL_S)
    undo = configure_logs(arguments.log_format, access_log=arguments.access_log)
    say = log if arguments.log_format == "text" else logging.getLogger(LOGGER).info
    try:
        with open_runtime(arguments.bundle, options, say, say) as coprs:
            coprs.warm_up()
            app = build_app(coprs, **_app_options(arguments), api_keys=keys, span_processor=spans)
            try:
                listener.listen()  # connections are accepted from here on
                address, port = listener.getsockname()[:2]
                say(coprs.description)
                scheme = "http" if arguments.tls_cert is None else "https"
                say(f"{scheme}://{f'[{address}]' if ':' in address else address}:{port}")
                process = ProcessOptions(
                    arguments.grace_period,
                    arguments.drain,
                    arguments.tls_cert,
                    arguments.tls_key,
                )
                run_server(app, listener, process)
            except KeyboardInterrupt:  # uvicorn raises it again after its shutdown
                say("stopped")
    finally:
        undo()


def _app_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of ``build_app``."""
    from coprs_deploy.server.request_guard import MIB

    return {
        "max_upload_bytes": int(arguments.max_upload * MIB),
        "root_path": arguments.root_path,
        "cors_origins": arguments.cors_origin,
        "max_pixels": arguments.max_pixels,
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
        _app_options(arguments) | {"api_key": arguments.api_key},
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
                    try:
                        server.replace_replicas()
                    except CoPRSError as error:
                        log(f"replicas were not replaced: {error}")
                    else:
                        log("replicas were replaced")
        except KeyboardInterrupt:
            log("stopped")


def _new_key(arguments: argparse.Namespace) -> str:
    from coprs_deploy.server.api_keys import new_key

    if arguments.api_keys is None:
        raise ValueError("--new-api-key needs --api-keys FILE, to which its hash is added")
    return new_key(arguments.api_keys, arguments.new_api_key)


def _read_keys(arguments: argparse.Namespace) -> ApiKeys | None:
    from coprs_deploy.server.api_keys import ApiKeys

    if not arguments.api_key and arguments.api_keys is None:
        return None
    return ApiKeys(
        arguments.api_key,
        arguments.api_keys,
        arguments.requests_per_minute,
        arguments.max_concurrent,
    )


def _spans(endpoint: str) -> SpanProcessor:
    if not re.fullmatch(r"https?://[^/?#\s]+(/\S*)?", endpoint):
        raise ValueError(
            f"--otlp-endpoint is {endpoint!r}; accepted: a URL such as "
            "http://localhost:4318/v1/traces"
        )
    try:
        from coprs_deploy.server.tracing import otlp_processor
    except ImportError as error:
        hint = install_hint("otel")
        raise import_failure(error, "opentelemetry", hint, needed_by="--otlp-endpoint") from error
    return otlp_processor(endpoint)


def check_ray(arguments: argparse.Namespace) -> None:
    """Refuse what replicas would not share, and what belongs to the proxy before them.

    Raises:
        ValueError: such an option is given.
    """
    for name in LOCAL_OPTIONS:
        if getattr(arguments, name):
            option = f"--{name.replace('_', '-')}"
            raise ValueError(
                f"{option} is accepted with --engine local only; leave it to the proxy before Ray"
            )


def check_limits(arguments: argparse.Namespace) -> None:
    """Refuse limits of API keys that are not positive, or that no key has.

    Raises:
        ValueError: a limit is below 1, or there is no key.
    """
    for name in ("requests_per_minute", "max_concurrent"):
        limit, option = getattr(arguments, name), f"--{name.replace('_', '-')}"
        if limit is None:
            continue
        if limit < 1:
            raise ValueError(f"{option} is {limit}; it must be at least 1")
        if not arguments.api_key and arguments.api_keys is None:
            raise ValueError(f"{option} limits each API key; add --api-keys or --api-key")


def check_tls(certificate: Path | None, key: Path | None) -> None:
    """Check, before anything is loaded, that a certificate and its key can be used.

    Raises:
        ValueError: they cannot, or there is a key only.
    """
    if certificate is None:
        if key is not None:
            raise ValueError(f"--tls-key is {key}; accepted: with --tls-cert only")
        return
    for path in filter(None, (certificate, key)):
        if not path.is_file():
            raise ValueError(f"{path} is no file; accepted: a certificate or key as PEM")
    try:
        # Without a password: an encrypted key would ask for it on the terminal.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key, password=lambda: "")
    except (ssl.SSLError, OSError) as error:
        named = f"{certificate} and {key}" if key else f"{certificate}"
        raise ValueError(
            f"{named} cannot be used for TLS ({error}); accepted: PEM files of a certificate chain "
            "and of its private key, without a password"
        ) from error


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
