"""Measure batch runs of the demo model: throughput, memory, and what kills leave.

    python benchmarks/batch_runs.py speed      rows per second beside a loop over segment
    python benchmarks/batch_runs.py kills      SIGKILL at random moments, then a resumed run
    python benchmarks/batch_runs.py memory     resident memory over many rows

`speed` alternates the two in rounds, on new images with one instruction each and on images with
eight; the loop takes the rows once in the order of the images, and once in that of the
instructions. Loading is not counted. `kills` compares each row of the interrupted runs with a run
that was never interrupted. Prints a table and one line of JSON; exit code 1 if a kill lost,
doubled or changed a row.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import psutil
from PIL import Image

from coprs_deploy import CoPRS, RuntimeOptions
from coprs_deploy.batch.local import run_local
from coprs_deploy.batch.manifest import BatchManifest, BatchOutput
from coprs_deploy.batch.rows import OutputRow, read_part
from coprs_deploy.batch.segment_batch import bundle_fingerprint
from coprs_deploy.batch.sources import RowSource, SourceColumns
from coprs_deploy.batch.workers import WorkerSettings
from coprs_deploy.console import table
from coprs_deploy.data.synthetic import HELD_OUT_SEED, PLAIN, make_scene
from coprs_deploy.data.synthetic.questions import ask_questions

FIRST_SEED = HELD_OUT_SEED + 20_000_000
SAMPLE_SECONDS = 2.0


@dataclass(frozen=True)
class Place:
    """A folder with images and a table of rows."""

    root: Path
    rows: list[tuple[str, str]]

    @property
    def table(self) -> Path:
        """The table, JSON lines."""
        return self.root / "rows.jsonl"


def make_place(root: Path, num_images: int, num_instructions: int, first_seed: int) -> Place:
    """Write scenes with questions about them; the rows are in the order of the images."""
    root.mkdir(parents=True, exist_ok=True)
    rows: list[tuple[str, str]] = []
    seed = first_seed
    while len(rows) < num_images * num_instructions:
        scene = make_scene(PLAIN, seed)
        questions = ask_questions(scene, PLAIN, seed, num_instructions)
        if len(questions) == num_instructions:  # a scene of few objects has fewer
            Image.fromarray(scene.image).save(root / f"{seed}.png")
            rows += [(f"{seed}.png", question.instruction) for question in questions]
        seed += 1
    place = Place(root, rows)
    lines = [json.dumps({"image": image, "instruction": text}) for image, text in rows]
    place.table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return place


def run_batch(place: Place, out: Path, num_workers: int, rows_per_file: int = 1000) -> float:
    """Segment the rows of a table; return the duration in seconds, without loading."""
    source = RowSource(str(place.table), SourceColumns())
    bundle = bundle_fingerprint(None)
    manifest = BatchManifest(bundle, source.fingerprint, {}, source.num_rows, rows_per_file)
    output = BatchOutput(out, manifest)
    settings = WorkerSettings(None, RuntimeOptions())
    with output.opened(resume=False):
        summary = run_local(source, output, settings, num_workers)
    if summary.num_failed:
        raise RuntimeError(f"{summary.num_failed} rows failed: {summary.errors}")
    return summary.seconds


def run_loop(coprs: CoPRS, place: Place, rows: Sequence[tuple[str, str]]) -> float:
    """Segment rows one by one; return the duration in seconds."""
    start = time.perf_counter()
    for image, text in rows:
        coprs.segment(place.root / image, text)
    return time.perf_counter() - start


def measure_speed(folder: Path, num_images: int, rounds: int, num_workers: int) -> dict[str, Any]:
    """Alternate loop and batch; every round has new images."""
    seconds: dict[str, list[float]] = {}
    counts: dict[str, int] = {}
    seed = FIRST_SEED
    with CoPRS.load() as coprs:
        coprs.warm_up()
        for turn in range(rounds):
            for number in (1, 8):
                images = max(2, num_images // number)
                place = make_place(folder / f"{turn}-{number}", images, number, seed)
                seed += 1000
                orders = {"loop": place.rows}
                if number > 1:  # all first instructions, then all second ones
                    apart = [row for i in range(number) for row in place.rows[i::number]]
                    orders["loop, images apart"] = apart
                for name, rows in orders.items():
                    key = f"{number} x {name}"
                    seconds.setdefault(key, []).append(run_loop(coprs, place, rows))
                    counts[key] = len(rows)
                key = f"{number} x batch"
                taken = run_batch(place, place.root / "out", num_workers)
                seconds.setdefault(key, []).append(taken)
                counts[key] = len(place.rows)
    rates = {key: counts[key] / statistics.median(each) for key, each in seconds.items()}
    return {
        "rows_per_second": rates,
        "new_images": rates["1 x batch"] / rates["1 x loop"],
        "eight_instructions": rates["8 x batch"] / rates["8 x loop"],
        "eight_instructions_apart": rates["8 x batch"] / rates["8 x loop, images apart"],
        "rounds": rounds,
        "workers": num_workers,
        "seconds": seconds,
    }


def measure_memory(folder: Path, num_rows: int, num_workers: int) -> dict[str, Any]:
    """Segment rows, eight an image; sample the resident memory of all processes."""
    # The same 64 images again and again: files are few, rows are not.
    place = make_place(folder / "memory", 64, 8, FIRST_SEED + 1_000_000)
    rows = [place.rows[number % len(place.rows)] for number in range(num_rows)]
    lines = [json.dumps({"image": image, "instruction": text}) for image, text in rows]
    place.table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    samples: list[tuple[float, int]] = []
    ended = threading.Event()
    this = psutil.Process()
    start = time.monotonic()

    def sample() -> None:
        while not ended.wait(SAMPLE_SECONDS):
            try:
                processes = [this, *this.children(recursive=True)]
                used = sum(process.memory_info().rss for process in processes)
            except psutil.NoSuchProcess:
                continue
            samples.append((time.monotonic() - start, used))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        seconds = run_batch(place, folder / "out", num_workers)
    finally:
        ended.set()
        thread.join()
    quarter = max(1, len(samples) // 4)
    peaks = [
        max(used for _, used in samples[i : i + quarter]) for i in range(0, len(samples), quarter)
    ]
    return {
        "rows": num_rows,
        "workers": num_workers,
        "seconds": seconds,
        "peak_mb_by_quarter": [round(peak / 1e6) for peak in peaks[:4]],
    }


def command(place: Place, out: Path, num_workers: int) -> list[str]:
    """Return the command of a run that goes on with what is there."""
    return [
        *(sys.executable, "-m", "coprs_deploy", "batch", str(place.table), "--out", str(out)),
        *("--rows-per-file", "4", "--workers", str(num_workers), "--resume", "--json"),
    ]


def kill_runs(folder: Path, num_kills: int, num_workers: int, seed: int) -> dict[str, Any]:
    """Kill runs at random moments; compare what they leave with an uninterrupted run."""
    moments = random.Random(seed)
    place = make_place(folder / "kills", 8, 2, FIRST_SEED + 2_000_000)
    with place.table.open("a", encoding="utf-8") as file:
        file.write('{"image": "missing.png", "instruction": "a ring"}\n')
    start = time.monotonic()
    _complete(place, folder / "reference", num_workers)
    duration = time.monotonic() - start
    reference = results(folder / "reference")
    found: dict[str, Any] = {"kills": 0, "after_the_end": 0, "runs": 0, "violations": []}
    while found["kills"] < num_kills:
        found["runs"] += 1
        out = folder / f"run-{found['runs']}"
        for _ in range(min(5, num_kills - found["kills"])):
            was_running = _kill_once(place, out, num_workers, moments.uniform(0.2, duration))
            found["kills" if was_running else "after_the_end"] += 1
            if not was_running:
                break
        _complete(place, out, num_workers)
        found["violations"] += [f"{out.name}: {text}" for text in check(out, reference)]
    return {**found, "rows": len(reference), "seconds_of_a_run": duration}


def _kill_once(place: Place, out: Path, num_workers: int, after_s: float) -> bool:
    """Kill a run after some time; return whether it was still running."""
    process = subprocess.Popen(
        command(place, out, num_workers), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        process.wait(after_s)
    except subprocess.TimeoutExpired:
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
        _, alive = psutil.wait_procs(children, timeout=60)
        if alive:
            raise RuntimeError(f"{len(alive)} worker processes outlive a killed run") from None
        return True
    return False


def _complete(place: Place, out: Path, num_workers: int) -> None:
    done = subprocess.run(
        command(place, out, num_workers), capture_output=True, text=True, check=False
    )
    if done.returncode != 1:  # one row has no image
        raise RuntimeError(f"exit code {done.returncode}: {done.stderr}")


def results(out: Path) -> list[OutputRow]:
    """Return the rows of all part files, without what differs from run to run."""
    parts = sorted(out.glob("part-*.parquet"))
    rows = [row for path in parts for row in read_part(path)]
    return [msgspec.structs.replace(row, timings={}) for row in rows]


def check(out: Path, reference: Sequence[OutputRow]) -> list[str]:
    """Return what is wrong with the output of a resumed run."""
    rows = results(out)
    problems = []
    if [row.row for row in rows] != [row.row for row in reference]:
        problems.append(f"rows {[row.row for row in rows]}")
    differing = [a.row for a, b in zip(rows, reference, strict=False) if a != b]
    if differing:
        problems.append(f"rows {differing} differ from the uninterrupted run")
    left = [path.name for path in out.rglob(".*") if path.name != ".lock"]
    return problems + ([f"files are left: {left}"] if left else [])


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the arguments and run."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("speed", "kills", "memory"), help="what to measure")
    parser.add_argument("--images", type=int, default=256, help="speed: images of a round")
    parser.add_argument("--rounds", type=int, default=3, help="speed: number of rounds")
    parser.add_argument("--rows", type=int, default=20_000, help="memory: number of rows")
    parser.add_argument("--kills", type=int, default=50, help="kills: number of kills")
    parser.add_argument("--workers", type=int, default=2, help="number of processes")
    parser.add_argument("--seed", type=int, default=0, help="kills: seed of the moments")
    parsed = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="batch-runs-") as name:
        folder = Path(name)
        if parsed.action == "speed":
            found = measure_speed(folder, parsed.images, parsed.rounds, parsed.workers)
            rates = found["rows_per_second"]
            rows = [(key, f"{rate:.2f}") for key, rate in rates.items()]
            print(table(("instructions an image", "rows/s"), rows))
        elif parsed.action == "memory":
            found = measure_memory(folder, parsed.rows, parsed.workers)
            quarters = [
                (f"quarter {i + 1}", f"{peak}")
                for i, peak in enumerate(found["peak_mb_by_quarter"])
            ]
            print(table(("peak of", "MB"), quarters))
        else:
            found = kill_runs(folder, parsed.kills, parsed.workers, parsed.seed)
            for violation in found["violations"]:
                print(violation)
    print(json.dumps(found))
    return 1 if found.get("violations") else 0


if __name__ == "__main__":
    sys.exit(main())
