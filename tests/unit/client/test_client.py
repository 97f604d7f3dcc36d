"""The clients against the real application, and against servers that fail."""

import asyncio
import io
import json
import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import httpx2
import numpy as np
import pytest
import uvicorn
from PIL import ExifTags, Image

from coprs_deploy import client as client_module
from coprs_deploy.client import AsyncClient, Client, RemotePrior, RemoteResult, TextDelta
from coprs_deploy.client.request import ClientOptions, error_of_response, segment_form
from coprs_deploy.errors import (
    CoPRSError,
    EndpointError,
    ImageDecodeError,
    ImageError,
    InstructionError,
    MissingDependencyError,
    PolicyError,
    QueueFullError,
    RequestTimeoutError,
)
from coprs_deploy.server.app import build_app
from tests.unit.runtime_fakes import FakePolicy
from tests.unit.server.asgi import MAX_BYTES, png

pytest.importorskip("supervision")


@contextmanager
def running(app):
    """Run an ASGI application on a free port of this machine; yield its address."""
    config = uvicorn.Config(app, port=0, log_level="error", ws="none", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
    (listener,) = server.servers[0].sockets
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture
def serve(build):
    """Serve a runtime of fakes; return a function that returns its address."""
    opened = []

    def server(policy=None, **app_options):
        coprs, _ = build(policy or FakePolicy())
        opened.append(running(build_app(coprs, MAX_BYTES, **app_options)))
        return opened[-1].__enter__()

    yield server
    for each in opened:
        each.__exit__(None, None, None)


class Flaky:
    """A transport that answers with the listed outcomes, one a request: a response or an error."""

    def __init__(self, *outcomes):
        self.outcomes = list(outcomes)
        self.requests = []

    def __call__(self, request):
        self.requests.append(request)
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def client(self, **options):
        http_client = httpx2.Client(transport=httpx2.MockTransport(self))
        return Client("http://server", http_client=http_client, **options)


BUSY = {"error": "the queue is full", "type": "QueueFullError"}
RESULT = {
    "found": True,
    "instruction": "the cup",
    "reasoning": "it is here",
    "response": "<think>it is here</think> <REF_POS>",
    "stop_reason": "targets_reached",
    "format_violations": [],
    "image_size": [2, 3],
    "scores": [0.5],
    "boxes": [[0, 0, 3, 2]],
    "areas": [6],
    "masks": [{"size": [2, 3], "counts": "06"}],
    "timings": {"total_ms": 3.0},
    "runtime": "fake",
}


@pytest.fixture
def pauses(monkeypatch):
    """Record the pauses before retries instead of waiting."""
    waited = []

    async def sleep(seconds):
        waited.append(seconds)

    monkeypatch.setattr("coprs_deploy.client.client.time.sleep", waited.append)
    monkeypatch.setattr("coprs_deploy.client.client.asyncio.sleep", sleep)
    return waited


def test_result_equals_that_of_the_runtime(serve, build):
    expected = build()[0].segment(png(), "the cup", 2, 5)
    with Client(serve()) as client:
        result = client.segment(png(), "the cup", 2, 5)
    assert isinstance(result, RemoteResult)
    assert np.array_equal(result.masks, expected.masks)
    assert np.array_equal(result.mask, expected.mask)
    assert result.masks.dtype == expected.masks.dtype
    received, wanted = result.to_json(), expected.to_json()
    for each in (received, wanted):
        del each["timings"]
    assert received == wanted
    assert result.to_coco(7) == expected.to_coco(7)
    assert result.to_supervision() == expected.to_supervision()
    assert repr(result) == "RemoteResult(areas [600, 600] in 30x20, targets_reached)"


def test_no_match_is_an_empty_result(serve):
    with Client(serve(FakePolicy(found=0))) as client:
        result = client.segment(png(), "the cup")
    assert not result.found
    assert result.masks.shape == (0, 20, 30)
    assert result.mask.shape == (20, 30)
    assert not result.mask.any()
    assert len(result.to_supervision()) == 0


def test_image_is_a_path_bytes_an_array_or_a_pillow_image(serve, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png())
    array = np.asarray(Image.open(io.BytesIO(png())))
    with Client(serve()) as client:
        for image in (path, str(path), png(), array, Image.fromarray(array)):
            assert client.segment(image, "the cup").image_size == (20, 30)
        with pytest.raises(FileNotFoundError):
            client.segment(tmp_path / "nowhere.png", "the cup")


def turned_photo():
    """Return a Pillow image of 30 x 20 pixels that its EXIF data turn by 90 degrees."""
    exif, file = Image.Exif(), io.BytesIO()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (30, 20)).save(file, "JPEG", exif=exif)
    return Image.open(file)


