"""Metrics, request ids and logs."""

import io
import json
import logging
import sys
import threading

import pytest
from prometheus_client.parser import text_string_to_metric_families

from coprs_deploy.errors import PolicyError
from coprs_deploy.server import metrics
from coprs_deploy.server.bodies import EVENT_STREAM
from coprs_deploy.server.logs import configure_logs
from coprs_deploy.server.metrics import STAGES
from tests.unit.runtime_fakes import WAIT, FakePolicy
from tests.unit.server.clients import connect_to, post


def values_of(client):
    """Return the values of all series by name and labels."""
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    return {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


class TestMetrics:
    def test_results_are_counted_with_their_stages_and_tokens(self, build):
        client, _ = connect_to(build)
        post(client, max_targets=2)
        post(client, headers={"Accept": EVENT_STREAM})
        values = values_of(client)
        assert values["coprs_results_total", "targets_reached", "true"] == 2
        assert values["coprs_targets_total",] == 3
        assert values["coprs_tokens_total", "prompt"] == 2 * 21
        assert values["coprs_tokens_total", "response"] == 2 * 7
        for stage in STAGES:
            count = 1 if stage.startswith("image_encoder") else 2  # the second one is cached
            assert values["coprs_stage_duration_seconds_count", stage] == count
        assert values["coprs_stage_duration_seconds_sum", "prefill"] == pytest.approx(2e-3)

    def test_requests_are_counted_by_path_and_status(self, build):
        client, _ = connect_to(build)
        post(client)
        post(client, b"no image")
        for name in ("a", "b"):
            client.get(f"/{name}")
        client.request("BREW", "/health")
        values = values_of(client)
        assert values["coprs_http_requests_total", "/segment", "200", "POST"] == 1
        assert values["coprs_http_requests_total", "/segment", "422", "POST"] == 1
        assert values["coprs_http_requests_total", "404", "GET", "other"] == 2
        assert values["coprs_http_requests_total", "/health", "405", "other"] == 1
        count = "coprs_http_request_duration_seconds_count"
        assert values[count, "/segment", "200"] == 1

    def test_failures_are_counted_by_type(self, build):
        def fail():
            raise next(errors)

        errors = iter([PolicyError("no memory"), RuntimeError("bug"), PolicyError("late")])
        client, _ = connect_to(build, FakePolicy(during=fail), {"api_key": "secret"})
        headers = {"Authorization": "Bearer secret"}
        assert [post(client, headers=headers).status_code for _ in range(2)] == [500, 500]
        post(client)
        post(client, b"no image", headers)
        post(client, bytes(200_000), headers)
        values = values_of(client)
        kinds = ("PolicyError", "RuntimeError", "Unauthorized", "ImageDecodeError", "TooLarge")
        assert [values["coprs_failures_total", kind] for kind in kinds] == [1] * 5

    def test_error_event_of_a_stream_is_counted(self, build):
        steps = iter([None, PolicyError("late")])

        def fail_at_the_second():
            if error := next(steps):
                raise error

        client, _ = connect_to(build, FakePolicy(during=fail_at_the_second))
        assert post(client, headers={"Accept": EVENT_STREAM}).status_code == 200
        assert values_of(client)["coprs_failures_total", "PolicyError"] == 1

    def test_queue_and_memory_are_those_of_the_moment(self, build):
        seen = []
        policy = FakePolicy(deltas=("text",), during=lambda: seen.append(values_of(client)))
        client, _ = connect_to(build, policy, max_queue_size=5)
        post(client)
        names = [f"coprs_requests_{name}" for name in ("running", "queued")]
        assert [seen[0][name,] for name in names] == [1, 0]
        assert seen[0]["coprs_requests_queued_limit",] == 5
        assert seen[0]["coprs_image_memory_bytes",] == 20 * 30 * 3
        after = values_of(client)
        assert [after[name,] for name in names] == [0, 0]
        assert after["coprs_image_memory_bytes",] == 0
        assert ("coprs_gpu_memory_bytes", "0", "used") not in after

    def test_waiting_requests_are_queued(self, build):
        begun, release = threading.Event(), threading.Event()
        policy = FakePolicy(during=lambda: (begun.set(), release.wait(WAIT)))
        client, _ = connect_to(build, policy)
        threads = [threading.Thread(target=post, args=(client,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        assert begun.wait(WAIT)
        while values_of(client)["coprs_requests_queued",] < 2:
            pass
        release.set()
        for thread in threads:
            thread.join()

    def test_memory_of_each_gpu_is_reported(self, build, monkeypatch):
        memory = [{"used": 5, "total": 9, "reserved": 3}, {"used": 1, "total": 9, "reserved": 0}]
        monkeypatch.setattr(metrics, "gpu_memory", lambda: memory)
        monkeypatch.setitem(sys.modules, "torch", object())
        values = values_of(connect_to(build)[0])
        assert values["coprs_gpu_memory_bytes", "0", "used"] == 5
        assert values["coprs_gpu_memory_bytes", "0", "reserved"] == 3
        assert values["coprs_gpu_memory_bytes", "1", "total"] == 9

    def test_openmetrics_is_sent_to_clients_that_accept_it(self, build):
        client, _ = connect_to(build)
        accept = {"Accept": "application/openmetrics-text; version=1.0.0"}
        response = client.get("/metrics", headers=accept)
        assert response.headers["content-type"].startswith("application/openmetrics-text")
        assert response.text.endswith("# EOF\n")


class TestRequestIds:
    @pytest.mark.parametrize("path", ["/health", "/nowhere", "/page/app.js", "/segment"])
    def test_id_of_the_client_is_in_the_response(self, build, path):
        client, _ = connect_to(build)
        response = client.get(path, headers={"X-Request-ID": "a-1.2:3/4"})
        assert response.headers["x-request-id"] == "a-1.2:3/4"

    @pytest.mark.parametrize("given", ["", "a b", "x" * 129, '"><script>', "a\tb", "\xe9"])
    def test_other_ids_are_replaced(self, build, given):
        client, _ = connect_to(build)
        headers = {"X-Request-ID": given.encode("latin-1")}
        made = {client.get("/health", headers=headers).headers["x-request-id"] for _ in range(2)}
        assert len(made) == 2
        assert all(len(each) == 32 and int(each, 16) >= 0 for each in made)

    def test_refused_and_failed_requests_have_an_id(self, build):
        def fail():
            raise RuntimeError("bug")

        client, _ = connect_to(build, FakePolicy(during=fail), {"api_key": "secret"})
        refused, failed = post(client), post(client, headers={"Authorization": "Bearer secret"})
        assert (refused.status_code, failed.status_code) == (401, 500)
        assert len({each.headers["x-request-id"] for each in (refused, failed)}) == 2


@pytest.fixture
def logged():
    """Configure the logs; yields a function that returns their lines."""
    stream = io.StringIO()
    undo = []

    def configure(log_format="json", access_log=True):
        undo.append(configure_logs(log_format, access_log=access_log, stream=stream))
        return lambda: stream.getvalue().splitlines()

    yield configure
    undo[0]()


class TestLogs:
    def test_json_log_has_a_line_a_request(self, build, logged):
        lines = logged()
        client, _ = connect_to(build, app_options={"api_key": "secret"})
        headers = {"X-Request-ID": "one", "Authorization": "Bearer secret"}
        post(client, headers=headers, instructions=["the cup", "the table"])
        post(client, b"no image", {**headers, "X-Request-ID": "two"})
        client.get("/health")
        first, second = map(json.loads, lines())
        expected = {
            "level": "info",
            "logger": "coprs_deploy.server.request_log",
            "message": "request",
            "request_id": "one",
            "key": "default",
            "method": "POST",
            "path": "/segment",
            "status": 200,
            "instructions": 2,
        }
        assert expected.items() <= first.items()
        assert first["duration_ms"] >= 0
        assert (second["request_id"], second["status"]) == ("two", 422)
        assert second["error"] == "ImageDecodeError"
        assert "cup" not in "".join(lines())  # nothing that a user wrote

    def test_text_log_has_the_same_fields(self, build, logged):
        lines = logged("text")
        client, _ = connect_to(build)
        client.get("/nowhere", headers={"X-Request-ID": "one"})
        (line,) = lines()
        assert " INFO request request_id=one " in line
        assert " status=404 error=RequestError " in line

    def test_without_access_log_failures_remain(self, build, logged):
        def fail():
            raise next(errors)

        errors = iter([PolicyError("no memory"), RuntimeError("bug")])
        lines = logged(access_log=False)
        client, _ = connect_to(build, FakePolicy(during=fail))
        for name in ("one", "two"):
            post(client, headers={"X-Request-ID": name})
        first, second = map(json.loads, lines())
        assert (first["level"], first["message"]) == ("error", "PolicyError: no memory")
        assert first["request_id"] == "one"
        assert (second["message"], second["request_id"]) == ("internal error", "two")
        assert second["traceback"].endswith("RuntimeError: bug")

    def test_path_cannot_forge_a_line(self, build, logged):
        lines = logged("text")
        client, _ = connect_to(build)
        client.get("/a%0A2026-01-01 INFO forged")
        assert len(lines()) == 1

    def test_warnings_are_in_the_json_log(self, logged):
        lines = logged()
        logging.getLogger("py.warnings").warning("careful")
        assert json.loads(lines()[0])["message"] == "careful"
