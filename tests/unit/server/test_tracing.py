"""Spans of requests, in the memory of OpenTelemetry's own exporter."""

import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from coprs_deploy.errors import PolicyError
from tests.unit.runtime_fakes import FakePolicy
from tests.unit.server.clients import connect_to, post

TRACE = "0af7651916cd43dd8448eb211c80319c"


@pytest.fixture
def exporter():
    return InMemorySpanExporter()


def test_span_has_the_stages_of_each_result(build, exporter):
    options = {"span_processor": SimpleSpanProcessor(exporter)}
    client, _ = connect_to(build, app_options=options)
    headers = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01", "X-Request-ID": "one"}
    assert post(client, headers=headers, instructions=["a", "b"]).status_code == 200
    client.get("/health")
    (span,) = exporter.get_finished_spans()
    assert (span.name, f"{span.context.trace_id:032x}") == ("POST /segment", TRACE)
    assert span.attributes["coprs.request_id"] == "one"
    assert span.attributes["http.response.status_code"] == 200
    assert [event.attributes["response_tokens"] for event in span.events] == [7, 7]
    assert span.status.status_code is StatusCode.UNSET


def test_span_of_a_failure_has_its_type(build, exporter):
    def fail():
        raise PolicyError("no memory")

    options = {"span_processor": SimpleSpanProcessor(exporter)}
    client, _ = connect_to(build, FakePolicy(during=fail), options)
    post(client)
    (span,) = exporter.get_finished_spans()
    assert span.attributes["error.type"] == "PolicyError"
    assert span.status.status_code is StatusCode.ERROR
