"""The HTTP application on a runtime of fakes."""

import base64
import io
import re
import threading
from functools import partial

import pytest
from PIL import Image
from starlette.testclient import TestClient

from coprs_deploy.errors import PolicyError
from coprs_deploy.prompts import MAX_INSTRUCTION_CHARS
from coprs_deploy.server.app import PAGE
from coprs_deploy.server.bodies import EVENT_STREAM, ErrorBody, ResultBody
from coprs_deploy.server.request_body import MAX_FORM_FIELDS
from coprs_deploy.server.request_record import RequestRecord
from coprs_deploy.server.segmentation import _accepts_stream
from tests.unit.runtime_fakes import WAIT, FakePolicy
from tests.unit.server.asgi import MAX_BYTES, png
from tests.unit.server.clients import connect_to, events_of, post

SCRIPTS = ("app", "masks", "stream", "viewer")


@pytest.fixture
def connect(build):
    """Build a client of an application, and its policy."""
    return partial(connect_to, build)


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

    def test_segment_limits_of_the_reasoning_reach_the_policy(self, connect):
        client, policy = connect()
        assert post(client, max_reasoning_tokens=7).status_code == 200
        assert post(client, reasoning="none", headers={"Accept": EVENT_STREAM}).status_code == 200
        assert [request.max_reasoning_tokens for request in policy.requests] == [7, 0]
        client.app.state.coprs.warm_up()
        assert post(client, deadline_ms=60_000).status_code == 200
        assert policy.requests[-1].reasoning_deadline is not None

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
        kind, _, content = events[2][1]["image"].partition(",")
        assert kind == "data:image/png;base64"
        prior = Image.open(io.BytesIO(base64.b64decode(content)))
        assert (prior.mode, prior.size) == ("L", (30, 20))  # as the image, which is small
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
        assert "default-src 'none'" in page.headers["content-security-policy"]
        files = re.findall(r'(?:src|href)="(page/[^"]*)"', page.text)
        assert len(files) == 3
        for name in [*files, *(f"page/{each.name}" for each in PAGE.iterdir())]:
            assert client.get(f"/{name}").status_code == 200
        assert client.get("/page/none.js").json()["type"] == "RequestError"

    @pytest.mark.parametrize("path", ["/", "/docs"])
    def test_pages_load_nothing_from_elsewhere(self, connect, path):
        client, _ = connect()
        page = client.get(path)
        assert page.headers["content-security-policy"].startswith("default-src 'none'; script-src")
        assert page.headers["x-content-type-options"] == "nosniff"
        files = re.findall(r'(?:src|href)="([^"]*)"', page.text)
        assert not any(":" in name or name.startswith("/") for name in files)
        for name in files:
            assert client.get(f"/{name}").status_code == 200

    def test_files_of_the_page_are_as_new_as_the_page(self, connect):
        client, _ = connect()
        first = client.get("/page/app.js")
        assert first.headers["cache-control"] == "no-cache"
        headers = {"If-None-Match": first.headers["etag"]}
        assert client.get("/page/app.js", headers=headers).status_code == 304

    @pytest.mark.parametrize(
        "path",
        [
            "/",
            "/docs",
            "/openapi.json",
            "/samples",
            "/health",
            "/health/live",
            "/health/ready",
            "/metrics",
        ],
    )
    def test_head_has_the_status_of_get(self, connect, path):
        client, _ = connect()
        head, get = client.head(path), client.get(path)
        assert (head.status_code, head.headers["content-type"]) == (
            200,
            get.headers["content-type"],
        )

    def test_page_works_under_any_path_of_a_proxy(self, connect):
        client, _ = connect()
        texts = [client.get("/").text, *(client.get(f"/page/{each}.js").text for each in SCRIPTS)]
        for link in ('href="docs"', 'fetch("segment"', 'fetch("health")'):
            assert any(link in text for text in texts)
        for text in texts:
            assert not re.search(r'(src|href|from|fetch\()\s*=?\s*"(/|\w+:)', text)

    def test_samples_are_those_of_the_demo_model(self, connect):
        assert connect()[0].get("/samples").json() == []
        client, _ = connect(app_options={"has_samples": True})
        samples = client.get("/samples").json()
        assert len(samples) == 5
        for sample in samples:
            image = client.get(f"/{sample['image']}")
            assert (image.status_code, image.headers["content-type"]) == (200, "image/jpeg")
        assert client.get("/samples/none.jpg").status_code == 404

    def test_health_counts_the_active_requests(self, connect):
        seen = []
        during = lambda: seen.append(client.get("/health").json()["active_requests"])  # noqa: E731
        client, _ = connect(FakePolicy(deltas=("text",), during=during))
        post(client)
        assert (seen, client.get("/health").json()["active_requests"]) == ([1], 0)

    def test_health_counts_the_requests_before_a_named_one(self, connect):
        seen = []

        def during():
            seen.append(client.get("/health", params={"request_id": "mine"}).json())

        client, _ = connect(FakePolicy(deltas=("text",), during=during))
        post(client, headers={"X-Request-ID": "mine"})
        client.app.state.active = [RequestRecord("other"), RequestRecord("mine")]
        during()
        assert [health["requests_ahead"] for health in seen] == [0, 1]
        client.app.state.active = []
        during()
        assert "requests_ahead" not in seen[-1]

    @pytest.mark.parametrize(
        ("accept", "expected"),
        [
            (EVENT_STREAM, True),
            ("Text/Event-Stream; q=0.5", True),
            ("application/json, text/event-stream", True),
            ("text/event-stream;q=0.2, */*;q=0.1", True),
            ("text/event-stream;q=0", False),
            ("text/event-stream; charset=utf-8; q=0.000, application/json", False),
            ("application/json, text/event-stream;q=0.5", False),
            ("text/event-stream;q=no", False),
            ("*/*", False),
            ("", False),
        ],
    )
    def test_stream_is_sent_to_clients_that_accept_it(self, accept, expected):
        assert _accepts_stream(accept) is expected

    def test_refused_stream_becomes_json(self, connect):
        client, _ = connect()
        response = post(client, headers={"Accept": "text/event-stream;q=0"})
        assert response.headers["content-type"] == "application/json"
        assert response.json()["found"]


