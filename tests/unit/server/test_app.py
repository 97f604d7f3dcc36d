"""The HTTP application on a runtime of fakes."""

import asyncio
import base64
import io
import json
import threading

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from coprs_deploy.errors import PolicyError
from coprs_deploy.server.app import build_app
from coprs_deploy.server.bodies import EVENT_STREAM
from tests.unit.runtime_fakes import WAIT, FakePolicy, join_stream_threads

MAX_BYTES = 100_000


def png(shape=(20, 30)):
    file = io.BytesIO()
    Image.fromarray(np.full((*shape, 3), 99, np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def connect(build):
    """Build a client of an application, and its policy."""

    def builder(policy=None, **options):
        policy = policy or FakePolicy()
        coprs, _ = build(policy, **options)
        return TestClient(build_app(coprs, MAX_BYTES)), policy

    return builder


def post(client, image=None, headers=None, **fields):
    files = {"image": ("a.png", png() if image is None else image)}
    return client.post(
        "/segment", files=files, data={"instruction": "the cup", **fields}, headers=headers
    )


def events_of(response):
    parts = [part.split("\n") for part in response.text.split("\n\n")[:-1]]
    assert all(
        len(p) == 2 and p[0].startswith("event: ") and p[1].startswith("data: ") for p in parts
    )
    return [(name[len("event: ") :], json.loads(data[len("data: ") :])) for name, data in parts]


class TestResults:
    def test_segment_returns_the_result_of_the_runtime(self, connect, build):
        client, policy = connect()
        response = post(client, max_targets=2, max_new_tokens=5)
        assert response.status_code == 200
        expected = build()[0].segment(png(), "the cup", 2, 5).to_json()
        for result in (received := response.json()), expected:
            del result["timings"]
        assert received == expected
        (request,) = policy.requests
        assert (request.instruction, request.max_targets, request.max_new_tokens) == (
            "the cup",
            2,
            5,
        )

    def test_segment_no_match_is_a_result(self, connect):
        client, _ = connect(FakePolicy(found=0))
        response = post(client)
        assert (response.status_code, response.json()["found"]) == (200, False)

    def test_segment_streams_text_prior_and_result(self, connect):
        client, _ = connect()
        response = post(client, headers={"Accept": EVENT_STREAM})
        assert response.headers["content-type"].startswith(EVENT_STREAM)
        events = events_of(response)
        assert [name for name, _ in events] == ["text", "text", "prior", "result"]
        assert "".join(data["text"] for _, data in events[:2]) == "some text"
        for _, data in events[2:]:
            kind, _, content = data["image"].partition(",")
            assert kind == "data:image/jpeg;base64"
            assert Image.open(io.BytesIO(base64.b64decode(content))).size == (640, 427)
        result = events[-1][1]
        assert result["masks"][0]["size"] == result["image_size"] == [20, 30]
        assert result["stop_reason"] == "targets_reached"
        assert result["format_violations"] == []
        assert len(result["scores"]) == len(result["boxes"]) == len(result["areas"]) == 1

    def test_health_and_page_are_served(self, connect):
        client, _ = connect()
        assert client.get("/health").json()["runtime"] == "graphs: fake graphs; policy: fake policy"
        page = client.get("/")
        assert page.headers["content-type"].startswith("text/html")
        assert "<form" in page.text
        assert "://" not in page.text  # no external resources


class TestRefusals:
    @pytest.mark.parametrize("accepted", ["application/json", EVENT_STREAM])
    @pytest.mark.parametrize(
        ("image", "fields", "kind", "part"),
        [
            (b"no image", {}, "ImageDecodeError", "not an image"),
            (None, {"instruction": " "}, "InstructionError", "instruction"),
            (None, {"max_targets": 0}, "RequestError", "max_targets: Input should be greater"),
            (
                None,
                {"max_targets": "many"},
                "RequestError",
                "max_targets: Input should be a valid integer",
            ),
        ],
    )
    def test_invalid_request_is_refused_with_422(
        self, connect, accepted, image, fields, kind, part
    ):
        client, policy = connect()
        response = post(client, image, {"Accept": accepted}, **fields)
        assert response.status_code == 422
        assert response.json()["type"] == kind
        assert part in response.json()["error"]
        assert policy.requests == [] or kind == "InstructionError"

    def test_form_without_an_image_is_refused(self, connect):
        client, _ = connect()
        response = client.post("/segment", data={"instruction": "x"})
        assert response.status_code == 422
        assert response.json()["error"].startswith(
            "image: Field required; accepted: a form with image"
        )

    def test_image_sent_as_text_is_refused(self, connect):
        client, _ = connect()
        response = client.post("/segment", data={"image": "a.png", "instruction": "x"})
        assert response.status_code == 422
        assert response.json()["error"].startswith(
            "image is 'a.png', text instead of a file (curl: image=@FILE)"
        )

    def test_unknown_path_or_method_lists_the_endpoints(self, connect):
        client, _ = connect()
        for method, path, status in (("GET", "/segment", 405), ("POST", "/result", 404)):
            response = client.request(method, path)
            assert response.status_code == status
            endpoints = "Not found. Endpoints: GET /, /health, /openapi.json; POST /segment"
            assert response.json() == {
                "error": f"{method} {path}: {endpoints}",
                "type": "RequestError",
            }
        assert client.get("/segment").headers["allow"] == "POST"

    def test_malformed_multipart_is_refused(self, connect):
        client, _ = connect()
        kind = {"Content-Type": "multipart/form-data; boundary=x"}
        response = client.post("/segment", content=b"no form", headers=kind)
        assert response.status_code == 400
        assert "accepted: a form with image" in response.json()["error"]

    def test_body_above_the_limit_is_refused_with_413(self, connect):
        client, _ = connect()
        response = post(client, bytes(MAX_BYTES + 1))
        assert response.status_code == 413
        assert "a larger --max-upload" in response.json()["error"]

    def test_body_without_a_length_is_refused_with_411(self, connect):
        client, _ = connect()
        response = client.post("/segment", content=iter([b"x"]))
        assert response.status_code == 411

    def test_full_queue_returns_503_with_retry_after(self, connect):
        begun, release = threading.Event(), threading.Event()
        policy = FakePolicy(during=lambda: (begun.set(), release.wait(WAIT)))
        client, _ = connect(policy, max_queue_size=0)
        first = threading.Thread(target=post, args=(client,))
        first.start()
        assert begun.wait(WAIT)
        response = post(client)
        release.set()
        first.join()
        assert (response.status_code, response.headers["retry-after"]) == (503, "1")

    def test_request_past_its_deadline_returns_504(self, connect):
        client, _ = connect(FakePolicy(checks_deadline=True), timeout_s=1e-9)
        assert post(client).status_code == 504

    def test_failed_policy_returns_500(self, connect):
        def fail():
            raise PolicyError("out of memory")

        client, _ = connect(FakePolicy(during=fail))
        response = post(client)
        assert response.status_code == 500
        assert response.json() == {"error": "out of memory", "type": "PolicyError"}

    def test_failure_after_the_first_event_is_the_last_event(self, connect):
        steps = iter([None, PolicyError("out of memory")])

        def fail_at_the_second_delta():
            if error := next(steps):
                raise error

        client, _ = connect(FakePolicy(during=fail_at_the_second_delta))
        events = events_of(post(client, headers={"Accept": EVENT_STREAM}))
        assert events[0] == ("text", {"text": "some"})
        assert events[1:] == [("error", {"error": "out of memory", "type": "PolicyError"})]


@pytest.mark.parametrize("accepted", ["application/json", EVENT_STREAM])
@pytest.mark.parametrize("num_deltas", [0, 1])
def test_disconnected_client_cancels_its_request(build, accepted, num_deltas):
    begun, release = threading.Event(), threading.Event()
    deltas = iter(range(9))

    def during():
        if next(deltas) >= num_deltas:
            begun.set()
            release.wait(WAIT)

    policy = FakePolicy(deltas=("a",) * 4, during=during)
    coprs, _ = build(policy)
    app = build_app(coprs, MAX_BYTES)
    body = (
        b'--x\r\nContent-Disposition: form-data; name="instruction"\r\n\r\nthe cup\r\n'
        b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
        + png()
        + b"\r\n--x--\r\n"
    )
    headers = {
        "content-type": "multipart/form-data; boundary=x",
        "content-length": str(len(body)),
        "accept": accepted,
    }

    async def connect_and_leave():
        messages = [{"type": "http.request", "body": body}]

        async def receive():
            if messages:
                return messages.pop()
            await asyncio.to_thread(begun.wait, WAIT)
            return {"type": "http.disconnect"}

        async def send(message):
            pass

        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "path": "/segment",
            "query_string": b"",
            "headers": [(k.encode(), v.encode()) for k, v in headers.items()],
        }
        await asyncio.wait_for(app(scope, receive, send), WAIT)

    asyncio.run(connect_and_leave())
    release.set()
    assert policy.was_abandoned.wait(WAIT)
    assert policy.num_abandoned == 1
    assert next(deltas) < 4  # the remaining deltas were not written
    join_stream_threads()
    assert coprs.num_active_requests == 0
