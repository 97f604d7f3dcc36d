"""Load test of the HTTP server: latency and throughput up to saturation, deadlines, memory.

    python benchmarks/server_load.py --out benchmarks/reports --part load
    python benchmarks/server_load.py --out benchmarks/reports --part deadlines --no-peer
    python benchmarks/server_load.py --out benchmarks/reports --part memory --minutes 20

Starts `coprs-deploy serve` and `plain_server.py`, the peer, on free loopback ports. Part `load`
raises the rate of an open loop of requests (Poisson arrivals, images of 128 x 128 to 4000 x 3000
pixels, some clients leave) until a server no longer keeps up; both get the same rates in turn. Part
`deadlines` sends requests with `deadline_ms` at shares of the capacity without one, and counts
those that were answered in time by the client's clock. Part `memory` sends mixed requests to both
for 20 minutes, with bad bodies and slow clients, and fits the slope of the memory. Each part is
added to the report of this kind of machine: JSON, Markdown and a chart. Exit code 1 if
`coprs-deploy serve` loses a request, refuses one without a full queue or Retry-After, keeps
requests after a load, or if its memory grows by over 2 % in the last half.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import random
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import IO, Any

import numpy as np
import psutil
from numpy.typing import NDArray
from PIL import Image

from coprs_deploy.artifacts import make_directory, write_json
from coprs_deploy.bench.http_traffic import (
    ANSWERED,
    LEFT,
    LOST,
    REFUSED,
    Exchange,
    Mix,
    Query,
    Traffic,
    read_result,
)
from coprs_deploy.bench.load_report import write_outputs
from coprs_deploy.data.rle import decode_mask
from coprs_deploy.data.synthetic import PLAIN
from coprs_deploy.data.synthetic.examples import held_out_examples
from coprs_deploy.evaluation.metrics import count_pixels, iou
from coprs_deploy.machine import machine_record

NAME = "server-load"

OURS, PEER = "coprs-deploy serve", "plain loop"

MAX_GROWTH = 0.02
"""Share by which the memory may grow over the last half, by its slope."""

SIZES = {(128, 128): 3, (640, 480): 4, (1600, 1200): 2, (4000, 3000): 1}
"""Widths and heights of the images in pixels, and how often each is sent."""

NUM_QUERIES, NUM_COMPARED = 60, 8
"""Different images, more than any cache of embeddings holds; and those that both servers answer
before the load."""

LOAD_KINDS = {"json": 7, "stream": 2, "abort": 1}
MEMORY_KINDS = {"json": 10, "stream": 5, "abort": 3, "bad": 3, "health": 2, "slow": 1}

NUM_CALIBRATION_CLIENTS, CALIBRATION_S = 2, 6.0
DEADLINES_MS = (100.0, 200.0, 400.0, 800.0)
DEADLINE_RATES = (0.3, 0.6, 0.9)
"""Rates of part `deadlines` over the capacity without a deadline."""

LOWEST, HIGHEST = 0.25, 1.5
"""First rate over the smaller capacity; last rate of a server over its own."""

SATURATED_SHARE = 0.9
"""Results over requests, per second, below which a server does not keep up."""

MAX_PENDING = 4
"""Requests that may be open at the end of a rate with which a server keeps up."""

WARM_SHARE = 0.2
"""First part of a level, which is not measured."""

UTILIZATION = 0.6
"""Share of the processor's time that both servers together have to work in part `memory`."""

ABORT_NOTICE_S = 5.0
"""Time in which a server may still count a client that has left."""

DRAIN_TIMEOUT_S, START_TIMEOUT_S, STOP_TIMEOUT_S = 15.0, 600.0, 60.0


