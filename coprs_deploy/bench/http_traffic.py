"""Traffic to an HTTP server on this machine: open-loop arrivals of mixed requests, each checked.

Open loop: requests are sent at times drawn beforehand, whether earlier ones have been answered or
not, and latency counts from the time at which a request was due. A client that waits for its answer
before it asks again would slow down with the server and hide its queue.
"""

from __future__ import annotations

import asyncio
import http.client
import io
import json
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BOUNDARY = "traffic-boundary"

ANSWERED, REFUSED, REJECTED, LEFT, LOST = "answered", "refused", "rejected", "left", "lost"
"""Outcomes: a result; a full queue (503 or 429); a bad body or a deadline that cannot be met (4xx);
the client left; none of these."""

QUEUE_STATUSES = (429, 503)

LEAVE_WITHIN_S = 0.3
"""A client that leaves does so at a random moment of this length."""

SLOW_PART_BYTES, SLOW_PAUSE_S = 2048, 0.05
"""A slow client sends and reads so many bytes at a time, with a pause between."""


class UnexpectedResponseError(Exception):
    """A response that the documented interface does not allow here."""


@dataclass(frozen=True)
class Query:
    """One image with an instruction, as a client sends it.

    Attributes:
        image: bytes of an image file.
        instruction: what to segment.
        deadline_ms: deadline of the request in milliseconds; None for no limit.
    """

    image: bytes
    instruction: str
    deadline_ms: float | None = None


@dataclass(frozen=True)
class Mix:
    """What is sent.

    Attributes:
        queries: images with instructions, sent in this order, over and over.
        kinds: kinds of requests, and how often each is drawn: ``json``, ``stream``, ``abort``,
            ``bad``, ``slow``, ``health``.
        timeout_s: time limit of a request, from the time at which it was due.
    """

    queries: Sequence[Query]
    kinds: Mapping[str, float]
    timeout_s: float = 120.0

    @property
    def answerable_share(self) -> float:
        """Share of the requests that ask for a result and wait for it."""
        waiting = sum(self.kinds.get(kind, 0.0) for kind in ("json", "stream"))
        return waiting / sum(self.kinds.values())


@dataclass(frozen=True)
class Exchange:
    """One request and what became of it.

    Attributes:
        kind: kind of the request.
        outcome: one of the outcomes above.
        due_s: when it was due, in seconds from the start.
        lag_ms: how much later it was sent.
        latency_ms: from when it was due to the last byte of its response.
        num_open: requests without a complete response when it was sent, itself included.
        error: why it was lost; empty otherwise.
    """

    kind: str
    outcome: str
    due_s: float
    lag_ms: float
    latency_ms: float
    num_open: int
    error: str = ""

    @property
    def done_s(self) -> float:
        """When it ended, in seconds from the start."""
        return self.due_s + self.latency_ms / 1e3


@dataclass(frozen=True)
class Reply:
    """A complete response."""

    status: int
    headers: Mapping[str, str]
    body: bytes


def encode_form(fields: Mapping[str, str], image: bytes | None) -> bytes:
    """Encode a multipart form; None leaves out the image."""
    parts = [
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
        for name, value in fields.items()
    ]
    if image is not None:
        head = 'Content-Disposition: form-data; name="image"; filename="image"'
        parts.append(f"--{BOUNDARY}\r\n{head}\r\n\r\n".encode() + image + b"\r\n")
    return b"".join([*parts, f"--{BOUNDARY}--\r\n".encode()])


def bad_bodies(image: bytes) -> list[bytes]:
    """Return bodies that a server must refuse with a 4xx status."""
    named = {"instruction": "the circle"}
    return [
        encode_form(named, b"not an image"),
        encode_form(named, image[:40]),
        encode_form(named, None),
        encode_form({}, image),
        encode_form({"instruction": " "}, image),
        encode_form({**named, "max_targets": "0"}, image),
        encode_form({**named, "max_new_tokens": "many"}, image),
        b"no form at all",
        b"",
    ]


def read_reply(data: bytes) -> Reply:
    """Parse all bytes of a connection as one HTTP response.

    Raises:
        http.client.HTTPException: it is no complete response.
    """

    class Received:
        def makefile(self, *_: object) -> io.BytesIO:
            return io.BytesIO(data)

    response = http.client.HTTPResponse(Received())  # type: ignore[arg-type]
    response.begin()
    body = response.read()
    headers = {name.lower(): value for name, value in response.getheaders()}
    return Reply(response.status, headers, body)


