"""Traffic against small servers in the same event loop: what is sent, and what is no answer."""

import asyncio
import json

import pytest

from coprs_deploy.bench.http_traffic import (
    Mix,
    Query,
    Traffic,
    UnexpectedResponseError,
    bad_bodies,
    check_refusal,
    last_event,
    read_reply,
    read_result,
)

RESULT = {"found": True, "masks": [], "response": "", "timings": {}}
QUERY = Query(b"image", "the circle")


def reply(body, status="200 OK", kind="application/json", **headers):
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": kind, "Content-Length": len(body), **headers}
    lines = [f"HTTP/1.1 {status}", *(f"{k.replace('_', '-')}: {v}" for k, v in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode() + body


def run(responses, kinds, rate=40.0, seconds=0.5, **settings):
    """Send traffic to a server that gives these responses in turn; return exchanges and heads."""
    heads = []

    async def respond(reader, writer):
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = next((x for x in head.split("\r\n") if x.startswith("Content-Length")), ":0")
        await reader.readexactly(int(length.partition(":")[2]))
        heads.append(head)
        writer.write(responses[(len(heads) - 1) % len(responses)])
        writer.close()

    async def measure():
        server = await asyncio.start_server(respond, "127.0.0.1", 0)
        address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        traffic = Traffic(address, Mix([QUERY], kinds, 5.0), 0, **settings)
        async with server:
            return await traffic.run(rate, seconds)

    return asyncio.run(measure()), heads


def test_arrivals_are_seeded_and_do_not_wait_for_answers():
    found, heads = run([reply(RESULT)], {"json": 1, "abort": 1})
    again, _ = run([reply(RESULT)], {"json": 1, "abort": 1})
    due = sorted(e.due_s for e in found)
    assert due == sorted(e.due_s for e in again)
    assert 15 < len(due) < 70  # 40 a second that wait, as many that leave, half a second
    assert due[-1] < 0.5
    assert {e.outcome for e in found} == {"answered", "left"}
    assert all(e.latency_ms >= 0 and e.num_open >= 1 for e in found)
    assert any("Accept: text/event-stream" in head for head in heads)


def test_refusals_need_retry_after_and_count_as_refused():
    full = reply({"error": "full", "type": "QueueFullError"}, "503 Full", Retry_After=1)
    found, _ = run([full], {"json": 1})
    assert {e.outcome for e in found} == {"refused"}
    bare = reply({"error": "full", "type": "QueueFullError"}, "503 Full")
    found, _ = run([bare], {"json": 1})
    assert {e.outcome for e in found} == {"lost"}
    assert found[0].error == "json: UnexpectedResponseError: status 503 with Retry-After ''"
    with pytest.raises(UnexpectedResponseError, match="without type"):
        check_refusal(read_reply(reply({"error": ""}, "429 Slow down", Retry_After=2)))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (reply(RESULT)[:-4], "IncompleteRead"),
        (b"", "closed connection"),
        (reply(b"no json"), "Expecting value"),
        (reply({"found": False}), "without masks, response, timings"),
        (reply(RESULT, "500 No"), "status 500"),
    ],
)
def test_incomplete_and_wrong_responses_are_lost(data, message):
    found, _ = run([data], {"json": 1}, seconds=0.2)
    assert {e.outcome for e in found} == {"lost"}
    assert message in found[0].error


def test_slow_clients_send_the_whole_body_and_read_the_result():
    event = f"event: result\ndata: {json.dumps(RESULT)}\n\n".encode()
    found, heads = run(
        [reply(event, kind="text/event-stream")], {"json": 0, "slow": 1, "stream": 1}
    )
    assert {e.outcome for e in found} == {"answered"}
    assert {e.kind for e in found} == {"slow", "stream"}
    assert len(heads) == len(found)


def test_bad_bodies_must_be_rejected_with_an_error():
    error = {"error": "wrong", "type": "RequestError"}
    found, _ = run([reply(error, "422 No")], {"json": 1e-9, "bad": 1}, rate=1e-8, seconds=1)
    assert {e.outcome for e in found} <= {"rejected"}
    kinds = {"json": 1, "bad": 9}
    found, _ = run([reply(RESULT)], kinds, rate=4)
    assert {e.outcome for e in found if e.kind == "bad"} == {"lost"}
    found, _ = run([reply(RESULT)], kinds, rate=4, is_documented=False)
    assert {e.outcome for e in found if e.kind == "bad"} == {"rejected"}
    assert len({len(body) for body in bad_bodies(b"x" * 100)}) == 9


def test_events_and_results_are_read_to_the_end():
    whole = 'event: text\ndata: {"text": "a"}\n\nevent: result\ndata: {"found": true}\n\n'
    assert last_event(whole) == ("result", {"found": True})
    for cut in (whole[:-1], whole[:-30], ""):
        with pytest.raises(UnexpectedResponseError, match="in the middle"):
            last_event(cut)
    failed = b'event: error\ndata: {"error": "no", "type": "PolicyError"}\n\n'
    with pytest.raises(UnexpectedResponseError, match="ends with error"):
        read_result(read_reply(reply(failed, kind="text/event-stream")))


def test_closed_loop_without_results_is_refused():
    async def measure():
        server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
        address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with server:
            await Traffic(address, Mix([QUERY], {"json": 1}), 0).run_closed(1, 0.05)

    with pytest.raises(UnexpectedResponseError, match="no result in"):
        asyncio.run(measure())