@dataclass(frozen=True)
class Server:
    """A running server."""

    name: str
    process: psutil.Process
    address: str
    traffic: Traffic

    @property
    def is_ours(self) -> bool:
        """Whether it is the server under test."""
        return self.name == OURS

    def resident_bytes(self) -> int:
        """Return the resident memory of its process and of those that it started."""
        processes = (self.process, *self.process.children(recursive=True))
        return sum(int(process.memory_info().rss) for process in processes)


def make_queries(count: int, seed: int) -> list[Query]:
    """Draw held-out scenes of the demo model in the sizes of the mix, as PNG or JPEG files."""
    generator, queries = random.Random(seed), []
    for example in held_out_examples(PLAIN, count, 0):
        (size,) = generator.choices(list(SIZES), list(SIZES.values()))
        image = Image.fromarray(np.asarray(example.image))
        written = io.BytesIO()
        if image.size == size:
            image.save(written, "PNG")
        else:
            image.resize(size, Image.Resampling.BICUBIC).save(written, "JPEG", quality=90)
        queries.append(Query(written.getvalue(), example.instruction))
    return queries


@contextmanager
def serving(command: Sequence[str]) -> Iterator[tuple[psutil.Process, str]]:
    """Start a server that prints its address; yield its process and ``host:port``, and stop it.

    Raises:
        RuntimeError: it ended, or did not listen in time.
    """
    with tempfile.NamedTemporaryFile(suffix=".log") as log:
        server = subprocess.Popen([sys.executable, *command], stdout=log, stderr=log)
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


async def mean_agreement(servers: Sequence[Server], queries: Sequence[Query]) -> float:
    """Return the mean IoU of the masks that two servers answer."""
    first, second = servers
    ious = []
    for query in queries:
        size = Image.open(io.BytesIO(query.image)).size
        ours, theirs = [await _mask(server.traffic, query, size) for server in (first, second)]
        ious.append(iou(count_pixels(ours, theirs), empty=1.0))
    return float(np.mean(ious))


async def _mask(traffic: Traffic, query: Query, size: tuple[int, int]) -> NDArray[np.bool_]:
    width, height = size
    data = read_result(await traffic.ask(query))
    if not data["masks"]:
        return np.zeros((height, width), np.bool_)
    return decode_mask(data["masks"][0], height, width)


def level_record(exchanges: Sequence[Exchange], rate: float, seconds: float) -> dict[str, Any]:
    """Summarize one rate: results per second and latencies after the first part of the level.

    Latencies are those of requests that were due in this time; they end later where a queue grows.
    """
    start = WARM_SHARE * seconds
    requested = [e for e in exchanges if e.kind in ("json", "stream")]
    due = [e for e in requested if start <= e.due_s < seconds]
    done = [e for e in requested if e.outcome == ANSWERED and start <= e.done_s < seconds]
    latencies = [e.latency_ms for e in due if e.outcome == ANSWERED]
    record: dict[str, Any] = {
        "rate": rate,
        "offered_per_s": len(due) / (seconds - start),
        "answered_per_s": len(done) / (seconds - start),
        "outcomes": dict(Counter(e.outcome for e in exchanges)),
        "lost": [e.error for e in exchanges if e.outcome == LOST][:10],
        "max_open": max((e.num_open for e in exchanges), default=0),
        "p99_lag_ms": quantile([e.lag_ms for e in exchanges], 0.99),
        "n": len(latencies),
        **{f"p{q}": quantile(latencies, q / 100) for q in (50, 95, 99)},
    }
    pending = sum(e.done_s >= seconds for e in requested)
    keeps_up = record["answered_per_s"] >= SATURATED_SHARE * record["offered_per_s"]
    record["is_saturated"] = REFUSED in record["outcomes"] or (
        not keeps_up and pending > MAX_PENDING
    )
    return record


def quantile(values: Sequence[float], q: float) -> float | None:
    """Return a quantile that is one of the values; None without values."""
    return float(np.quantile(values, q, method="higher")) if values else None


