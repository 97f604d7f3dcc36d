"""The server's application on Ray Serve: replicas with a bundle each, on one node or many.

Serve's proxies take the connections and hand each request to a replica that has room. Replicas are
added while requests wait, and one is replaced by another without a lost request.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from coprs_deploy.closing import Closeable
from coprs_deploy.errors import CoPRSError, import_failure, install_hint
from coprs_deploy.runtime import CoPRS, RuntimeOptions
from coprs_deploy.runtime.ray_cluster import RayOptions, connect, replica_resources

APPLICATION = "coprs"
"""Name of the application and of its deployment."""

TARGET_REQUESTS = 2
"""Requests of a replica, for each that its policy decodes at once, from which another replica is
started: one that is served and one that waits."""

MAX_REQUESTS = 8
"""Requests that a replica takes, for each that its policy decodes at once; others wait in the
proxies."""

UPSCALE_DELAY_S, DOWNSCALE_DELAY_S = 5.0, 120.0
"""How long the queue is long, or short, before a replica is started or stopped."""


@dataclass(frozen=True)
class ReplicaOptions:
    """What each replica loads.

    Attributes:
        bundle: directory of the bundle, the same on every node; None is the demo model.
        runtime: where and how it runs.
        app: arguments of ``build_app``.
        grace_period_s: time for running requests to finish when a replica is replaced or stopped.
        generation: another one replaces all replicas.
    """

    bundle: Path | None = None
    runtime: RuntimeOptions = field(default_factory=RuntimeOptions)
    app: Mapping[str, Any] = field(default_factory=dict)
    grace_period_s: float = 20.0
    generation: int = 0


class Replica:
    """A loaded bundle behind the server's application, as ``serve.ingress`` takes it."""

    def __init__(self, options: ReplicaOptions) -> None:
        self._options, runtime = options, options.runtime
        if runtime.is_on_cpu and runtime.num_threads is None:
            runtime = replace(runtime, num_threads=1)  # the core that Ray reserves
        self._coprs = CoPRS.load(options.bundle, runtime)
        self._coprs.warm_up()

    def __serve_build_asgi_app__(self) -> Any:
        """Build the application; Serve calls it after the constructor."""
        from coprs_deploy.server.app import build_app

        return build_app(self._coprs, **self._options.app)

    def __del__(self) -> None:
        """Free graphs and policy; Serve calls it when the replica has no request."""
        if hasattr(self, "_coprs"):
            self._coprs.close()


def build_application(options: ReplicaOptions, scale: RayOptions) -> Any:
    """Return the application for ``serve.run``.

    Args:
        options: what each replica loads.
        scale: number of replicas.

    Raises:
        MissingDependencyError: Ray Serve is not installed.
    """
    serve, runtime = import_serve(), options.runtime
    at_once = runtime.vllm.max_num_seqs if runtime.policy == "vllm" else 1
    deployment = serve.deployment(
        name=APPLICATION,
        max_ongoing_requests=MAX_REQUESTS * at_once,
        graceful_shutdown_timeout_s=options.grace_period_s,
        graceful_shutdown_wait_loop_s=0.5,
        ray_actor_options=replica_resources(runtime),
        autoscaling_config={
            "min_replicas": scale.min_replicas,
            "initial_replicas": scale.min_replicas,
            "max_replicas": scale.max_replicas,
            "target_ongoing_requests": TARGET_REQUESTS * at_once,
            "upscale_delay_s": UPSCALE_DELAY_S,
            "downscale_delay_s": DOWNSCALE_DELAY_S,
        },
    )
    return deployment(serve.ingress()(Replica)).bind(options)


def import_serve() -> Any:
    """Import Ray Serve; MissingDependencyError if it is not installed."""
    try:
        from ray import serve
    except ImportError as error:
        raise import_failure(error, "", install_hint("ray"), needed_by="--engine ray") from error
    return serve


class RayServer(Closeable):
    """The application on a cluster until it is closed.

    Args:
        options: what each replica loads.
        scale: number of replicas, and the cluster.
        host: address that the proxies listen on.
        port: their port.

    Raises:
        CoPRSError: a replica could not be started, or there is no cluster.
        MissingDependencyError: Ray Serve is not installed.
    """

    def __init__(self, options: ReplicaOptions, scale: RayOptions, host: str, port: int) -> None:
        self._serve = import_serve()
        connect(scale.address)
        self._options, self._scale = options, scale
        self._serve.start(http_options={"host": host, "port": port})
        try:
            self._deploy()
        except BaseException:  # also Ctrl-C: the cluster would go on loading
            self.close()
            raise

    def replace_replicas(self) -> None:
        """Replace each replica by a new one, without a lost request; return when it is done."""
        self._options = replace(self._options, generation=self._options.generation + 1)
        self._deploy()

    def close(self) -> None:
        """Stop the application; running requests have the grace period to finish."""
        self._serve.delete(APPLICATION)

    def _deploy(self) -> None:
        application = build_application(self._options, self._scale)
        try:
            self._serve.run(application, name=APPLICATION, route_prefix="/")
        except RuntimeError as error:
            raise CoPRSError(f"Ray Serve could not start the server: {error}") from error
