"""Connections whose requests are never finished, over real sockets."""

import asyncio
import contextlib
import json

import pytest
import uvicorn
from starlette.responses import JSONResponse

from coprs_deploy.server.connection import TimedConnection
from coprs_deploy.server.request_guard import RequestGuard
from tests.unit.runtime_fakes import WAIT

HEAD = b"POST / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 4\r\n\r\n"


class ShortConnection(TimedConnection):
    request_timeout_s = 0.1
    unread_timeout_s = 0.2


async def app(scope, receive, send):
    """Respond with the body, or refuse a GET before its body is read."""
    body = b"" if scope["method"] == "GET" else (await receive())["body"]
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@contextlib.asynccontextmanager
async def connected(app, **options):
    """Run a server; yield it with the reader and the writer of a connection to it."""
    config = uvicorn.Config(app, http=ShortConnection, port=0, log_level="critical", lifespan="off")
    server = uvicorn.Server(config)
    serving = asyncio.ensure_future(server._serve())
    while not server.started:
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    reader, writer = await asyncio.open_connection("127.0.0.1", port, **options)
    try:
        yield server, reader, writer
    finally:
        writer.close()
        server.should_exit = True
        await serving


def answers(*pieces, pause_s=0.0, app=app):
    """Send pieces of a request to a server and return all that it sends until it closes."""

    async def exchange():
        async with connected(app) as (_, reader, writer):
            for piece in pieces:
                writer.write(piece)
                await asyncio.sleep(pause_s)
            return await asyncio.wait_for(reader.read(), WAIT)

    return asyncio.run(exchange())


def test_connection_without_a_request_is_closed():
    assert answers() == b""


@pytest.mark.parametrize("kept_alive", [b"", b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"])
def test_head_that_is_not_finished_ends_in_408(kept_alive):
    answer = answers(kept_alive, b"GET / HTTP/1.1\r\nHo", pause_s=0.05)
    assert answer.startswith(b"HTTP/1.1 200" if kept_alive else b"HTTP/1.1 408")
    head, _, body = answer[answer.index(b"HTTP/1.1 408") :].partition(b"\r\n\r\n")
    assert b"Connection: close" in head
    assert f"Content-Length: {len(body)}".encode() in head
    assert json.loads(body) == {
        "error": "the head of the request took over 0.1 s",
        "type": "RequestError",
    }


def test_body_after_its_refusal_is_not_awaited():
    request = b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n"
    assert answers(request, b"x", pause_s=0.02).startswith(b"HTTP/1.1 200")


def test_malformed_request_is_refused_in_json():
    answer = answers(b"no http\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400 Bad Request")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["type"] == "RequestError"


def test_request_that_is_served_for_longer_is_not_cut():
    answer = answers(HEAD, b"body", pause_s=0.3)
    assert answer.startswith(b"HTTP/1.1 200")
    assert answer.endswith(b"body")


def test_refusal_is_read_by_a_client_that_sends_a_large_body_first():
    async def full(scope, receive, send):
        await JSONResponse({"type": "QueueFullError"}, 503)(scope, receive, send)

    guard = RequestGuard(
        full,
        max_bytes=1 << 24,
        api_keys=None,
        root_path="",
        stall_timeout_s=WAIT,
        min_bytes_per_s=1,
    )
    num_bytes = 1 << 23
    head = HEAD.replace(b"Length: 4", b"Length: %d" % num_bytes)
    answer = answers(head, *[bytes(1 << 20)] * 8, pause_s=0.02, app=guard)
    assert answer.startswith(b"HTTP/1.1 503")
    assert answer.endswith(b'{"type":"QueueFullError"}')


@pytest.mark.parametrize("num_parts", [1, 20])
def test_client_that_reads_nothing_frees_its_response(num_parts):
    """Also what is complete for the application: the rest is in the buffer of the connection."""
    part = bytes(20_000_000 // num_parts)

    async def large(scope, receive, send):
        headers = [(b"content-length", str(num_parts * len(part)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for number in reversed(range(num_parts)):
            await send({"type": "http.response.body", "body": part, "more_body": number > 0})

    async def exchange():
        async with connected(large, limit=1) as (server, _, writer):
            connections = server.server_state.connections
            writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            async with asyncio.timeout(WAIT):
                while not connections:
                    await asyncio.sleep(0.01)
                while connections:
                    await asyncio.sleep(0.01)
            writer.transport.abort()

    asyncio.run(exchange())