@pytest.mark.parametrize(
    ("image", "size"),
    [
        (turned_photo(), (30, 20)),
        (Image.new("CMYK", (30, 20)), (20, 30)),
        (np.zeros((20, 30, 1), np.uint8), (20, 30)),
        (np.full((20, 30, 3), 0.5), (20, 30)),
    ],
    ids=["EXIF", "CMYK", "gray", "float"],
)
def test_image_is_read_as_by_the_runtime(serve, build, image, size):
    with Client(serve()) as client:
        assert client.segment(image, "the cup").image_size == size
    assert build()[0].segment(image, "the cup").image.shape[:2] == size


def test_image_of_another_type_is_refused():
    with Client() as client, pytest.raises(ValueError, match="image is a int; accepted"):
        client.segment(7, "the cup")


def test_options_reach_the_policy_and_health_is_read(serve):
    policy = FakePolicy()
    with Client(serve(policy)) as client:
        client.segment(png(), "the cup", 3, 40, max_reasoning_tokens=7)
        health = client.health()
    (request,) = policy.requests
    assert (request.max_targets, request.max_new_tokens) == (3, 40)
    assert request.max_reasoning_tokens == 7
    assert health["status"] == "ok"


def test_several_instructions_on_one_image_give_results_in_their_order(serve):
    policy = FakePolicy(concurrency=2)
    texts = ["the cup", "the plate", "the spoon"]
    with Client(serve(policy)) as client:
        results = client.segment_instructions(png(), texts, 2)
        assert [result.instruction for result in results] == texts
        assert all(len(result.masks) == 2 for result in results)
        assert client.segment_instructions(png(), ("a",))[0].instruction == "a"
        with pytest.raises(InstructionError):
            client.segment_instructions(png(), ["the cup", " "])


def test_failed_instruction_has_its_error_among_the_results(serve):
    steps = iter([PolicyError("no cup"), None, None])

    def during():
        if error := next(steps):
            raise error

    with Client(serve(FakePolicy(during=during))) as client:
        failed, found = client.segment_instructions(png(), ["the cup", "the plate"])
    assert isinstance(failed, PolicyError)
    assert str(failed) == "no cup"
    assert found.instruction == "the plate"


def test_stream_yields_text_prior_and_result(serve):
    with Client(serve()) as client:
        events = list(client.stream(png(), "the cup"))
    kinds = [type(event) for event in events]
    assert kinds[0] is TextDelta
    assert kinds[-2:] == [RemotePrior, RemoteResult]
    text = "".join(event.text for event in events if isinstance(event, TextDelta))
    assert text == events[-1].response
    prior = events[-2].prior
    assert prior.dtype == np.float32
    assert prior.ndim == 2
    assert 0 <= prior.min() <= prior.max() <= 1


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize(
    ("image", "instruction", "error", "message"),
    [
        (b"no image", "the cup", ImageDecodeError, "image"),
        (png(), " ", InstructionError, "instruction"),
    ],
)
def test_error_has_the_class_that_the_server_raised(
    serve, streams, image, instruction, error, message
):
    with Client(serve()) as client, pytest.raises(error, match=message):
        if streams:
            next(client.stream(image, instruction))
        else:
            client.segment(image, instruction)


def test_wrong_value_is_a_value_error(serve):
    with Client(serve()) as client, pytest.raises(ValueError, match="max_targets"):
        client.segment(png(), "the cup", max_targets=0)


def test_error_within_a_stream_is_raised(serve):
    texts = []

    def fail_at_the_second():
        texts.append("")
        if len(texts) == 2:
            raise PolicyError("the policy broke")

    with Client(serve(FakePolicy(during=fail_at_the_second))) as client:
        events = client.stream(png(), "the cup")
        assert next(events) == TextDelta("some")
        with pytest.raises(PolicyError, match="the policy broke"):
            next(events)