class TestDocument:
    def test_document_describes_what_is_sent(self, connect):
        client, _ = connect()
        responses = client.get("/openapi.json").json()["paths"]["/segment"]["post"]["responses"]
        result = responses.pop("200")["content"]
        assert set(result) == {"application/json", EVENT_STREAM}
        references = result["application/json"]["schema"]["anyOf"]
        assert [each["$ref"].rpartition("/")[2] for each in references] == [
            "ResultBody",
            "ResultsBody",
        ]
        assert set(map(int, responses)) == {
            *(400, 404, 405, 408, 411, 413, 415, 422, 500, 503, 504)
        }
        for response in responses.values():
            schema = response["content"]["application/json"]["schema"]
            assert schema["$ref"].endswith("/ErrorBody")

    def test_bodies_have_the_fields_of_the_document(self, connect):
        client, _ = connect()
        result = ResultBody.model_validate(post(client).json())
        assert result.found
        for refused in (client.get("/nowhere"), client.get("/segment"), post(client, b"no image")):
            assert ErrorBody.model_validate(refused.json()).error

    def test_document_of_a_server_with_a_key_asks_for_it(self, connect):
        client, _ = connect(app_options={"api_key": "secret"})
        document = client.get("/openapi.json").json()
        assert document["components"]["securitySchemes"]["HTTPBearer"]["scheme"] == "bearer"
        operation = document["paths"]["/segment"]["post"]
        assert operation["security"] == [{"HTTPBearer": []}]
        assert "401" in operation["responses"]
        assert "security" not in document["paths"]["/health"]["get"]


class TestOptions:
    @pytest.mark.parametrize("path", ["/health", "/api/v1/health"])
    def test_root_path_may_be_removed_by_the_proxy_or_not(self, connect, path):
        client, _ = connect(app_options={"root_path": "/api/v1"})
        assert client.get(path).status_code == 200
        assert client.get("/openapi.json").json()["servers"] == [{"url": "/api/v1"}]

    def test_cors_allows_the_given_origins_only(self, connect):
        client, _ = connect(app_options={"cors_origins": ["https://a.example"]})
        name = "access-control-allow-origin"
        preflight_headers = {
            "Origin": "https://a.example",
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization",
        }
        preflight = client.options("/segment", headers=preflight_headers)
        assert (preflight.status_code, preflight.headers[name]) == (200, "https://a.example")
        refused = client.get("/nowhere", headers={"Origin": "https://a.example"})
        assert refused.headers[name] == "https://a.example"  # so that a page can read the error
        assert name not in client.get("/health", headers={"Origin": "https://b.example"}).headers

    def test_cors_is_off_by_default(self, connect):
        client, _ = connect()
        response = client.get("/health", headers={"Origin": "https://a.example"})
        assert "access-control-allow-origin" not in response.headers

    @pytest.mark.parametrize(
        "given", [None, "Bearer wrong", "Bearer secre", "secret", "Bearer \xe9"]
    )
    def test_request_without_the_api_key_is_refused(self, connect, given):
        client, policy = connect(app_options={"api_key": "secret"})
        headers = {} if given is None else {"Authorization": given.encode("latin-1")}
        response = post(client, headers=headers)
        assert (response.status_code, response.headers["www-authenticate"]) == (401, "Bearer")
        assert response.json()["type"] == "Unauthorized"
        assert policy.requests == []

    @pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
    def test_request_with_the_api_key_is_served(self, connect, scheme):
        client, _ = connect(app_options={"api_key": "secret"})
        response = post(client, headers={"Authorization": f"{scheme} secret"})
        assert response.status_code == 200
        assert client.get("/health").status_code == client.get("/").status_code == 200


