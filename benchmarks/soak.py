"""Soak test of the HTTP server: mixed requests for minutes, memory over time, lost requests.

    python benchmarks/soak.py --out DIR --minutes 20

Starts `coprs-deploy serve` on a free loopback port and sends it images from 1 pixel to 12
megapixels, as JSON and as event streams. Some clients leave before the end, some bodies are not
accepted, and two clients send and read slowly. Exit code 1 if the memory of the server grows by
more than 2 % over the last half, or if a request is lost: no response, an incomplete one, or an
unexpected status.
"""

from __future__ import annotations

import argparse
import http.client
import io
import json
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import psutil
from PIL import Image

from coprs_deploy.artifacts import write_json
from coprs_deploy.console import format_bytes, format_ms
from coprs_deploy.machine import machine_record

NAME = "soak"

MAX_GROWTH = 0.02
"""Share by which the memory may grow over the last half."""

SIZES = ((1, 1), (3, 500), (64, 64), (128, 128), (640, 480), (1600, 1200), (4000, 3000))
"""Widths and heights of the images in pixels."""

INSTRUCTIONS = ("the largest red circle", "the leftmost circle", "das linke Quadrat", "🔴")

KINDS = {"json": 10, "stream": 5, "abort": 3, "bad": 3, "health": 2}
"""Kinds of requests, and how often each is drawn."""

SLOW_CLIENTS = 2
SLOW_PART_BYTES, SLOW_PAUSE_S = 2048, 0.05
"""A slow client sends and reads so many bytes at a time, with a pause between."""

START_TIMEOUT_S, REQUEST_TIMEOUT_S, STOP_TIMEOUT_S = 600.0, 180.0, 60.0

BOUNDARY = "soak-boundary"
FORM = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}


class UnexpectedResponseError(Exception):
    """A response that the documented interface does not allow here."""


@dataclass
class Log:
    """What the clients saw; they share it."""

    outcomes: Counter[str] = field(default_factory=Counter)
    latencies_ms: dict[str, list[float]] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def record(self, kind: str, work: Callable[[], str]) -> None:
        """Make a request; ``work`` returns its outcome."""
        start = time.perf_counter()
        try:
            outcome, error = work(), ""
        except (OSError, http.client.HTTPException, ValueError, UnexpectedResponseError) as caught:
            outcome, error = "lost", f"{kind}: {type(caught).__name__}: {caught}"
        elapsed_ms = 1e3 * (time.perf_counter() - start)
        with self.lock:
            self.outcomes[outcome] += 1
            if error:
                self.lost.append(error)
            if outcome == "answered":
                self.latencies_ms.setdefault(kind, []).append(elapsed_ms)


def percentiles(milliseconds: Sequence[float]) -> dict[str, float]:
    """Return the number of requests and their p50, p90, p99 and maximum; each is a measured one."""
    values = np.asarray(milliseconds)
    found = {f"p{q}": float(np.quantile(values, q / 100, method="higher")) for q in (50, 90, 99)}
    return {"n": len(values), **found, "max": float(values.max())}