def test_api_key_is_sent_and_a_wrong_one_refused(serve, monkeypatch):
    address = serve(api_key="secret")
    with Client(address) as client, pytest.raises(EndpointError, match="API key is missing"):
        client.segment(png(), "the cup")
    with Client(address, api_key="secret") as client:
        assert client.segment(png(), "the cup").found
    monkeypatch.setenv("COPRS_API_KEY", "secret")
    with Client(address) as client:
        assert client.segment(png(), "the cup").found


def test_async_client_segments_together_and_streams(serve):
    async def work(address):
        async with AsyncClient(address) as client:
            texts = ("a", "b", "c")
            results = await asyncio.gather(*(client.segment(png(), text) for text in texts))
            events = [event async for event in client.stream(png(), "the cup")]
            health = await client.health()
            several = await client.segment_instructions(png(), texts)
            assert [result.instruction for result in several] == [*texts]
            with pytest.raises(ImageDecodeError):
                await client.segment(b"no image", "the cup")
        return results, events, health

    results, events, health = asyncio.run(work(serve(FakePolicy(concurrency=3))))
    assert [result.instruction for result in results] == ["a", "b", "c"]
    assert isinstance(events[-1], RemoteResult)
    assert health["status"] == "ok"


def test_async_client_encodes_images_beside_the_event_loop(serve, monkeypatch):
    threads = []

    def encode(*args):
        threads.append(threading.current_thread())
        return segment_form(*args)

    monkeypatch.setattr("coprs_deploy.client.client.segment_form", encode)

    async def work(address):
        async with AsyncClient(address) as client:
            await client.segment(png(), "the cup")
            await client.segment_instructions(png(), ["the cup"])
            return [event async for event in client.stream(png(), "the cup")]

    asyncio.run(work(serve()))
    assert len(threads) == 3
    assert threading.main_thread() not in threads


def test_async_client_speaks_to_an_application_in_process(build):
    app = build_app(build()[0], MAX_BYTES)

    async def work():
        transport = httpx2.ASGITransport(app)
        async with httpx2.AsyncClient(transport=transport) as http_client:
            client = AsyncClient("http://server", http_client=http_client)
            return await client.segment(png(), "the cup")

    assert asyncio.run(work()).found


def test_busy_server_is_repeated_after_the_time_that_it_names(pauses):
    server = Flaky(
        httpx2.Response(503, json=BUSY, headers={"Retry-After": "7"}),
        httpx2.ConnectError("refused"),
        httpx2.Response(200, json=RESULT),
    )
    with server.client(backoff_s=1.0) as client:
        result = client.segment(png(), "the cup")
    assert result.mask.all()
    assert pauses[0] == 7.0
    assert 1.5 <= pauses[1] <= 2.5
    bodies = {request.content.partition(b"the cup")[1] for request in server.requests}
    assert (len(server.requests), bodies) == (3, {b"the cup"})


def test_async_client_retries(pauses):
    server = Flaky(httpx2.Response(502, text="bad gateway"), httpx2.Response(200, json=RESULT))

    async def work():
        async with httpx2.AsyncClient(transport=httpx2.MockTransport(server)) as http_client:
            return await AsyncClient("http://server", http_client=http_client).segment(png(), "a")

    assert asyncio.run(work()).found
    assert len(pauses) == 1


def test_retries_end_with_the_last_error(pauses):
    server = Flaky(*[httpx2.Response(503, json=BUSY)] * 3)
    with server.client() as client, pytest.raises(QueueFullError, match="the queue is full"):
        client.segment(png(), "the cup")
    assert (len(server.requests), len(pauses)) == (3, 2)


