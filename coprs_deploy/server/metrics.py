"""Metrics of the server for Prometheus.

Counters and histograms are kept where requests end; what can be read at any time (the queue,
memory) is read at each ``GET /metrics``. Each application has a registry of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import fields

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    Info,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import choose_encoder

from coprs_deploy.engines.cuda import gpu_memory
from coprs_deploy.runtime import CoPRS, SegmentationResult, Timings
from coprs_deploy.runtime.concurrency import ImageMemory
from coprs_deploy.version import __version__

# Else each series has another one with the time of its start.
disable_created_metrics()  # type: ignore[no-untyped-call]

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
"""Bounds of the histograms: one graph on a GPU to long reasoning on a CPU."""

TOKENS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)

STAGES = tuple(
    field.name.removesuffix("_ms") for field in fields(Timings) if field.name.endswith("_ms")
)

METHODS = ("GET", "HEAD", "POST", "OPTIONS")

OTHER = "other"


class ServerMetrics:
    """Metrics of one application.

    Args:
        coprs: serves the requests.
        image_memory: memory of the decoded images.
        paths: paths that are told apart; all others are ``other``, so that no client can make up
            new time series.
    """

    def __init__(self, coprs: CoPRS, image_memory: ImageMemory, paths: frozenset[str]) -> None:
        self._paths = paths
        registry = self._registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        registry.register(_Gauges(coprs, image_memory))
        info = Info("coprs_build", "Version, and runtimes with their devices.", registry=registry)
        info.info({"version": __version__, "runtime": coprs.description})
        self._requests = Counter(
            "coprs_http_requests",
            "HTTP requests by method, path and status; status 499 is a client that left.",
            ("method", "path", "status"),
            registry=registry,
        )
        self._durations = Histogram(
            "coprs_http_request_duration_seconds",
            "Time from the head of a request to the end of its response.",
            ("path", "status"),
            buckets=SECONDS,
            registry=registry,
        )
        self._failures = Counter(
            "coprs_failures",
            "Requests that ended with an error, by the type in its body.",
            ("type",),
            registry=registry,
        )
        self._stages = Histogram(
            "coprs_stage_duration_seconds",
            "Time of each stage of an answered instruction; image_encoder is left out if the "
            "embedding was cached.",
            ("stage",),
            buckets=SECONDS,
            registry=registry,
        )
        self._tokens = Counter(
            "coprs_tokens",
            "Tokens by kind: prompt (cached_prompt of them were in a cache) and response.",
            ("kind",),
            registry=registry,
        )
        self._response_tokens = Histogram(
            "coprs_response_tokens_per_instruction",
            "Tokens of one response.",
            buckets=TOKENS,
            registry=registry,
        )
        self._results = Counter(
            "coprs_results",
            "Answered instructions by what ended the response, and whether a target was found.",
            ("stop_reason", "found"),
            registry=registry,
        )
        self._targets = Counter("coprs_targets", "Masks that were returned.", registry=registry)

    def observe_result(self, result: SegmentationResult) -> None:
        """Count an answered instruction and the times of its stages."""
        timings = result.timings
        for stage in STAGES:
            milliseconds = getattr(timings, f"{stage}_ms")
            is_cached = stage.startswith("image_encoder") and not timings.image_encoder_ms
            if not is_cached:
                self._stages.labels(stage).observe(milliseconds / 1e3)
        self._tokens.labels("prompt").inc(timings.prompt_tokens)
        self._tokens.labels("cached_prompt").inc(timings.cached_prompt_tokens)
        self._tokens.labels("response").inc(timings.response_tokens)
        self._response_tokens.observe(timings.response_tokens)
        self._results.labels(result.stop_reason, str(result.found).lower()).inc()
        self._targets.inc(len(result.masks))

    def observe_request(
        self, method: str, path: str, status: int, error: str, seconds: float
    ) -> None:
        """Count a request that has ended."""
        method = method if method in METHODS else OTHER
        path = path if path in self._paths else OTHER
        self._requests.labels(method, path, str(status)).inc()
        self._durations.labels(path, str(status)).observe(seconds)
        if error:
            self._failures.labels(error).inc()

    def write(self, accept: str) -> tuple[bytes, str]:
        """Return the metrics in the format that an Accept header prefers, and its media type."""
        encode, media_type = choose_encoder(accept)
        return encode(self._registry), media_type


class _Gauges:
    """Values that are read at each request."""

    def __init__(self, coprs: CoPRS, image_memory: ImageMemory) -> None:
        self._coprs = coprs
        self._image_memory = image_memory

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield the current values."""
        active, concurrency = self._coprs.num_active, self._coprs.concurrency
        values = {
            "coprs_requests_running": ("Instructions in work.", min(active, concurrency)),
            "coprs_requests_queued": ("Instructions that wait.", max(0, active - concurrency)),
            "coprs_requests_running_limit": ("Instructions that run at once.", concurrency),
            "coprs_requests_queued_limit": (
                "Instructions that may wait (--max-queue-size).",
                self._coprs.max_active - concurrency,
            ),
            "coprs_image_memory_bytes": (
                "Memory of decoded images.",
                self._image_memory.used_bytes,
            ),
        }
        for name, (about, value) in values.items():
            yield GaugeMetricFamily(name, about, value)
        memory = gpu_memory() if "torch" in sys.modules else []
        if not memory:
            return
        gauge = GaugeMetricFamily(
            "coprs_gpu_memory_bytes",
            "Memory of each GPU: in use by all processes, in total, and held by PyTorch here.",
            labels=("gpu", "kind"),
        )
        for gpu, kinds in enumerate(memory):
            for kind, num_bytes in kinds.items():
                gauge.add_metric((str(gpu), kind), num_bytes)
        yield gauge
