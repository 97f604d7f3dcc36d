"""Memory of the images of many requests: those that wait hold their file only."""

import asyncio
import contextlib
import io
import threading

import pytest

from coprs_deploy.images import decoded_bytes
from coprs_deploy.runtime import concurrency
from coprs_deploy.server.app import build_app
from coprs_deploy.server.bodies import EVENT_STREAM
from tests.unit.runtime_fakes import WAIT, FakePolicy, join_stream_threads
from tests.unit.server.asgi import MAX_BYTES, Exchange, png

IMAGE_BYTES = 20 * 30 * 3
"""Pixels of the image of an :class:`Exchange`."""


class Held:
    """A policy that holds its requests, and the images that were decoded meanwhile."""

    def __init__(self, monkeypatch):
        self.release = threading.Event()
        self.policy = FakePolicy(during=lambda: self.release.wait(WAIT))
        self.num_decoded = 0
        original = concurrency.load_image

        def load(source):
            self.num_decoded += 1
            return original(source)

        monkeypatch.setattr(concurrency, "load_image", load)

    async def until(self, condition):
        async with asyncio.timeout(WAIT):
            while not condition():
                await asyncio.sleep(0.01)


@pytest.fixture
def held(monkeypatch):
    held = Held(monkeypatch)
    yield held
    held.release.set()
    join_stream_threads()


def test_size_of_an_upload_is_read_from_its_header():
    assert decoded_bytes(io.BytesIO(png())) == IMAGE_BYTES
    assert decoded_bytes(io.BytesIO(b"no image")) == decoded_bytes(io.BytesIO()) == 0


@pytest.mark.parametrize("accept", ["application/json", EVENT_STREAM])
def test_waiting_requests_hold_no_decoded_image(build, held, accept):
    coprs, _ = build(held.policy)
    app = build_app(coprs, MAX_BYTES, max_image_bytes=2 * IMAGE_BYTES)
    exchanges = [Exchange(accept) for _ in range(9)]

    async def run():
        tasks = [asyncio.ensure_future(each.run(app)) for each in exchanges]
        await held.until(lambda: coprs._limit.num_active == 9)  # they have their places
        await held.until(lambda: len(held.policy.requests) == 2)
        await asyncio.sleep(2 * concurrency.POLL_SECONDS)
        assert held.num_decoded == 2
        assert app.state.image_memory.used_bytes == 2 * IMAGE_BYTES
        held.release.set()
        await asyncio.gather(*tasks)

    asyncio.run(run())
    assert [each.status for each in exchanges] == [200] * 9
    assert held.num_decoded == 9
    join_stream_threads()
    assert app.state.image_memory.used_bytes == coprs._limit.num_active == 0


def test_client_that_leaves_while_it_waits_gives_up_its_place(build, held):
    coprs, _ = build(held.policy)
    app = build_app(coprs, MAX_BYTES, max_image_bytes=IMAGE_BYTES)
    leave = asyncio.Event()
    first, second = Exchange("application/json"), Exchange(EVENT_STREAM, leaving=leave.wait)

    async def run():
        one = asyncio.ensure_future(first.run(app))
        await held.until(lambda: held.num_decoded == 1)
        other = asyncio.ensure_future(second.run(app))
        await held.until(lambda: coprs._limit.num_active == 2)
        leave.set()
        await other
        await held.until(lambda: coprs._limit.num_active == 1)
        held.release.set()
        await one

    asyncio.run(run())
    assert first.status == 200
    assert held.num_decoded == 1


def test_request_that_waits_past_its_deadline_gets_504(build, held):
    coprs, _ = build(held.policy, timeout_s=0.5)
    app = build_app(coprs, MAX_BYTES, max_image_bytes=IMAGE_BYTES)
    first, second = Exchange("application/json"), Exchange("application/json")

    async def run():
        one = asyncio.ensure_future(first.run(app))
        await held.until(lambda: held.num_decoded == 1)
        await second.run(app)
        held.release.set()
        with contextlib.suppress(Exception):
            await one

    asyncio.run(run())
    assert second.status == 504
    assert held.num_decoded == 1


def test_request_that_waits_ends_when_the_runtime_is_closed(build, held):
    coprs, _ = build(held.policy)
    app = build_app(coprs, MAX_BYTES, max_image_bytes=IMAGE_BYTES)
    first, second = Exchange("application/json"), Exchange("application/json")

    async def run():
        one = asyncio.ensure_future(first.run(app))
        await held.until(lambda: held.num_decoded == 1)
        other = asyncio.ensure_future(second.run(app))
        await held.until(lambda: coprs._limit.num_active == 2)
        coprs._pipeline.is_closed = True
        await other
        held.release.set()
        await one

    asyncio.run(run())
    assert second.status == 500
    assert "was closed during the request" in second.text