def num_early_refusals(exchanges: Sequence[Exchange], max_queue_size: int) -> int:
    """Count refusals although the queue cannot have been full.

    The server cannot count more requests than are open, and those that were left a moment ago.
    """
    lefts = [e.done_s for e in exchanges if e.outcome == LEFT]
    early = 0
    for refused in (e for e in exchanges if e.outcome == REFUSED):
        ghosts = sum(0 <= refused.done_s - left <= ABORT_NOTICE_S for left in lefts)
        early += refused.num_open + ghosts <= max_queue_size
    return early


def slope_growth(seconds: Sequence[float], resident_bytes: Sequence[int]) -> tuple[float, float]:
    """Fit the memory over the last half by the median of all pairwise slopes (Theil-Sen).

    Returns:
        Bytes per second, and the growth over the last half as a share of its median.

    Raises:
        ValueError: there are fewer than 10 samples.
    """
    if len(seconds) < 10:
        raise ValueError(f"{len(seconds)} samples of the memory; accepted: 10 and more")
    half = len(seconds) // 2
    x, y = np.asarray(seconds[half:], float), np.asarray(resident_bytes[half:], float)
    i, j = np.triu_indices(len(x), 1)
    slope = float(np.median((y[j] - y[i]) / (x[j] - x[i])))
    return slope, slope * float(x[-1] - x[0]) / float(np.median(y))


async def drained(traffic: Traffic) -> bool:
    """Wait until a server counts no request any more."""
    end = time.monotonic() + DRAIN_TIMEOUT_S
    while time.monotonic() < end:
        health = json.loads((await traffic.request("GET", "/health")).body)
        if not health["active_requests"]:
            return True
        await asyncio.sleep(0.2)
    return False


async def run_load(
    servers: Sequence[Server], capacities: Mapping[str, float], given: argparse.Namespace
) -> dict[str, Any]:
    """Raise the rate; every server takes part up to the first rate that it cannot keep up with.

    The rate of a server ends at ``HIGHEST`` times its own capacity, which bounds its backlog.
    """
    lowest, highest = LOWEST * min(capacities.values()), HIGHEST * max(capacities.values())
    levels: dict[str, list[dict[str, Any]]] = {server.name: [] for server in servers}
    failed = []
    for rate in np.geomspace(lowest, highest, given.levels).tolist():
        for server in servers:
            done, ceiling = levels[server.name], HIGHEST * capacities[server.name]
            if done and (done[-1]["is_saturated"] or done[-1]["rate"] >= ceiling):
                continue
            own_rate = min(rate, ceiling)
            exchanges = await server.traffic.run(own_rate, given.seconds)
            record = level_record(exchanges, own_rate, given.seconds)
            record["resident_bytes"] = server.resident_bytes()
            done.append(record)
            print(f"{server.name}: {level_words(record)}", flush=True)
            if server.is_ours:
                failed += load_failures(record, exchanges, given.max_queue_size)
                if not await drained(server.traffic):
                    failed.append(f"at {own_rate:.2f}/s: requests were left in the server")
    return {"seconds": given.seconds, "levels": levels, "failures": failed}


def level_words(record: Mapping[str, Any]) -> str:
    """Describe a level in a line."""
    times = ", ".join(f"p{q} {record[f'p{q}'] or float('nan'):.0f} ms" for q in (50, 95, 99))
    counts = ", ".join(f"{n} {name}" for name, n in record["outcomes"].items())
    return (
        f"{record['offered_per_s']:.2f} requests/s, {record['answered_per_s']:.2f} results/s, "
        f"{times}; {counts}"
    )


def load_failures(
    record: Mapping[str, Any], exchanges: Sequence[Exchange], max_queue_size: int
) -> list[str]:
    """List what a level shows to be wrong; refusals of another form count as lost."""
    at, found = f"at {record['rate']:.2f}/s", []
    if record["lost"]:
        found.append(f"{at}: {len(record['lost'])} or more requests were lost: {record['lost'][0]}")
    if early := num_early_refusals(exchanges, max_queue_size):
        found.append(f"{at}: {early} requests were refused before the queue was full")
    if record["max_open"] > 2 * max_queue_size + 2 and not record["outcomes"].get(REFUSED):
        found.append(f"{at}: {record['max_open']} requests were open, and none was refused")
    return found


