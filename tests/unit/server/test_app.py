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
from coprs_deploy.server.events import EVENT_STREAM
from tests.unit.runtime_fakes import WAIT, FakePolicy

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


def ask(client, image=None, headers=None, **fields):
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


class TestAnswers:
    def test_an_answer_is_that_of_the_runtime(self, connect, build):
        client, policy = connect()
        response = ask(client, targets=2, max_new_tokens=5)
        assert response.status_code == 200
        expected = build()[0].segment(png(), "the cup", 2, 5).to_json()
        for found in (answer := response.json()), expected:
            del found["timings"]
        assert answer == expected
        (request,) = policy.requests
        assert (request.instruction, request.max_targets, request.max_new_tokens) == (
            "the cup",
            2,
            5,
        )

    def test_nothing_found_is_an_answer(self, connect):
        client, _ = connect(FakePolicy(found=0))
        response = ask(client)
        assert (response.status_code, response.json()["found"]) == (200, False)

    def test_events_come_in_their_order(self, connect):
        client, _ = connect()
        response = ask(client, headers={"Accept": EVENT_STREAM})
        assert response.headers["content-type"].startswith(EVENT_STREAM)
        events = events_of(response)
        assert [name for name, _ in events] == ["words", "words", "prior", "answer"]
        assert "".join(data["text"] for _, data in events[:2]) == "a thought"
        for _, data in events[2:]:
            kind, _, content = data["image"].partition(",")
            assert kind == "data:image/jpeg;base64"
            assert Image.open(io.BytesIO(base64.b64decode(content))).size == (640, 427)
        assert events[-1][1]["masks"][0]["size"] == [20, 30]

    def test_health_and_page(self, connect):
        client, _ = connect()
        assert client.get("/health").json()["runtime"] == "graphs: fake graphs; policy: fake policy"
        page = client.get("/")
        assert page.headers["content-type"].startswith("text/html")
        assert "<form" in page.text
        assert "://" not in page.text  # nothing is loaded from elsewhere


class TestRefusals:
    @pytest.mark.parametrize("accepted", ["application/json", EVENT_STREAM])
    @pytest.mark.parametrize(
        ("image", "fields", "kind", "part"),
        [
            (b"no picture", {}, "ImageDecodeError", "not an image"),
            (None, {"instruction": " "}, "InstructionError", "instruction"),
            (None, {"targets": 0}, "RequestError", "targets: Input should be greater"),
            (None, {"targets": "many"}, "RequestError", "targets: Input should be a valid integer"),
        ],
    )
    def test_what_cannot_be_asked(self, connect, accepted, image, fields, kind, part):
        client, policy = connect()
        response = ask(client, image, {"Accept": accepted}, **fields)
        assert response.status_code == 422
        assert response.json()["type"] == kind
        assert part in response.json()["error"]
        assert policy.requests == [] or kind == "InstructionError"

    def test_a_form_without_a_picture(self, connect):
        client, _ = connect()
        response = client.post("/segment", data={"instruction": "x"})
        assert response.status_code == 422
        assert response.json()["error"].startswith("image: Field required; send a form with image")

    def test_a_picture_that_is_text(self, connect):
        client, _ = connect()
        response = client.post("/segment", data={"image": "a.png", "instruction": "x"})
        assert response.status_code == 422
        assert response.json()["error"].startswith("image: 'a.png' is text, not a file (curl takes")

    def test_a_path_or_method_that_is_none(self, connect):
        client, _ = connect()
        for method, path, status in (("GET", "/segment", 405), ("POST", "/answer", 404)):
            response = client.request(method, path)
            assert response.status_code == status
            error = response.json()["error"]
            assert error.startswith(f"{method} {path}: ") and "POST /segment" in error
        assert client.get("/segment").headers["allow"] == "POST"

    def test_a_body_that_is_no_form(self, connect):
        client, _ = connect()
        kind = {"Content-Type": "multipart/form-data; boundary=x"}
        response = client.post("/segment", content=b"no form", headers=kind)
        assert response.status_code == 400
        assert "send a form with image" in response.json()["error"]

    def test_what_is_too_large_is_not_read(self, connect):
        client, _ = connect()
        response = ask(client, bytes(MAX_BYTES + 1))
        assert response.status_code == 413
        assert "a larger --max-upload" in response.json()["error"]

    def test_a_length_must_be_said(self, connect):
        client, _ = connect()
        response = client.post("/segment", content=iter([b"x"]))
        assert response.status_code == 411

    def test_a_full_queue_says_when_to_come_again(self, connect):
        begun, release = threading.Event(), threading.Event()
        policy = FakePolicy(during=lambda: (begun.set(), release.wait(WAIT)))
        client, _ = connect(policy, max_queue_size=0)
        first = threading.Thread(target=ask, args=(client,))
        first.start()
        assert begun.wait(WAIT)
        response = ask(client)
        release.set()
        first.join()
        assert (response.status_code, response.headers["retry-after"]) == (503, "1")

    def test_time_that_runs_out(self, connect):
        policy = FakePolicy()
        policy.during = lambda: (threading.Event().wait(0.05), policy.requests[-1].remaining_s())
        client, _ = connect(policy, timeout_s=0.01)
        assert ask(client).status_code == 504

    def test_a_policy_that_fails(self, connect):
        def fail():
            raise PolicyError("out of memory")

        client, _ = connect(FakePolicy(during=fail))
        response = ask(client)
        assert response.status_code == 500
        assert response.json() == {"error": "out of memory", "type": "PolicyError"}

    def test_a_failure_after_the_first_word_is_the_last_event(self, connect):
        steps = iter([None, PolicyError("out of memory")])

        def fail_at_the_second():
            if error := next(steps):
                raise error

        client, _ = connect(FakePolicy(during=fail_at_the_second))
        events = events_of(ask(client, headers={"Accept": EVENT_STREAM}))
        assert events[0] == ("words", {"text": "a"})
        assert events[1:] == [("error", {"error": "out of memory", "type": "PolicyError"})]


@pytest.mark.parametrize("accepted", ["application/json", EVENT_STREAM])
@pytest.mark.parametrize("after_words", [0, 1])
def test_a_client_that_goes_away_takes_its_question_with_it(build, accepted, after_words):
    begun, release = threading.Event(), threading.Event()
    words = iter(range(9))

    def during():
        if next(words) >= after_words:
            begun.set()
            release.wait(WAIT)

    policy = FakePolicy(words=("a",) * 4, during=during)
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

    async def visit():
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

    asyncio.run(visit())
    release.set()
    deadline = threading.Event()
    for _ in range(100 * WAIT):
        if policy.abandoned:
            break
        deadline.wait(0.01)
    assert policy.abandoned == 1
    assert next(words) < 4  # the rest was not written
    for _ in range(100 * WAIT):
        if not coprs._admission.taken:
            break
        deadline.wait(0.01)
    assert coprs._admission.taken == 0
