"""Clients that leave, stall or are told to go, and steps that must not block the others."""

import asyncio
import contextlib
import json
import logging
import threading

import pytest

from coprs_deploy.server import events, steps
from coprs_deploy.server.app import build_app
from coprs_deploy.server.bodies import EVENT_STREAM
from tests.unit.runtime_fakes import WAIT, FakePolicy, join_stream_threads
from tests.unit.server.asgi import MAX_BYTES, Exchange, form

BOTH = pytest.mark.parametrize("accept", ["application/json", EVENT_STREAM])


@BOTH
@pytest.mark.parametrize("num_deltas", [0, 1])
def test_disconnected_client_cancels_its_request(build, accept, num_deltas):
    begun, release = threading.Event(), threading.Event()
    deltas = iter(range(9))

    def during():
        if next(deltas) >= num_deltas:
            begun.set()
            release.wait(WAIT)

    policy = FakePolicy(deltas=("a",) * 4, during=during)
    coprs, _ = build(policy)
    app = build_app(coprs, MAX_BYTES)
    exchange = Exchange(accept, leaving=lambda: asyncio.to_thread(begun.wait, WAIT))
    asyncio.run(exchange.run(app))
    release.set()
    assert app.state.active == []
    assert policy.was_abandoned.wait(WAIT)
    assert policy.num_abandoned == 1
    assert next(deltas) < 4  # the remaining deltas were not written
    join_stream_threads()
    assert coprs._limit.num_active == 0


@pytest.mark.parametrize("name", ["_encode_prior", "_encode_result"])
def test_client_that_leaves_during_an_encoding_ends_its_request(build, monkeypatch, name):
    begun, release = threading.Event(), threading.Event()
    encoded = []

    def encode(*args):
        encoded.append(name)
        begun.set()
        release.wait(WAIT)
        return pytest.fail("unreachable") if len(encoded) > 1 else original(*args)

    original = getattr(events, name)
    monkeypatch.setattr(events, name, encode)
    coprs, _ = build(FakePolicy())
    exchange = Exchange(EVENT_STREAM, leaving=lambda: asyncio.to_thread(begun.wait, WAIT))
    asyncio.run(exchange.run(build_app(coprs, MAX_BYTES)))  # ends before the encoding does
    assert not release.is_set()
    join_stream_threads()
    assert coprs._limit.num_active == 0
    release.set()
    assert "event: result" not in exchange.text


def test_health_is_answered_while_an_event_is_encoded(build, monkeypatch):
    answered = threading.Event()
    original = events._encode_prior

    def encode(*args):
        assert answered.wait(WAIT)
        return original(*args)

    monkeypatch.setattr(events, "_encode_prior", encode)
    coprs, _ = build(FakePolicy())
    app = build_app(coprs, MAX_BYTES)

    async def both():
        streaming = asyncio.ensure_future(Exchange(EVENT_STREAM).run(app))
        health = await Exchange().run(app)
        answered.set()
        return health, await streaming

    health, stream = asyncio.run(both())
    assert health.status == 200
    assert "event: result" in stream.text


def test_steps_run_in_a_bounded_number_of_threads():
    size = steps._POOL._max_workers
    running, most, lock = 0, 0, threading.Lock()

    def step():
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        pause.wait(0.02)
        with lock:
            running -= 1

    pause = threading.Event()

    async def many():
        await asyncio.gather(*(steps.run_step(step) for _ in range(4 * size)))

    asyncio.run(many())
    assert most == size


def test_step_of_a_cancelled_request_is_not_begun():
    release, calls = threading.Event(), []

    async def cancel():
        busy = [
            asyncio.ensure_future(steps.run_step(release.wait, WAIT))
            for _ in range(steps._POOL._max_workers)
        ]
        late = asyncio.ensure_future(steps.run_step(calls.append, "begun"))
        await asyncio.sleep(0.05)
        late.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await late
        release.set()
        await asyncio.gather(*busy)
        await steps.run_step(calls.append, "next")

    asyncio.run(cancel())
    assert calls == ["next"]


def test_body_that_stops_arriving_ends_in_408(build):
    coprs, _ = build(FakePolicy())
    app = build_app(coprs, MAX_BYTES, stall_timeout_s=0.05)
    exchange = Exchange("application/json", body=[form()[:60]])
    asyncio.run(exchange.run(app))
    assert exchange.status == 408
    error = json.loads(exchange.text)
    assert error["type"] == "RequestError"
    assert "no data for 0.05 s" in error["error"]
    assert (b"connection", b"close") in exchange.sent[0]["headers"]


def test_client_that_leaves_during_its_body_ends_its_request(build, caplog):
    coprs, _ = build(FakePolicy())
    app = build_app(coprs, MAX_BYTES)
    exchange = Exchange("application/json", body=[form()[:60]])
    exchange.messages.append({"type": "http.disconnect"})
    asyncio.run(exchange.run(app))
    assert exchange.sent == []
    assert app.state.active == []
    assert not any(record.levelno >= logging.WARNING for record in caplog.records)
    assert coprs.num_active == 0


def test_body_that_arrives_too_slowly_ends_in_408(build):
    """Each piece comes in time, and their sum does not."""
    coprs, _ = build(FakePolicy())
    app = build_app(coprs, MAX_BYTES, stall_timeout_s=0.2, min_bytes_per_s=1e6)
    content = form()
    exchange = Exchange("application/json", body=[content[i : i + 1] for i in range(100)])
    received = exchange.receive

    async def receive_slowly():
        await asyncio.sleep(0.01)
        return await received()

    exchange.receive = receive_slowly
    asyncio.run(exchange.run(app))
    assert exchange.status == 408
    assert "more slowly than 1e+06 bytes/s" in json.loads(exchange.text)["error"]
    assert exchange.messages  # the rest is not read


def test_client_that_stops_reading_ends_its_request(build):
    policy = FakePolicy(deltas=("a",) * 50)
    coprs, _ = build(policy)
    app = build_app(coprs, MAX_BYTES, stall_timeout_s=0.05)
    exchange = Exchange(EVENT_STREAM, reads=lambda: len(exchange.sent) < 3)
    asyncio.run(exchange.run(app))
    assert len(exchange.sent) == 3
    assert app.state.active == []
    assert policy.was_abandoned.wait(WAIT)
    join_stream_threads()
    assert coprs._limit.num_active == 0


@BOTH
def test_request_that_the_server_cancels_gets_503(build, accept):
    begun, release = threading.Event(), threading.Event()

    def during():
        begun.set()
        release.wait(WAIT)

    policy = FakePolicy(during=during)
    coprs, _ = build(policy)
    exchange = Exchange(accept)

    async def stop():
        request = asyncio.ensure_future(exchange.run(build_app(coprs, MAX_BYTES)))
        assert await asyncio.to_thread(begun.wait, WAIT)
        request.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await request

    asyncio.run(stop())
    release.set()
    assert exchange.status == 503
    assert json.loads(exchange.text)["type"] == "ServerStopping"
    assert policy.was_abandoned.wait(WAIT)
    join_stream_threads()