def growth_of_last_half(resident_bytes: Sequence[int]) -> float:
    """Return by which share the memory grew over the last half of evenly spaced samples.

    The median of the last fifth of that half is compared with the median of its first fifth, so
    that single large requests do not count.

    Raises:
        ValueError: there are fewer than 10 samples.
    """
    if len(resident_bytes) < 10:
        raise ValueError(f"{len(resident_bytes)} samples of the memory; accepted: 10 and more")
    half = resident_bytes[len(resident_bytes) // 2 :]
    part = max(1, len(half) // 5)
    return float(np.median(half[-part:]) / np.median(half[:part]) - 1)


def form(fields: Mapping[str, str], image: bytes | None) -> bytes:
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
    """Return bodies that the server must refuse with a 4xx status."""
    named = {"instruction": "the circle"}
    return [
        form(named, b"not an image"),
        form(named, image[: len(image) // 2][:40]),
        form(named, None),
        form({}, image),
        form({"instruction": " "}, image),
        form({**named, "max_targets": "0"}, image),
        form({**named, "max_new_tokens": "many"}, image),
        b"no form at all",
        b"",
    ]


def draw_image(width: int, height: int, seed: int) -> bytes:
    """Encode a disc on a gradient: a JPEG, or a PNG if it is small."""
    generator = np.random.default_rng(seed)
    x, y = np.linspace(0, 1, width)[None], np.linspace(0, 1, height)[:, None]
    pixels = (255 * np.stack([x + 0 * y, y + 0 * x, (x + y) / 2], axis=-1)).astype(np.uint8)
    pixels[(x - 0.5) ** 2 + (y - 0.5) ** 2 < 0.05] = generator.integers(0, 256, 3)
    written = io.BytesIO()
    Image.fromarray(pixels).save(written, "JPEG" if width * height > 10_000 else "PNG")
    return written.getvalue()


def check_result(data: Any) -> None:
    """Check the fields of a result.

    Raises:
        UnexpectedResponseError: one is missing.
    """
    missing = {"found", "masks", "response", "timings"} - set(data)
    if missing:
        raise UnexpectedResponseError(f"a result without {', '.join(sorted(missing))}")


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


class Client:
    """Sends requests of random kinds until it is told to stop."""

    def __init__(self, address: str, images: Sequence[bytes], log: Log, seed: int) -> None:
        self._address, self._images, self._log = address, images, log
        self._random = random.Random(seed)

    def run(self, stop: threading.Event) -> None:
        """Send one request after the other."""
        while not stop.is_set():
            (kind,) = self._random.choices(list(KINDS), list(KINDS.values()))
            self._log.record(kind, getattr(self, f"_{kind}"))

    def run_slowly(self, stop: threading.Event) -> None:
        """Send one event stream after the other, in small parts."""
        while not stop.is_set():
            self._log.record("slow", self._slow)

    def _connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self._address, timeout=REQUEST_TIMEOUT_S)

    def _body(self) -> bytes:
        fields = {"instruction": self._random.choice(INSTRUCTIONS)}
        if self._random.random() < 0.3:
            fields["max_targets"] = "2"
        return form(fields, self._random.choice(self._images))

    def _send(self, body: bytes, accept: str = "application/json") -> tuple[int, str]:
        connection = self._connect()
        try:
            connection.request("POST", "/segment", body, {**FORM, "Accept": accept})
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    def _json(self) -> str:
        status, body = self._send(self._body())
        if status != http.client.OK:
            raise UnexpectedResponseError(f"status {status}: {body[:200]}")
        check_result(json.loads(body))
        return "answered"

    def _stream(self) -> str:
        status, body = self._send(self._body(), "text/event-stream")
        return self._check_stream(status, body)

    @staticmethod
    def _check_stream(status: int, body: str) -> str:
        if status != http.client.OK:
            raise UnexpectedResponseError(f"status {status}: {body[:200]}")
        name, data = last_event(body)
        if name != "result":
            raise UnexpectedResponseError(f"a stream that ends with {name}: {str(data)[:200]}")
        check_result(data)
        return "answered"

    def _abort(self) -> str:
        """Leave after a moment, in half of the cases after the first part of the response."""
        connection = self._connect()
        try:
            headers = {**FORM, "Accept": "text/event-stream"}
            connection.request("POST", "/segment", self._body(), headers)
            if self._random.random() < 0.5:
                connection.getresponse().read(64)
            else:
                time.sleep(self._random.uniform(0, 0.3))
        finally:
            connection.close()
        return "left"

    def _bad(self) -> str:
        status, body = self._send(self._random.choice(bad_bodies(self._images[2])))
        if not 400 <= status < 500 or {"error", "type"} - set(json.loads(body)):
            raise UnexpectedResponseError(f"status {status} for a bad body: {body[:200]}")
        return "refused"

    def _health(self) -> str:
        connection = self._connect()
        try:
            connection.request("GET", "/health")
            response = connection.getresponse()
            response.read()
        finally:
            connection.close()
        if response.status != http.client.OK:
            raise UnexpectedResponseError(f"/health has status {response.status}")
        return "answered"

    def _slow(self) -> str:
        connection, body = self._connect(), self._body()[: 1 << 30]
        try:
            connection.putrequest("POST", "/segment")
            headers = {**FORM, "Accept": "text/event-stream", "Content-Length": str(len(body))}
            for name, value in headers.items():
                connection.putheader(name, value)
            connection.endheaders()
            for start in range(0, len(body), SLOW_PART_BYTES):
                connection.send(body[start : start + SLOW_PART_BYTES])
                time.sleep(SLOW_PAUSE_S)
            response, parts = connection.getresponse(), list[bytes]()
            while part := response.read(SLOW_PART_BYTES):
                parts.append(part)
                time.sleep(SLOW_PAUSE_S)
            return self._check_stream(response.status, b"".join(parts).decode())
        finally:
            connection.close()


@contextmanager
def serving(bundle: Path | None) -> Iterator[tuple[psutil.Process, str]]:
    """Start the server on a free port; yield its process and ``host:port``, and stop it.

    Raises:
        RuntimeError: it ended, or did not listen in time.
    """
    command = [sys.executable, "-m", "coprs_deploy", "serve", "--port", "0"]
    command += [str(bundle)] if bundle is not None else []
    with tempfile.NamedTemporaryFile(suffix=".log") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            yield psutil.Process(server.pid), _wait_for_address(server, log)
            if server.poll() is not None:
                raise RuntimeError(f"the server ended with {server.returncode}: {_last(log)}")
        finally:
            server.terminate()
            try:
                server.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def _wait_for_address(server: subprocess.Popen[bytes], log: IO[bytes]) -> str:
    end = time.monotonic() + START_TIMEOUT_S
    while server.poll() is None and time.monotonic() < end:
        text = Path(log.name).read_text(encoding="utf-8", errors="replace")
        if found := re.search(r"^http://(127\.0\.0\.1:\d+)$", text, re.MULTILINE):
            return found[1]
        time.sleep(0.2)
    raise RuntimeError(f"the server does not listen: {_last(log)}")


def _last(log: IO[bytes]) -> str:
    lines = Path(log.name).read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "it wrote nothing"


def resident_bytes(server: psutil.Process) -> int:
    """Return the resident memory of the server and of the processes that it started."""
    processes = (server, *server.children(recursive=True))
    return sum(int(process.memory_info().rss) for process in processes)


def soak(address: str, server: psutil.Process, seconds: float, num_clients: int) -> dict[str, Any]:
    """Send requests for a while; return what happened, and the memory over time."""
    log, stop, memory = Log(), threading.Event(), list[int]()
    images = [draw_image(*size, seed) for seed, size in enumerate(SIZES)]
    threads = []
    for number in range(num_clients + SLOW_CLIENTS):
        client = Client(address, images, log, number)
        run = client.run if number < num_clients else client.run_slowly
        threads.append(threading.Thread(target=run, args=(stop,), daemon=True))
    start = time.monotonic()
    for thread in threads:
        thread.start()
    while (elapsed := time.monotonic() - start) < seconds and server.is_running():
        memory.append(resident_bytes(server))
        time.sleep(min(max(0.1, seconds / 400), seconds - elapsed))
    stop.set()
    for thread in threads:
        thread.join(REQUEST_TIMEOUT_S)
    stuck = sum(thread.is_alive() for thread in threads)
    log.lost += ["a request without an end"] * stuck
    return {
        "seconds": round(time.monotonic() - start, 1),
        "requests": sum(log.outcomes.values()) + stuck,
        "outcomes": {**log.outcomes, "lost": len(log.lost)},
        "lost": log.lost[:20],
        "latency_ms": {kind: percentiles(found) for kind, found in log.latencies_ms.items()},
        "resident_bytes": memory,
        "growth_of_last_half": growth_of_last_half(memory),
    }


def failures(report: Mapping[str, Any]) -> list[str]:
    """List why a soak test failed; empty when it passed."""
    growth, lost = report["growth_of_last_half"], report["outcomes"]["lost"]
    found = []
    if not growth <= MAX_GROWTH:
        found.append(f"memory grew by {growth:.1%} over the last half; accepted: {MAX_GROWTH:.0%}")
    if lost:
        found.append(f"{lost} of {report['requests']} requests were lost: {report['lost'][0]}")
    return found


def summary(report: Mapping[str, Any]) -> list[str]:
    """Describe a report in a few lines."""
    memory = report["resident_bytes"]
    counts = ", ".join(f"{number} {outcome}" for outcome, number in report["outcomes"].items())
    lines = [
        f"{report['requests']} requests in {report['seconds']:.0f} s: {counts}",
        f"memory {format_bytes(memory[0])} at first, {format_bytes(max(memory))} at most, "
        f"{format_bytes(memory[-1])} at the end; "
        f"{report['growth_of_last_half']:+.2%} over the last half",
    ]
    for kind, found in sorted(report["latency_ms"].items()):
        times = ", ".join(
            f"{name} {format_ms(found[name])}" for name in ("p50", "p90", "p99", "max")
        )
        lines.append(f"{kind:<8}{found['n']:>6} requests, {times}")
    return lines


def main(arguments: Sequence[str]) -> int:
    """Run the test and write its report; exit code 1 if it failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder of the report"
    )
    parser.add_argument("--minutes", type=float, default=20, help="duration (default: 20)")
    parser.add_argument("--clients", type=int, default=3, help="clients at once (default: 3)")
    parser.add_argument("--bundle", type=Path, help="bundle to serve (default: the demo model)")
    given = parser.parse_args(arguments)
    if given.minutes <= 0 or given.clients < 1:
        parser.error(
            f"--minutes is {given.minutes} and --clients {given.clients}; accepted: above 0"
        )
    given.out.mkdir(parents=True, exist_ok=True)
    with serving(given.bundle) as (server, address):
        report = soak(address, server, 60 * given.minutes, given.clients)
    report = {"suite": NAME, "machine": machine_record().to_json(), **report}
    write_json(given.out / f"{NAME}.json", report)
    failed = failures(report)
    print("\n".join([*summary(report), *failed]))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