def last_event(body: str) -> tuple[str, Any]:
    """Return name and data of the last of the server-sent events.

    Raises:
        UnexpectedResponseError: there is none, or the last is cut.
    """
    found = re.findall(r"event: (\w+)\r?\ndata: (.*)\r?\n\r?\n", body)
    if not found or not body.endswith("\n\n"):
        raise UnexpectedResponseError("an event stream that ends in the middle")
    name, data = found[-1]
    return name, json.loads(data)


def read_result(reply: Reply) -> Any:
    """Return the result in a response, JSON or an event stream.

    Raises:
        UnexpectedResponseError: there is none, or a field is missing.
    """
    text = reply.body.decode()
    if reply.status != http.client.OK:
        raise UnexpectedResponseError(f"status {reply.status}: {text[:200]}")
    if reply.headers.get("content-type", "").startswith("text/event-stream"):
        name, data = last_event(text)
        if name != "result":
            raise UnexpectedResponseError(f"a stream that ends with {name}: {str(data)[:200]}")
    else:
        data = json.loads(text)
    if missing := {"found", "masks", "response", "timings"} - set(data):
        raise UnexpectedResponseError(f"a result without {', '.join(sorted(missing))}")
    return data


def check_refusal(reply: Reply) -> None:
    """Check the refusal of a full queue: when to retry, and the error as JSON.

    Raises:
        UnexpectedResponseError: one of them is missing.
    """
    seconds = reply.headers.get("retry-after", "")
    if not seconds.isdecimal() or int(seconds) < 1:
        raise UnexpectedResponseError(f"status {reply.status} with Retry-After {seconds!r}")
    if missing := {"error", "type"} - set(json.loads(reply.body)):
        raise UnexpectedResponseError(
            f"status {reply.status} without {', '.join(sorted(missing))}: {reply.body[:200]!r}"
        )