class TestRefusals:
    @pytest.mark.parametrize("accepted", ["application/json", EVENT_STREAM])
    @pytest.mark.parametrize(
        ("image", "fields", "kind", "part"),
        [
            (b"no image", {}, "ImageDecodeError", "not an image"),
            (None, {"instruction": " "}, "InstructionError", "instruction"),
            (None, {"max_targets": 0}, "RequestError", "max_targets: Input should be greater"),
            (None, {"reasoning": "some"}, "RequestError", "reasoning: Input should be 'full'"),
            (
                None,
                {"reasoning": "none", "max_reasoning_tokens": 3},
                "ValueError",
                "accepted: one of the two",
            ),
            (None, {"deadline_ms": 9}, "ValueError", "deadline_ms needs the time"),
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
            "image: Field required; accepted: a form with image (a file), or JSON"
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
            assert response.json()["type"] == "RequestError"
            message = response.json()["error"]
            assert message.startswith(f"{method} {path}: Not found. Endpoints: GET /, /docs, ")
            documented = client.get("/openapi.json").json()["paths"]
            assert all(each in message for each in documented)
        paths = ("/segment", "/health", "/samples", "/", "/page/app.js")
        allowed = [client.put(path).headers["allow"] for path in paths]
        assert allowed == ["POST", *["GET, HEAD"] * 4]

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

    def test_unknown_path_of_any_length_has_a_short_message(self, connect):
        client, _ = connect()
        assert len(client.get("/" + "x" * 50_000).json()["error"]) < 400

    def test_unknown_fields_of_any_number_have_a_short_message(self, connect):
        client, _ = connect()
        response = post(client, **{f"{number:0100}": "" for number in range(60)})
        assert response.status_code == 422
        error = response.json()["error"]
        assert error.startswith(f"{0:0100}: Extra inputs are not permitted; {1:0100}")
        assert error.endswith("reasoning, return")
        assert len(error) < 2100

    def test_form_of_many_fields_is_refused(self, connect):
        client, _ = connect()
        response = post(client, **{str(number): "" for number in range(MAX_FORM_FIELDS)})
        assert response.status_code == 400
        assert "Maximum number of fields is 64" in response.json()["error"]

    @pytest.mark.parametrize("length", [f"{MAX_BYTES + 1:030}", "9" * 5_000])
    def test_content_length_of_many_digits_is_compared_with_the_limit(self, connect, length):
        client, _ = connect()
        response = client.post("/segment", content=b"", headers={"Content-Length": length})
        assert response.status_code == 413

    def test_content_length_that_is_no_number_is_refused_with_411(self, connect):
        client, _ = connect()
        response = client.post("/segment", content=b"", headers={"Content-Length": "ten"})
        assert response.status_code == 411
        assert "Content-Length is 'ten'" in response.json()["error"]

    def test_instruction_above_the_limit_is_refused_before_the_policy(self, connect):
        client, policy = connect()
        response = post(client, instruction="x" * (MAX_INSTRUCTION_CHARS + 1))
        assert response.status_code == 422
        assert "instruction: String should have at most 20000" in response.json()["error"]
        assert policy.requests == []

    def test_bug_returns_500_without_its_text(self, connect):
        def fail():
            raise RuntimeError("secret detail")

        coprs_client, _ = connect(FakePolicy(during=fail))
        client = TestClient(coprs_client.app)
        response = post(client)
        assert response.status_code == 500
        assert ErrorBody.model_validate(response.json()).type == "RuntimeError"
        assert "secret" not in response.text

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