async def run_deadlines(
    server: Server, queries: Sequence[Query], capacity: float, given: argparse.Namespace
) -> dict[str, Any]:
    """Send requests with each deadline at each rate."""
    levels = []
    for deadline_ms in (None, *given.deadline_ms):
        timed = [replace(query, deadline_ms=deadline_ms) for query in queries]
        traffic = Traffic(server.address, Mix(timed, {"json": 1}), given.seed)
        for share in DEADLINE_RATES:
            exchanges = await traffic.run(share * capacity, given.seconds)
            record = level_record(exchanges, share * capacity, given.seconds)
            record |= {"deadline_ms": deadline_ms, "share": share}
            if deadline_ms is not None:
                record["in_time"] = in_time(exchanges, deadline_ms, given.seconds)
            levels.append(record)
            print(f"{deadline_ms or 'no deadline'}: {level_words(record)}", flush=True)
            await drained(traffic)
    failed = [f"at {r['rate']:.2f}/s: {r['lost'][0]}" for r in levels if r["lost"]]
    return {"seconds": given.seconds, "levels": levels, "failures": failed}


def in_time(exchanges: Sequence[Exchange], deadline_ms: float, seconds: float) -> float:
    """Return the share of the measured requests that were answered within the deadline."""
    due = [e for e in exchanges if WARM_SHARE * seconds <= e.due_s < seconds]
    answered = [e for e in due if e.outcome == ANSWERED and e.latency_ms <= deadline_ms]
    return len(answered) / len(due) if due else 0.0


async def run_memory(
    servers: Sequence[Server], capacities: Mapping[str, float], minutes: float
) -> dict[str, Any]:
    """Send mixed requests to all servers at one rate, and sample their memory."""
    rate = UTILIZATION / sum(1 / capacity for capacity in capacities.values())
    seconds, start = 60 * minutes, time.monotonic()
    samples: dict[str, list[int]] = {server.name: [] for server in servers}
    times: list[float] = []

    async def sample() -> None:
        while (elapsed := time.monotonic() - start) < seconds:
            times.append(round(elapsed, 2))
            for server in servers:
                samples[server.name].append(server.resident_bytes())
            await asyncio.sleep(max(0.1, seconds / 600))

    sampling = asyncio.create_task(sample())
    found = await asyncio.gather(*(server.traffic.run(rate, seconds) for server in servers))
    await sampling
    records, failed = {}, []
    for server, exchanges in zip(servers, found, strict=True):
        slope, growth = slope_growth(times, samples[server.name])
        lost = [e.error for e in exchanges if e.outcome == LOST]
        records[server.name] = {
            "outcomes": dict(Counter(e.outcome for e in exchanges)),
            "lost": lost[:10],
            "resident_bytes": samples[server.name],
            "bytes_per_minute": 60 * slope,
            "growth_of_last_half": growth,
        }
        if server.is_ours:
            failed += memory_failures(growth, lost, len(exchanges))
    return {
        "minutes": minutes,
        "rate": rate,
        "seconds": times,
        "servers": records,
        "failures": failed,
    }


def memory_failures(growth: float, lost: Sequence[str], num_requests: int) -> list[str]:
    """List what the memory part shows to be wrong."""
    found = []
    if not growth <= MAX_GROWTH:
        found.append(f"memory grew by {growth:.1%} over the last half; accepted: {MAX_GROWTH:.0%}")
    if lost:
        found.append(f"{len(lost)} of {num_requests} requests were lost: {lost[0]}")
    return found