class Traffic:
    """Requests to one server, from one thread.

    Args:
        address: ``host:port``.
        mix: what is sent.
        seed: seed of kinds, arrival times, and when clients leave.
        is_documented: whether bad bodies must get the errors of this package's interface; another
            server only has to answer them.

    Attributes:
        exchanges: what was sent, in the order of the ends.
        num_open: requests without a complete response.
    """

    def __init__(self, address: str, mix: Mix, seed: int, *, is_documented: bool = True) -> None:
        self._host, self._port = address.rsplit(":", 1)
        self._mix = mix
        self._arrivals, self._random = random.Random(seed), random.Random(seed + 1)
        self._is_documented = is_documented
        self._num_sent = 0
        self.exchanges: list[Exchange] = []
        self.num_open = 0

    async def run(self, rate: float, seconds: float) -> list[Exchange]:
        """Send requests with exponential gaps for a time, and wait for the last response.

        Args:
            rate: requests per second that wait for a result; the other kinds come on top.
            seconds: duration of the arrivals.
        """
        first, running = len(self.exchanges), set[asyncio.Task[None]]()
        total = rate / self._mix.answerable_share
        start, due = time.perf_counter(), self._arrivals.expovariate(total)
        while due < seconds:
            await asyncio.sleep(max(0.0, start + due - time.perf_counter()))
            kind, query = self._draw()
            task = asyncio.create_task(self.send(kind, query, start, due))
            running.add(task)
            task.add_done_callback(running.discard)
            due += self._arrivals.expovariate(total)
        await asyncio.gather(*running)
        return self.exchanges[first:]

    async def run_closed(self, num_clients: int, seconds: float) -> float:
        """Send JSON requests, ``num_clients`` at a time; return the results per second."""
        first, start = len(self.exchanges), time.perf_counter()

        async def client() -> None:
            while time.perf_counter() - start < seconds:
                _, query = self._draw()
                await self.send("json", query, start, time.perf_counter() - start)

        await asyncio.gather(*(client() for _ in range(num_clients)))
        answered = [e for e in self.exchanges[first:] if e.outcome == ANSWERED]
        if not answered:
            errors = {e.error for e in self.exchanges[first:]}
            raise UnexpectedResponseError(
                f"no result in {seconds:g} s: {'; '.join(sorted(errors))}"
            )
        return len(answered) / max(e.done_s for e in answered)

    def _draw(self) -> tuple[str, Query]:
        kinds = self._mix.kinds
        (kind,) = self._arrivals.choices(list(kinds), list(kinds.values()))
        query = self._mix.queries[self._num_sent % len(self._mix.queries)]
        self._num_sent += 1
        return kind, query

    async def send(self, kind: str, query: Query, start: float, due: float) -> None:
        """Send one request and record what became of it."""
        lag = time.perf_counter() - start - due
        self.num_open += 1
        num_open, error = self.num_open, ""
        work: Callable[[Query], Any] = getattr(self, f"_{kind}")
        try:
            async with asyncio.timeout(self._mix.timeout_s):
                outcome = await work(query)
        except (
            OSError,
            EOFError,
            http.client.HTTPException,
            ValueError,
            UnexpectedResponseError,
        ) as caught:
            outcome, error = LOST, f"{kind}: {type(caught).__name__}: {caught}"
        finally:
            self.num_open -= 1
        latency = time.perf_counter() - start - due
        self.exchanges.append(
            Exchange(kind, outcome, due, 1e3 * lag, 1e3 * latency, num_open, error)
        )

    async def ask(self, query: Query) -> Reply:
        """Send one JSON request that is not recorded; return the response."""
        return await self.request("POST", "/segment", _body(query))

    async def request(
        self, method: str, path: str, body: bytes = b"", accept: str = "application/json"
    ) -> Reply:
        """Send a request on a connection of its own; return the response."""
        reader, writer = await asyncio.open_connection(self._host, self._port)
        try:
            writer.write(self._head(method, path, accept, len(body)) + body)
            await writer.drain()
            return read_reply(await reader.read())
        finally:
            writer.close()

    def _head(self, method: str, path: str, accept: str, num_bytes: int) -> bytes:
        form = f"multipart/form-data; boundary={BOUNDARY}"
        lines = [
            f"{method} {path} HTTP/1.1",
            f"Host: {self._host}:{self._port}",
            "Connection: close",
            f"Accept: {accept}",
            *(
                [f"Content-Type: {form}", f"Content-Length: {num_bytes}"]
                if method == "POST"
                else []
            ),
        ]
        return "\r\n".join([*lines, "", ""]).encode()

    async def _json(self, query: Query) -> str:
        return self._read(await self.ask(query), query)

    async def _stream(self, query: Query) -> str:
        accept = "text/event-stream"
        return self._read(await self.request("POST", "/segment", _body(query), accept), query)

    @staticmethod
    def _read(reply: Reply, query: Query) -> str:
        if reply.status in QUEUE_STATUSES:
            check_refusal(reply)
            return REFUSED
        if query.deadline_ms and 400 <= reply.status < 500 and b"deadline_ms" in reply.body:
            return REJECTED
        read_result(reply)
        return ANSWERED

    async def _abort(self, query: Query) -> str:
        """Leave after a moment, in half of the cases not before the first byte."""
        reader, writer = await asyncio.open_connection(self._host, self._port)
        try:
            body = _body(query)
            writer.write(self._head("POST", "/segment", "text/event-stream", len(body)) + body)
            await writer.drain()
            if self._random.random() < 0.5:
                await reader.read(1)
            else:
                await asyncio.sleep(self._random.uniform(0, LEAVE_WITHIN_S))
        finally:
            writer.close()
        return LEFT

    async def _bad(self, query: Query) -> str:
        body = self._random.choice(bad_bodies(query.image))
        reply = await self.request("POST", "/segment", body)
        if self._is_documented and (
            not 400 <= reply.status < 500 or {"error", "type"} - set(json.loads(reply.body))
        ):
            raise UnexpectedResponseError(
                f"status {reply.status} for a bad body: {reply.body[:200]!r}"
            )
        return REJECTED

    async def _health(self, query: Query) -> str:
        reply = await self.request("GET", "/health")
        if reply.status != http.client.OK:
            raise UnexpectedResponseError(f"/health has status {reply.status}")
        return ANSWERED

    async def _slow(self, query: Query) -> str:
        """Send and read in small parts."""
        reader, writer = await asyncio.open_connection(self._host, self._port)
        try:
            body = _body(query)
            writer.write(self._head("POST", "/segment", "text/event-stream", len(body)))
            for part in _parts(body):
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(SLOW_PAUSE_S)
            received = []
            while part := await reader.read(SLOW_PART_BYTES):
                received.append(part)
                await asyncio.sleep(SLOW_PAUSE_S)
            return self._read(read_reply(b"".join(received)), query)
        finally:
            writer.close()


def _body(query: Query) -> bytes:
    fields = {"instruction": query.instruction}
    if query.deadline_ms is not None:
        fields["deadline_ms"] = f"{query.deadline_ms:g}"
    return encode_form(fields, query.image)


def _parts(body: bytes) -> Iterator[bytes]:
    for start in range(0, len(body), SLOW_PART_BYTES):
        yield body[start : start + SLOW_PART_BYTES]