@pytest.mark.parametrize(
    ("outcome", "error", "message"),
    [
        (httpx2.ReadTimeout("slow"), RequestTimeoutError, r"sent nothing for 120 s.*deadline_ms"),
        (
            httpx2.Response(504, json={"error": "over 60 s", "type": "RequestTimeoutError"}),
            RequestTimeoutError,
            "over 60 s",
        ),
        (
            httpx2.Response(500, json={"error": "internal error", "type": "KeyError"}),
            CoPRSError,
            "internal error",
        ),
        (httpx2.Response(404, text="<html>nginx"), EndpointError, "is it coprs-deploy serve"),
        (httpx2.Response(200, text="<html>"), EndpointError, "sent no JSON"),
        (httpx2.Response(200, json={"status": "ok"}), EndpointError, "no result of a segment"),
        (
            httpx2.Response(413, json={"error": "2 MiB", "type": "TooLarge"}),
            ValueError,
            "2 MiB",
        ),
    ],
)
def test_final_failure_is_not_retried(pauses, outcome, error, message):
    server = Flaky(outcome)
    with server.client() as client, pytest.raises(error, match=message):
        client.segment(png(), "the cup")
    assert pauses == []


def test_unreachable_server_is_named():
    with (
        Client("http://127.0.0.1:9", max_retries=0) as client,
        pytest.raises(EndpointError, match=r"cannot be reached .*`coprs-deploy serve` runs"),
    ):
        client.health()


def test_stream_that_breaks_off_is_an_error_and_not_repeated(pauses):
    text = 'event: text\ndata: {"text": "so"}\n\nevent: later\ndata: {}\n\n'
    headers = {"Content-Type": "text/event-stream"}
    server = Flaky(httpx2.Response(200, text=text, headers=headers))
    with server.client() as client:
        events = client.stream(png(), "the cup")
        assert next(events) == TextDelta("so")
        with pytest.raises(EndpointError, match="ended the stream before the result"):
            next(events)
    assert pauses == []


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("text", "{cut"),
        ("text", '{"words": "so"}'),
        ("prior", '{"image": 3}'),
        ("result", "[]"),
        ("error", "{}"),
    ],
)
def test_event_that_cannot_be_read_is_an_error_of_the_endpoint(name, data):
    headers = {"Content-Type": "text/event-stream"}
    text = f"event: {name}\ndata: {data}\n\n"
    server = Flaky(httpx2.Response(200, text=text, headers=headers))
    with server.client() as client, pytest.raises(EndpointError, match="the server sent"):
        list(client.stream(png(), "the cup"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"url": "localhost:8000"}, "url is 'localhost:8000'; accepted: http://HOST:PORT"),
        ({"timeout_s": 0}, "timeout_s is 0"),
        ({"max_retries": -1}, "max_retries is -1"),
    ],
)
def test_wrong_option_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Client(**arguments)


def test_pause_follows_a_date_and_has_a_limit():
    options = ClientOptions(backoff_s=0)
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    later = httpx2.Response(503, headers={"Retry-After": date})
    assert 25 < options.pause_s(0, later) <= 30
    never = httpx2.Response(429, headers={"Retry-After": "86400"})
    assert options.pause_s(1, never) == 60
    odd = httpx2.Response(503, headers={"Retry-After": "soon"})
    assert options.pause_s(0, odd) == 0
    assert options.pause_s(2, odd) < 0


@pytest.mark.parametrize(
    ("status", "kind", "error"),
    [
        (429, "TooManyRequests", QueueFullError),
        (503, "ServerStopping", QueueFullError),
        (408, "RequestError", RequestTimeoutError),
        (422, "RequestError", ValueError),
        (422, "ImageSizeError", ImageError),
        (500, "ValueError", ValueError),
    ],
)
def test_status_chooses_the_class_of_an_error_that_has_none_here(status, kind, error):
    content = json.dumps({"error": "text", "type": kind}).encode()
    assert isinstance(error_of_response("http://server", status, content), error)


def test_error_class_of_the_server_is_only_one_of_this_package():
    content = json.dumps({"error": "text", "type": "install_hint"}).encode()
    assert type(error_of_response("http://server", 500, content)) is CoPRSError


def test_client_imports_neither_the_runtime_nor_httpx():
    program = (
        "import json, sys\nfrom coprs_deploy.client import Client\n"
        "print(json.dumps([name for name in sys.modules]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=os.environ
    )
    loaded = set(json.loads(done.stdout))
    heavy = {"httpx2", "openvino", "onnxruntime", "torch", "fastapi", "supervision", "pycocotools"}
    assert loaded.isdisjoint({*heavy, "coprs_deploy.runtime"})


def test_missing_httpx_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "httpx2", None)
    with pytest.raises(MissingDependencyError, match=r'client needs httpx2.*"\.\[client\]"'):
        client_module.Client()
