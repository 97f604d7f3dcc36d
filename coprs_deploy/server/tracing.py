"""One OpenTelemetry span a request, sent over OTLP, as part of the client's trace if it has one.

Resource attributes, headers of the collector and sampling are those of OpenTelemetry's own
environment variables, such as ``OTEL_SERVICE_NAME`` and ``OTEL_TRACES_SAMPLER``.
"""

from __future__ import annotations

from dataclasses import asdict

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from coprs_deploy.server.request_log import QUIET_PATHS
from coprs_deploy.server.request_record import RequestRecord
from coprs_deploy.version import __version__

NAME = "coprs-deploy"


class RequestTracing:
    """ASGI middleware: a span with status and error, and an event with the times of each result.

    Args:
        app: the wrapped application.
        processor: where spans go, as from :func:`otlp_processor`.
    """

    def __init__(self, app: ASGIApp, processor: SpanProcessor) -> None:
        self._app = app
        resource = Resource.create({SERVICE_NAME: NAME, SERVICE_VERSION: __version__})
        provider = TracerProvider(resource=resource)
        provider.add_span_processor(processor)
        self._tracer = provider.get_tracer(NAME, __version__)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward a request inside a span."""
        if scope["type"] != "http" or scope["path"] in QUIET_PATHS:
            await self._app(scope, receive, send)
            return
        record = RequestRecord.of(scope)
        context = TraceContextTextMapPropagator().extract(dict(Headers(scope=scope)))
        name = f"{scope['method']} {scope['path']}"
        with self._tracer.start_as_current_span(name, context, SpanKind.SERVER) as span:
            span.set_attribute("http.request.method", scope["method"])
            span.set_attribute("url.path", scope["path"])
            span.set_attribute("coprs.request_id", record.request_id)
            try:
                await self._app(scope, receive, send)
            finally:
                span.set_attribute("http.response.status_code", record.status)
                span.set_attribute("coprs.instructions", record.num_instructions)
                for timings in record.timings:
                    span.add_event("result", asdict(timings))
                if record.error:
                    span.set_attribute("error.type", record.error)
                if record.status >= 500:
                    span.set_status(Status(StatusCode.ERROR, record.error))


def otlp_processor(endpoint: str) -> SpanProcessor:
    """Return a processor that sends spans to a collector, as ``http://localhost:4318/v1/traces``."""
    return BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint))