async def measure(
    servers: Sequence[Server], queries: Sequence[Query], given: Any
) -> dict[str, Any]:
    """Compare the answers, measure the capacities, and run a part."""
    agreement = await mean_agreement(servers, queries[:NUM_COMPARED]) if len(servers) == 2 else None
    capacities = {
        server.name: await server.traffic.run_closed(NUM_CALIBRATION_CLIENTS, CALIBRATION_S)
        for server in servers
    }
    print("capacity: " + ", ".join(f"{n} {c:.2f}/s" for n, c in capacities.items()), flush=True)
    if given.part == "load":
        measured = await run_load(servers, capacities, given)
    elif given.part == "deadlines":
        measured = await run_deadlines(servers[0], queries, capacities[OURS], given)
    else:
        measured = await run_memory(servers, capacities, given.minutes)
    return {"capacities": capacities, "agreement": agreement, **measured}


def open_servers(stack: ExitStack, given: Any, queries: Sequence[Query]) -> list[Server]:
    """Start the servers."""
    here = Path(__file__).parent
    bundle = [str(given.bundle)] if given.bundle else []
    size = str(given.max_queue_size)
    commands = {
        OURS: ["-m", "coprs_deploy", "serve", "--port", "0", "--max-queue-size", size, *bundle],
        PEER: [str(here / "plain_server.py"), "--port", "0", "--num-threads", "1"],
    }
    if given.checkpoint:
        commands[PEER] += ["--checkpoint", str(given.checkpoint)]
    mix = Mix(queries, MEMORY_KINDS if given.part == "memory" else LOAD_KINDS)
    servers = []
    for name in (OURS, PEER) if given.peer else (OURS,):
        process, address = stack.enter_context(serving(commands[name]))
        traffic = Traffic(address, mix, given.seed, is_documented=name == OURS)
        servers.append(Server(name, process, address, traffic))
    return servers


def main(arguments: Sequence[str]) -> int:
    """Run a part and write the report; exit code 1 if it failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the report")
    add("--part", choices=("load", "deadlines", "memory"), default="load", help="default: load")
    add("--seconds", type=float, default=20, help="duration of a rate (default: 20)")
    add(
        "--deadline-ms",
        type=lambda text: [float(part) for part in text.split(",")],
        default=DEADLINES_MS,
        help=f"of part deadlines (default: {','.join(f'{d:g}' for d in DEADLINES_MS)})",
    )
    add("--levels", type=int, default=8, help="number of rates (default: 8)")
    add("--minutes", type=float, default=20, help="duration of part memory (default: 20)")
    add("--max-queue-size", type=int, default=32, help="of the server (default: 32)")
    add("--seed", type=int, default=0, help="of arrivals and kinds (default: 0)")
    add("--bundle", type=Path, help="bundle to serve (default: the demo model)")
    add("--checkpoint", type=Path, help="the same model for the peer (default: the demo model)")
    add("--no-peer", dest="peer", action="store_false", help="leave out the plain loop")
    given = parser.parse_args(arguments)
    if min(given.seconds, given.minutes) <= 0 or given.levels < 1 or given.max_queue_size < 1:
        parser.error("--seconds and --minutes must be above 0, the others at least 1")
    make_directory(given.out)
    queries = make_queries(NUM_QUERIES, given.seed)
    with ExitStack() as stack:
        measured = asyncio.run(measure(open_servers(stack, given, queries), queries, given))
    command = shlex.join(["python", "benchmarks/server_load.py", *arguments])
    measured = {"command": command, "seed": given.seed, **measured}
    machine = machine_record()
    path = given.out / f"{NAME}-{machine.kind}.json"
    report = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    measured |= {"date": date.today().isoformat(), "machine": machine.to_json()}
    report |= {"suite": NAME, given.part: measured}
    write_json(path, report)
    write_outputs(path, report)
    print("\n".join([str(path), *measured["failures"]]))
    return 1 if measured["failures"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
